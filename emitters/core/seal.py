"""The end of a build: files beside the tensors, the self-check, the hashes, the record."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import BinaryIO

from emitters.core.bundle import edited_files
from emitters.core.deleting import BROWSED, refuse_others, unfinished_files
from emitters.core.hashing import FileHashes, Places, hash_files
from emitters.core.progress import Progress
from emitters.core.run_unit import Work
from emitters.core.self_check import check_bundle
from emitters.core.workspace import written_files
from emitters.tensor_io.shards import writing
from policy_dsl.diagnostics import PermanentError, diagnostic
from policy_dsl.plan import Plan
from policy_dsl.planning.record import RECORD, record

_CHUNK_NBYTES = 4 * 2**20


def seal(plan: Plan, work: Work, progress: Progress, *, jobs: int) -> str:
    """Complete the bundle whose tensors are written; returns the record's digest.

    Raises: PolicyError if a file cannot be written or what was written is not what was planned.
    """
    folder = work.folder
    # Nothing is written through a link that was put here meanwhile.
    unfinished_files(folder, {BROWSED, *(file.name for file in plan.files)})
    written = work.format.files().metadata(plan) | edited_files(plan, work.source, work.format)
    for name, content in written.items():
        _write(folder / name, content)
    for file in plan.files:
        if file.kind == "copied":
            _copy(work, file.name, file.nbytes or 0)
    # Sizes and headers first: hashing a wrong bundle would waste minutes.
    _check_files(plan, folder)
    check_bundle(plan, folder, work.format)
    hashes = _hashed(plan, folder, progress, jobs)
    content, digest = _record(plan, hashes)
    _write(folder / RECORD, content)
    _check_files(plan, folder, record=True)
    return digest


def _write(path: Path, content: bytes) -> None:
    with writing(path), _new(path) as opened:
        opened.write(content)


def _copy(work: Work, name: str, nbytes: int) -> None:
    """The side file `name` of the source, byte for byte."""
    path = work.folder / name
    with writing(path):
        path.parent.mkdir(exist_ok=True)
    with writing(path), _new(path) as opened:
        for start in range(0, nbytes, _CHUNK_NBYTES):
            count = min(_CHUNK_NBYTES, nbytes - start)
            opened.write(work.source.read(name, start, count).data)


def _new(path: Path) -> BinaryIO:
    # What an earlier run wrote, or a link; "x" never writes through one.
    path.unlink(missing_ok=True)
    return path.open("xb")


def _check_files(plan: Plan, folder: Path, *, record: bool = False) -> None:
    """Raises: PolicyError unless the folder holds the planned files at their planned sizes."""
    planned = {file.name: file.nbytes for file in plan.files if record or file.kind != "record"}
    found = written_files(folder)
    # Not a wrong result, which would be deleted with what somebody put here.
    others = found.keys() - planned.keys() - {RECORD, BROWSED}
    refuse_others(folder, others)
    # An earlier run may have come as far as writing the record.
    found = {name: size for name, size in found.items() if name in planned}
    for name in sorted(planned.keys() | found.keys()):
        if planned.get(name) != found.get(name):
            reason = f"{name} has {found.get(name)} bytes, planned were {planned.get(name)}"
            raise PermanentError([diagnostic("wrong-result", reason=reason)])


def _hashed(plan: Plan, folder: Path, progress: Progress, jobs: int) -> dict[str, FileHashes]:
    """The hashes of every file but the record, by name."""
    places: dict[str, dict[str, tuple[int, int]]] = {
        file.name: {} for file in plan.files if file.kind != "record"
    }
    for module in plan.modules:
        for tensor in module.tensors:
            places[tensor.file][tensor.name] = (tensor.start, tensor.start + tensor.nbytes)
    # Files are hashed by several threads; a progress display expects one at a time.
    lock = Lock()

    def advance(nbytes: int) -> None:
        with lock:
            progress.advance(nbytes)

    total = sum(file.nbytes or 0 for file in plan.files if file.kind != "record")
    progress.begin("hash", total, 0)
    try:
        files: dict[Path, Places] = {folder / name: held for name, held in places.items()}
        hashed = hash_files(files, jobs=jobs, advance=advance)
    finally:
        progress.end()
    return {path.relative_to(folder).as_posix(): found for path, found in hashed.items()}


def _record(plan: Plan, hashes: dict[str, FileHashes]) -> tuple[bytes, str]:
    files = {name: (found.nbytes, found.sha256) for name, found in hashes.items()}
    tensors: dict[str, str] = {}
    for found in hashes.values():
        tensors.update(found.tensors)
    return record(plan, files=files, tensors=tensors)
