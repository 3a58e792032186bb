"""A plan to a finished bundle, in constant memory, to be resumed from any moment.

claim the output ─ open or resume the journal ─ run the units ─ metadata and side files
─ check and hash what was written ─ record ─ one rename
"""

import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Protocol

from emitters import format_of
from emitters.core.bundle_reading import written_bundle
from emitters.core.deleting import BROWSED, refuse_others, unfinished_files
from emitters.core.journal import Journal, TensorFile, open_journal, tensor_files
from emitters.core.preconditions import ensure_buildable, open_as_planned
from emitters.core.run_unit import Receipt, ValueDefectError, Work, finding_of
from emitters.core.statistics import prepare
from emitters.core.verify import hash_files, written_checks
from emitters.core.work_units import Spans, Unit, fit, merge_spans, plan_units, total_source_nbytes
from emitters.core.workspace import check_contents, check_place, claimed, output_place
from emitters.tensor_io.files import writing
from emitters.tensor_io.view_rows import ViewReader
from policy_dsl.bounded_json import uncollected
from policy_dsl.diagnostics import Diagnostic, DiskError, PermanentError, PolicyError, diagnostic
from policy_dsl.formats import Format, in_order
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.plan import Plan
from policy_dsl.planning.bundle_files import edited_files
from policy_dsl.planning.record import RECORD, record
from policy_dsl.regular_files import read_range
from policy_dsl.sources.checkpoint import Header

Receipts = Generator[tuple[Unit, Receipt], None, None]
# One wrong offset makes every tensor after it wrong.
_MOST_FINDINGS = 20


class Progress(Protocol):
    """What a build calls, from one thread at a time: begin, advance …, end, for every stage.

    Stages: `encode` in bytes of source weights, `hash` in bytes of the bundle.
    """

    def begin(self, stage: str, total: int, done: int) -> None:
        """A stage starts; of its `total` bytes an earlier run has `done` some."""

    def advance(self, nbytes: int) -> None:
        """Advance by `nbytes`."""

    def end(self) -> None:
        """The stage is over, complete or not."""


class Silent:
    """Reports nothing."""

    def begin(self, *_: object) -> None:
        """Nothing."""

    advance = end = begin


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build did. sizes: bytes of every file, by its name; digest: the record's own.

    resumed_nbytes: source weights that an earlier run had done. findings: what earlier ones left.
    """

    out: Path
    sizes: Mapping[str, int]
    tensors: int
    resumed_nbytes: int
    seconds: float
    digest: str
    findings: tuple[Diagnostic, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes.values())


class Runner(Protocol):
    """Runs units of a build anywhere, in any order; units and `work` can be pickled."""

    def run(self, units: Iterable[Unit], work: Work) -> Receipts:
        """The receipt of every unit for which `work(unit)` has ended, in any order.

        Units are taken as they are needed. One without a receipt is given to a later call.
        Raises: what a unit raised, after the receipts of those that have ended.
        """


class Threads:
    """`jobs` threads: kernels, reads, writes and hashes release the GIL."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs

    def run(self, units: Iterable[Unit], work: Work) -> Receipts:
        """The receipts of units as they end. After the first error, those under way come first."""
        left = iter(units)
        running: dict[Future[Receipt], Unit] = {}
        with ThreadPoolExecutor(self.jobs, "unit") as workers:
            try:
                while True:
                    # One in work and one at hand for each worker, whatever the plan's size.
                    for unit in islice(left, 2 * self.jobs - len(running)):
                        running[workers.submit(work, unit)] = unit
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        receipt = future.result()
                        yield running.pop(future), receipt
            except BaseException as error:
                workers.shutdown(cancel_futures=True)
                for future, unit in running.items():
                    if isinstance(error, GeneratorExit) or future.cancelled():
                        continue
                    if future.exception() is None:
                        yield unit, future.result()
                raise


