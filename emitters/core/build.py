"""A plan to a finished bundle, in constant memory, to be resumed from any moment.

claim the output ─ open or resume the journal ─ run the units ─ metadata and side files
─ check and hash what was written ─ record ─ one rename
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from emitters import FORMATS
from emitters.core.finish import finish
from emitters.core.journal import open_journal
from emitters.core.own_head import ensure_equal_heads
from emitters.core.preconditions import ensure_buildable, ensure_supported_system, open_as_planned
from emitters.core.progress import Progress, Silent
from emitters.core.run_unit import ValueDefectError, Work, finding_of
from emitters.core.runners import Receipts, Runner, Threads, write_tensors
from emitters.core.statistics import prepare
from emitters.core.work_units import Spans, fit, plan_units, total_source_nbytes
from emitters.core.workspace import check_contents, check_place, claimed, output_place
from emitters.tensor_io.view_rows import ViewReader
from policy_dsl.diagnostics import Diagnostic, PermanentError
from policy_dsl.formats import Format
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Plan


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did.

    sizes: bytes of every file, by its name; resumed_nbytes: bytes of source weights that an
    earlier run had done; digest: the record's own. findings: warnings about what is left over
    of earlier bundles.
    """

    out: Path
    sizes: Mapping[str, int]
    tensors: int
    source_nbytes: int
    resumed_nbytes: int
    seconds: float
    digest: str
    findings: tuple[Diagnostic, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())


def build(  # noqa: PLR0913 - a plan, its source, and options by keyword
    plan: Plan,
    inventory: Inventory,
    *,
    out: Path,
    jobs: int | None = None,
    force: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
    format: Format | None = None,
    runner: Runner | None = None,
) -> BuildReport:
    """Write the bundle of a plan to the folder `out`; an interrupted build is resumed.

    plan: as `resolve` gives it for this inventory. jobs: threads, by default one for each
    core. force: a bundle that is already there is replaced once the new one is complete, and
    the unfinished build of something else is thrown away. max_memory: bytes that the program
    may take. format: the plan's; None for the one of its name here. runner: who runs the units
    instead of threads.
    Plan and source alone decide the bytes.
    Raises: PolicyError if something is in the way, and KeyboardInterrupt; what is done so far
    then stays in `<out>.partial`.
    """
    started = monotonic()
    known = format or FORMATS[plan.target]
    ensure_supported_system()
    ensure_buildable(plan, inventory)
    ensure_equal_heads(plan, inventory)
    plan, contexts = prepare(plan, known)
    out, shown = output_place(out), progress or Silent()
    workers, block_values = fit(jobs or available_cores(), max_memory, plan)
    # Before anything is made, and again once a bundle that a crash displaced is back.
    check_place(out, inventory.root, force=force)
    with claimed(out) as workspace:
        workspace.recover()
        check_contents(out, force=force)
        source = open_as_planned(plan, inventory, known)
        reader = ViewReader(source, plan.model.config, must_be_finite=True)
        work = Work(known, reader, plan.fp8_rule, workspace.bundle)
        journal = open_journal(workspace, plan, work, force=force)
        total = left = total_source_nbytes(plan)
        if journal.done:
            undone = plan_units(plan, None, block_values, journal.done)
            left = sum(unit.source_nbytes for unit in undone)

        def run(done: Mapping[int, Spans]) -> Receipts:
            units = plan_units(plan, contexts, block_values, done)
            return (runner or Threads(workers)).run(units, work)

        shown.begin("encode", total, total - left)
        try:
            with journal:
                lost = write_tensors(run, left, journal, shown)
            defects = list(work.defects_of_lost(lost))
        except ValueDefectError as defect:
            defects = [defect]
        finally:
            shown.end()
        if defects:
            raise PermanentError(finding_of(defect, plan, known) for defect in defects)
        digest = finish(plan, work, shown, jobs=workers)
        workspace.finish(force=force)
    return BuildReport(
        out=out,
        sizes={file.name: file.nbytes or 0 for file in plan.files},
        tensors=sum(len(module.tensors) for module in plan.modules),
        source_nbytes=plan.source_nbytes,
        resumed_nbytes=total - left,
        seconds=monotonic() - started,
        digest=digest,
        findings=tuple(workspace.left),
    )


def available_cores() -> int:
    """The cores that this program may use."""
    # Containers and schedulers often allow fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
