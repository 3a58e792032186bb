"""The end of a build: files beside the tensors, a check of all, the hashes, the record."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from emitters.core.bundle_reading import open_bundle
from emitters.core.deleting import BROWSED, refuse_others, unfinished_files
from emitters.core.hashing import FileHashes, Places, hash_files
from emitters.core.progress import Progress
from emitters.core.record import planned_record
from emitters.core.run_unit import Work
from emitters.core.verify import written_stages
from emitters.core.workspace import written_files
from emitters.tensor_io.read import Source
from emitters.tensor_io.shards import writing
from policy_dsl.diagnostics import (
    Diagnostic,
    DiskError,
    PermanentError,
    PolicyError,
    diagnostic,
    errors,
)
from policy_dsl.formats import Format
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Plan, PlannedFile
from policy_dsl.planning.bundle_files import edited_files
from policy_dsl.planning.record import RECORD, UNKNOWN_HASH, record

_CHUNK_NBYTES = 4 * 2**20
# One wrong offset makes every tensor after it wrong.
_MOST_FINDINGS = 20


def finish(plan: Plan, work: Work, progress: Progress, *, jobs: int) -> str:
    """Complete the bundle whose tensors are written; returns the record's digest.

    Raises: PolicyError if a file cannot be written or what was written is not what was planned.
    """
    folder = work.folder
    # Nothing is written through a link that was put here meanwhile.
    unfinished_files(folder, {BROWSED, *(file.name for file in plan.files)})
    beside = work.source.whole(work.format.spec.edited_files)
    written = work.format.files().metadata(plan) | edited_files(plan, work.format, beside)
    for name, content in written.items():
        _write(folder / name, content)
    for file in plan.files:
        if file.kind == "copied":
            _copy(work.source, file, folder / file.name)
    # Sizes and headers first: hashing a wrong bundle would waste minutes.
    _check_files(plan, folder)
    with _uncollected():
        check_bundle(plan, folder, work.format)
    hashes = _hashed(plan, folder, progress, jobs)
    files = {name: (hashed.nbytes, hashed.sha256) for name, hashed in hashes.items()}
    tensors = {name: hash_ for hashed in hashes.values() for name, hash_ in hashed.tensors.items()}
    content, digest = record(plan, files=files, tensors=tensors)
    _write(folder / RECORD, content)
    _check_files(plan, folder, record=True)
    return digest


@contextmanager
def _uncollected() -> Iterator[None]:
    """A context in which Python looks for no garbage: that would take as long as the work itself.

    A million objects are made there and kept.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def check_bundle(plan: Plan, folder: Path, format: Format) -> None:
    """Raises: PermanentError unless the written bundle is planned and sound.

    It is read by code that did not write it: its headers hold exactly the planned tensors at
    their places, and nothing that `verify` looks at, hashes and values aside, is wrong.
    """
    sizes = {file.name: (file.nbytes or 0, UNKNOWN_HASH) for file in plan.files}
    sizes.pop(RECORD, None)
    expected = planned_record(plan, sizes)
    try:
        bundle = open_bundle(folder, expected, formats={format.name: format})
    except DiskError:
        raise
    except PolicyError as error:
        raise PermanentError(error.diagnostics) from error
    _refuse(_tensor_defects(plan, bundle.inventory.tensors))
    stages = written_stages(bundle, values=False)
    _refuse(errors([found for stage in stages for found in stage.findings]))


def _write(path: Path, content: bytes) -> None:
    with writing(path), _new(path) as opened:
        opened.write(content)


def _copy(source: Source, file: PlannedFile, path: Path) -> None:
    """A side file of the source, byte for byte."""
    nbytes = file.nbytes or 0
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        with _new(path) as opened:
            for start in range(0, nbytes, _CHUNK_NBYTES):
                count = min(_CHUNK_NBYTES, nbytes - start)
                opened.write(source.read(file.name, start, count).data)


def _new(path: Path) -> BinaryIO:
    # What an earlier run wrote, or a link; "x" never writes through one.
    path.unlink(missing_ok=True)
    return path.open("xb")


def _check_files(plan: Plan, folder: Path, *, record: bool = False) -> None:
    """Raises: PolicyError unless the folder holds the planned files at their planned sizes."""
    planned = {file.name: file.nbytes for file in plan.files if record or file.kind != "record"}
    sizes = written_files(folder)
    # Not a wrong result, which would be deleted with what somebody put here.
    refuse_others(folder, sizes.keys() - planned.keys() - {RECORD, BROWSED})
    # An earlier run may have come as far as writing the record.
    for name in sorted(planned):
        if planned[name] != sizes.get(name):
            reason = f"{name} has {sizes.get(name)} bytes, planned were {planned[name]}"
            raise PermanentError([_wrong(reason)])


def _tensor_defects(plan: Plan, written: Mapping[str, TensorInfo]) -> Iterator[Diagnostic]:
    planned = {tensor.name: tensor for module in plan.modules for tensor in module.tensors}
    for name in sorted(written.keys() - planned.keys()):
        yield _wrong(f"{name} is one tensor too many")
    for name, tensor in planned.items():
        wanted = (tensor.dtype, tensor.shape, tensor.nbytes, tensor.file, tensor.start)
        if name not in written:
            yield _wrong(f"{name} is missing")
        elif written[name][1:6] != wanted:
            yield _wrong(f"{name} is not where or what it should be")


def _wrong(reason: str) -> Diagnostic:
    return diagnostic("wrong-result", reason=reason)


def _refuse(defects: Iterable[Diagnostic]) -> None:
    some = list(islice(defects, _MOST_FINDINGS))
    if some:
        raise PermanentError(some)


def _hashed(plan: Plan, folder: Path, progress: Progress, jobs: int) -> dict[str, FileHashes]:
    """The hashes of every file but the record, by name."""
    files = {file.name: file.nbytes or 0 for file in plan.files if file.kind != "record"}
    places: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in files}
    for module in plan.modules:
        for tensor in module.tensors:
            places[tensor.file][tensor.name] = (tensor.start, tensor.start + tensor.nbytes)
    # Files are hashed by several threads; a progress display expects one at a time.
    lock = Lock()

    def advance(nbytes: int) -> None:
        with lock:
            progress.advance(nbytes)

    progress.begin("hash", sum(files.values()), 0)
    try:
        paths: dict[Path, Places] = {folder / name: held for name, held in places.items()}
        hashed = hash_files(paths, jobs=jobs, advance=advance)
    finally:
        progress.end()
    return {path.relative_to(folder).as_posix(): hashes for path, hashes in hashed.items()}
