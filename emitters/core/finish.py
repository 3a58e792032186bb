"""The end of a build: files beside the tensors, a check of all, the hashes, the record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from emitters.core.bundle_reading import open_bundle
from emitters.core.deleting import BROWSED, refuse_others, unfinished_files
from emitters.core.progress import Progress
from emitters.core.record import planned_record
from emitters.core.run_unit import Work
from emitters.core.verify import hash_files, written_checks
from emitters.tensor_io.files import writing
from policy_dsl.bounded_json import uncollected
from policy_dsl.diagnostics import DiskError, PermanentError, PolicyError, diagnostic, errors
from policy_dsl.formats import Format, in_order
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Plan
from policy_dsl.planning.bundle_files import edited_files
from policy_dsl.planning.record import RECORD, UNKNOWN_HASH, record

# One wrong offset makes every tensor after it wrong.
_MOST_FINDINGS = 20


def finish(plan: Plan, work: Work, progress: Progress, *, jobs: int) -> str:
    """Complete the bundle whose tensors are written; returns the record's digest.

    Raises: PolicyError if a file cannot be written or what was written is not what was planned.
    """
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
    names = [file.name for file in plan.files if file.kind != "record"]
    _check_files(plan, folder, names)
    # A million objects are made and kept.
    with uncollected():
        check_bundle(plan, folder, work.format)
    hashes = hash_files(folder, names, in_order(plan.modules), progress, jobs=jobs)
    files = {name: (hashed.nbytes, hashed.sha256) for name, hashed in hashes.items()}
    tensors = {name: hash_ for hashed in hashes.values() for name, hash_ in hashed.tensors.items()}
    content, digest = record(plan, files=files, tensors=tensors)
    _write(folder / RECORD, [content])
    _check_files(plan, folder, [*names, RECORD])
    return digest


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
    _refuse(_misplaced(plan, bundle.inventory.tensors))
    checks = written_checks(bundle, values=False)
    found = errors([found for check in checks for found in check.findings])
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


def _misplaced(plan: Plan, written: Mapping[str, TensorInfo]) -> Iterator[str]:
    planned = {tensor.name: tensor for tensor in in_order(plan.modules)}
    for name in sorted(written.keys() - planned.keys()):
        yield f"{name} is one tensor too many"
    for name, tensor in planned.items():
        wanted = (tensor.dtype, tensor.shape, tensor.nbytes, tensor.file, tensor.start)
        if name not in written:
            yield f"{name} is missing"
        elif written[name][1:6] != wanted:
            yield f"{name} is not where or what it should be"


def _refuse(reasons: Iterable[str]) -> None:
    """Raises: PermanentError if there are reasons why the result is wrong."""
    some = [diagnostic("wrong-result", reason=each) for each in islice(reasons, _MOST_FINDINGS)]
    if some:
        raise PermanentError(some)