def build(  # noqa: PLR0913 - a plan, its source, and options by keyword
    plan: Plan,
    inventory: Inventory | None = None,
    *,
    out: str | Path,
    jobs: int | None = None,
    force: bool = False,
    max_memory: int | None = None,
    progress: Progress | None = None,
    format: Format | None = None,
    runner: Runner | None = None,
) -> BuildReport:
    """Write the bundle of a plan to the folder `out`; an interrupted build is resumed.

    inventory: that the plan is for, by default its own. jobs: threads, by default one for each
    core. force: a bundle that is already there is replaced once the new one is complete, and the
    unfinished build of something else is thrown away. max_memory: bytes that the program may take.
    format: the plan's, by default the one of its name. runner: runs the units instead of threads.
    Plan and source alone decide the bytes.
    Raises: PolicyError if something is in the way, and KeyboardInterrupt; what is done so far
    then stays in `<out>.partial`.
    """
    started = monotonic()
    format, inventory = format or format_of(plan.target), inventory or plan.inventory
    if inventory is None:
        raise ValueError("the plan does not say which source it is for: make it by policyc.plan")
    ensure_buildable(plan, inventory)
    plan, contexts = prepare(plan, format)
    out, shown = output_place(Path(out)), progress or Silent()
    workers, block_values = fit(jobs or available_cores(), max_memory, plan.modules)
    # Before anything is made, and again once a bundle that a crash displaced is back.
    check_place(out, inventory.root, force=force)
    with claimed(out) as workspace:
        workspace.recover()
        check_contents(out, force=force)
        source = open_as_planned(plan, inventory, format)
        reader = ViewReader(source, plan.model.config, must_be_finite=True)
        work = Work(format, reader, plan.fp8_rule, workspace.bundle)
        with uncollected():
            files = tensor_files(plan, work)
            journal = open_journal(workspace, plan, work, files, force=force)
        total = left = total_source_nbytes(plan)
        if journal.done:
            undone = plan_units(plan, None, block_values, journal.done)
            left = sum(unit.source_nbytes for unit in undone)

        def run(done: Mapping[int, Spans]) -> Receipts:
            units = plan_units(plan, contexts, block_values, done)
            return (runner or Threads(workers)).run(units, work)

        shown.begin("encode", total, total - left)
        try:
            with closing(journal):
                lost = _write_tensors(run, left, journal, shown)
            defects = list(work.defects_of_lost(lost))
        except ValueDefectError as defect:
            defects = [defect]
        finally:
            shown.end()
        if defects:
            raise PermanentError(finding_of(defect, plan, format) for defect in defects)
        # A million objects are made and kept.
        with uncollected():
            digest = _finish(plan, work, files, shown, jobs=workers)
        workspace.finish(force=force)
    return BuildReport(
        out=out,
        sizes={file.name: file.nbytes or 0 for file in plan.files},
        tensors=sum(len(module.tensors) for module in plan.modules),
        resumed_nbytes=total - left,
        seconds=monotonic() - started,
        digest=digest,
        findings=tuple(workspace.left),
    )


def available_cores() -> int:
    """The cores that this program may use."""
    # Containers and schedulers often allow fewer cores than the machine has.
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _write_tensors(
    run: Callable[[Mapping[int, Spans]], Receipts], left: int, journal: Journal, progress: Progress
) -> list[Unit]:
    """Write all rows that are not on disk yet; returns the units whose values all became 0.

    run(done): of the units without the rows in `done`. left: bytes of weights that they read.
    """
    lost: list[Unit] = []
    done = dict(journal.done)
    while left:
        ended: dict[int, set[tuple[int, int]]] = defaultdict(set)
        with closing(run(done)) as receipts:
            for unit, receipt in receipts:
                if unit.span in ended[unit.module]:
                    continue
                ended[unit.module].add(unit.span)
                # One whose values are lost must be found again by the next run.
                if receipt.is_lost:
                    lost.append(unit)
                else:
                    journal.add(unit, receipt)
                nbytes = unit.source_nbytes
                left -= nbytes
                progress.advance(nbytes)
        if not ended:
            cure = "run the same command again: it is resumed"
            raise PolicyError([diagnostic("units-lost", suggestion=cure)])
        for module, spans in ended.items():
            done[module] = merge_spans((*done.get(module, ()), *spans))
    return lost


