"""A plan to a finished bundle, in constant memory, to be resumed from any moment.

claim the output ─ open or resume the journal ─ run the units ─ metadata and side files
─ check and hash what was written ─ record ─ one rename
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic

from emitters import FORMATS
from emitters.core.finish import finish
from emitters.core.journal import Journal, Savepoints
from emitters.core.open_build import identity_of, open_journal
from emitters.core.own_head import ensure_equal_heads
from emitters.core.preconditions import ensure_buildable, ensure_supported_system, open_as_planned
from emitters.core.progress import Progress, Silent
from emitters.core.run_unit import Receipt, Work
from emitters.core.runners import Runner, Threads
from emitters.core.statistics import prepare
from emitters.core.value_errors import ValueDefectError, finding_of
from emitters.core.work_units import Spans, Unit, fit, merge_spans, plan_units, total_source_nbytes
from emitters.core.workspace import check_early, check_output, claimed, output_place
from emitters.tensor_io.view_rows import ViewReader
from policy_dsl.diagnostics import Diagnostic, PermanentError, fail
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
    check_early(out, inventory.root, force=force)
    with claimed(out) as workspace:
        workspace.recover()
        check_output(out, inventory.root, force=force)
        source = open_as_planned(plan, inventory, known)
        reader = ViewReader(source, plan.model.config, must_be_finite=True)
        work = Work(known, reader, plan.fp8_rule, workspace.bundle)
        journal = open_journal(workspace, plan, work, identity_of(plan, source), force=force)
        units = partial(plan_units, plan, contexts, block_values)
        total = total_source_nbytes(plan)
        left = total
        if journal.done:
            undone = plan_units(plan, None, block_values, journal.done)
            left = sum(unit.source_nbytes for unit in undone)
        shown.begin("encode", total, total - left)
        try:
            lost = _write_tensors(work, units, journal, runner or Threads(workers), shown)
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


class _Round:
    """Units given to a runner: how many it took, and which of them came back."""

    def __init__(self, units: Iterator[Unit]) -> None:
        self._units = units
        self._taken = 0
        self._are_all_taken = False
        self.ended: dict[int, set[tuple[int, int]]] = {}

    def __iter__(self) -> Iterator[Unit]:
        """The units, each once."""
        for unit in self._units:
            self._taken += 1
            yield unit
        self._are_all_taken = True

    def is_new(self, receipt: tuple[Unit, Receipt]) -> bool:
        """Count a unit that came back, and whether it did for the first time."""
        unit, _ = receipt
        spans = self.ended.setdefault(unit.module, set())
        is_new = unit.span not in spans
        spans.add(unit.span)
        return is_new

    @property
    def is_complete(self) -> bool:
        """Whether every unit was taken and has ended."""
        return self._are_all_taken and sum(map(len, self.ended.values())) == self._taken


def _write_tensors(
    work: Work,
    units: Callable[[Mapping[int, Spans]], Iterator[Unit]],
    journal: Journal,
    runner: Runner,
    progress: Progress,
) -> list[Unit]:
    """Write all rows that are not on disk yet; returns the units whose values all became 0.

    units(done): those without the rows in `done`.
    Raises: what the work raises; PolicyError if the runner brings nothing back.
    """
    lost: list[Unit] = []
    done = dict(journal.done)
    with Savepoints(journal, work.folder) as savepoints:
        while True:
            given = _Round(units(done))
            lost += _run(given, work, savepoints, runner, progress)
            if given.is_complete:
                return lost
            if not given.ended:
                raise fail("units-lost", suggestion="run the same command again: it is resumed")
            for module, spans in given.ended.items():
                done[module] = merge_spans((*done.get(module, ()), *spans))


def _run(
    given: _Round, work: Work, savepoints: Savepoints, runner: Runner, progress: Progress
) -> list[Unit]:
    """Run units; returns those whose values all became 0."""
    lost = []
    with closing(runner.run(given, work)) as receipts:
        for unit, receipt in filter(given.is_new, receipts):
            # One whose values are lost must be found again by the next run.
            if receipt.is_lost:
                lost.append(unit)
            else:
                # Without what its method computed, which may be large: only its place is needed.
                savepoints.add(unit._replace(context=None), receipt)
            progress.advance(unit.source_nbytes)
    return lost
