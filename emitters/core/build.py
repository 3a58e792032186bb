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
from emitters.core.blocks import Outcome, Site
from emitters.core.bundle import complete
from emitters.core.journal import Journal, Savepoints
from emitters.core.losses import ensure_something_left
from emitters.core.own_head import ensure_equal_heads
from emitters.core.progress import Progress, Silent
from emitters.core.readiness import ensure_buildable, ensure_supported_system
from emitters.core.same_source import ensure_as_planned
from emitters.core.seal import seal
from emitters.core.start import identity_of, open_journal
from emitters.core.statistics import prepare
from emitters.core.units import Unit, fit, plan_units, source_nbytes, total_source_nbytes
from emitters.core.workers import run_units
from emitters.core.workspace import check_early, check_output, claimed, output_place
from emitters.tensor_io.read import Source, file_facts
from emitters.tensor_io.view_rows import ViewReader
from policy_dsl.diagnostics import Diagnostic
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
) -> BuildReport:
    """Write the bundle of a plan to the folder `out`; an interrupted build is resumed.

    plan: as `resolve` gives it for this inventory. jobs: threads, by default one for each
    core. force: a bundle that is already there is replaced once the new one is complete, and
    the unfinished build of something else is thrown away. max_memory: bytes that the program
    may take. format: the plan's; None for the one of its name here.
    Plan and source alone decide the bytes.
    Raises: PolicyError if something is in the way, and KeyboardInterrupt; what is done so far
    then stays in `<out>.partial`.
    """
    started = monotonic()
    known = format or FORMATS[plan.target]
    ensure_supported_system()
    ensure_buildable(plan, inventory)
    ensure_equal_heads(plan, inventory)
    plan, prepared = prepare(complete(plan, inventory, known), known)
    out, told = output_place(out), progress or Silent()
    workers, block_values = fit(jobs or available_cores(), max_memory, plan)
    # Before anything is made, and again once a bundle that a crash displaced is back.
    check_early(out, inventory.root, force=force)
    with claimed(out) as workspace:
        workspace.recover()
        check_output(out, inventory.root, force=force)
        source = _source(plan, inventory, known)
        reader = ViewReader(source, plan.model.config, must_be_finite=True)
        site = Site(plan, known, reader, workspace.bundle, prepared)
        identity = identity_of(plan, site.source)
        journal = open_journal(workspace, site, identity, force=force)
        resumed = _write_tensors(site, journal, told, jobs=workers, block_values=block_values)
        digest = seal(site, told, jobs=workers)
        workspace.finish(force=force)
    return BuildReport(
        out=out,
        sizes={file.name: file.nbytes or 0 for file in plan.files},
        tensors=sum(len(module.tensors) for module in plan.modules),
        source_nbytes=plan.source_nbytes,
        resumed_nbytes=resumed,
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


def _source(plan: Plan, inventory: Inventory, format: Format) -> Source:
    root = inventory.root or Path()
    rows_read = [rows for module in plan.modules for rows in module.sources]
    shards = {rows.tensor.file or "" for rows in rows_read}
    scales = {rows.scale.file or "" for rows in rows_read if rows.scale}
    # Side files too: a tokenizer that changes half-way belongs to another state of the source.
    beside = {file.name for file in plan.files if file.kind in ("copied", "edited")}
    beside |= {*format.spec.embedded_files} & {*(inventory.side_files or {})}
    source = Source(root, file_facts(root, shards | scales | beside))
    # From here on every read compares with these facts; this compares them with the plan's.
    ensure_as_planned(inventory, source.facts)
    return source


def _write_tensors(
    site: Site, journal: Journal, progress: Progress, *, jobs: int, block_values: int
) -> int:
    """Write all rows that are not on disk yet; returns source bytes that were done before."""
    plan = site.plan
    total = total_source_nbytes(plan)
    units = list(plan_units(plan, block_values=block_values, done=journal.done))
    resumed = total - sum(source_nbytes(plan, unit) for unit in units)

    lost: list[Unit] = []

    def finished(unit: Unit, outcome: Outcome) -> None:
        progress.advance(source_nbytes(plan, unit))
        if outcome.is_lost:
            lost.append(unit)

    progress.begin("encode", total, resumed)
    try:
        savepoints = Savepoints(journal, plan, site.folder)
        run_units(iter(units), site, savepoints, jobs=jobs, finished=finished)
    finally:
        progress.end()
    ensure_something_left(site, lost)
    return resumed