def _finish(
    plan: Plan, work: Work, headers: Iterable[TensorFile], progress: Progress, *, jobs: int
) -> str:
    """Complete the bundle whose tensors are written; returns the record's digest."""
    folder, source = work.folder, work.reader.source
    # Nothing is written through a link that was put here meanwhile.
    unfinished_files(folder, {BROWSED, *(file.name for file in plan.files)})
    beside = source.whole(work.format.spec.edited_files)
    written = work.format.files().metadata(plan) | edited_files(plan, work.format, beside)
    for name, content in written.items():
        _write(folder / name, [content])
    for file in plan.files:
        if file.kind == "copied":
            _write(folder / file.name, source.pieces(file.name))
    # Sizes and headers first: hashing a wrong bundle would waste minutes.
    sizes = {file.name: file.nbytes or 0 for file in plan.files if file.kind != "record"}
    _check_files(plan, folder, sizes)
    check_bundle(plan, work, headers)
    progress.begin("hash", sum(sizes.values()), 0)
    try:
        planned = in_order(plan.modules)
        files, tensors = hash_files(folder, sizes, planned, progress.advance, jobs=jobs)
    finally:
        progress.end()
    content, digest = record(plan, files=files, tensors=tensors)
    _write(folder / RECORD, [content])
    _check_files(plan, folder, [*sizes, RECORD])
    return digest


def check_bundle(plan: Plan, work: Work, headers: Iterable[TensorFile]) -> None:
    """Raises: PermanentError unless the written bundle is planned and sound.

    Its headers are these, byte for byte, and nothing that `verify` looks at, hashes and values
    aside, is wrong.
    """
    known = _checked_headers(headers, work.folder)
    try:
        bundle = written_bundle(plan, work.folder, work.format, known)
    except DiskError:
        raise
    except PolicyError as error:
        raise PermanentError(error.diagnostics) from error
    findings = (found for check in written_checks(bundle, values=False) for found in check.findings)
    found = [finding for finding in findings if finding.severity == "error"]
    if found:
        raise PermanentError(found[:_MOST_FINDINGS])


def _write(path: Path, content: Iterable[bytes | memoryview]) -> None:
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        # What an earlier run wrote, or a link; "x" never writes through one.
        path.unlink(missing_ok=True)
        with path.open("xb") as opened:
            opened.writelines(content)


def _check_files(plan: Plan, folder: Path, names: Iterable[str]) -> None:
    """Raises: PolicyError unless the folder holds these files at their planned sizes."""
    with writing(folder):
        sizes = {
            path.relative_to(folder).as_posix(): path.lstat().st_size
            for path in sorted(folder.rglob("*"))
            if not path.is_dir() or path.is_symlink()
        }
    # Not a wrong result, which would be deleted with what somebody put here. An earlier run
    # may have come as far as writing the record.
    refuse_others(folder, sizes.keys() - {*names, RECORD, BROWSED})
    planned = {file.name: file.nbytes for file in plan.files}
    _refuse(
        f"{name} has {sizes.get(name)} bytes, planned were {planned[name]}"
        for name in sorted(names)
        if planned[name] != sizes.get(name)
    )


def _checked_headers(files: Iterable[TensorFile], folder: Path) -> dict[str, Header]:
    """File -> name -> tensor. Raises: PermanentError if a written header is not the plan's."""
    checked, reasons = {}, []
    for file, header, tensors in files:
        if read_range(folder / file.name, 0, len(header)) != header:
            reasons.append(f"the header of {file.name} is not the planned one")
        checked[file.name] = {
            name: TensorInfo(name, dtype, shape, nbytes, place, start, start + nbytes)
            for name, _, dtype, shape, nbytes, place, start, *_ in tensors
        }
    _refuse(reasons)
    return checked


def _refuse(reasons: Iterable[str]) -> None:
    """Raises: PermanentError if there are reasons why the result is wrong."""
    some = [diagnostic("wrong-result", reason=each) for each in islice(reasons, _MOST_FINDINGS)]
    if some:
        raise PermanentError(some)
