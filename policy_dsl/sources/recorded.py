"""Recorded headers: an Inventory as a small JSON file, so that planning needs no checkpoint.

    write_recorded(inventory)  the text     read_recorded(path)  the inventory again

Names are written as patterns (see name_patterns), grouped by file, dtype and shape; where a
tensor lies follows from its file's size (see recorded_form). A null file says that the shard
map is not known.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from operator import attrgetter
from pathlib import Path

from pydantic import ValidationError

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.escaping import is_plain_name, shown
from policy_dsl.inventory import DTYPE_BITS, Inventory, TensorInfo, tensor_nbytes
from policy_dsl.regular_files import read_whole, refuse_placeholder
from policy_dsl.sources.checkpoint import is_shard_name
from policy_dsl.sources.name_patterns import expand_pattern, name_patterns
from policy_dsl.sources.recorded_form import (
    Group,
    Recorded,
    RecordedFile,
    Totals,
    first_defect,
    placed,
    usual_order,
)
from policy_dsl.sources.side_files import SUBFOLDERS

# Of its text, unpacked. Those of the largest models have a few thousand bytes.
MAX_NBYTES = 32 * 2**20
# Five times what the largest releases have; each costs some microseconds to understand.
MAX_TENSORS = 250_000
MAX_LETTERS = 25_000_000


def write_recorded(inventory: Inventory) -> str:
    """The inventory as JSON text, one line per group of tensors; its root is left out.

    Raises: PolicyError if it is no safetensors checkpoint; ValueError if the tensors of a file
    leave holes, which no reader lets through.
    """
    if inventory.container is not None:
        form = inventory.container.form
        raise fail("unrecordable-source", model=inventory.id, form=form)
    by_file: dict[str | None, list[TensorInfo]] = {}
    for tensor in sorted(inventory.tensors.values(), key=attrgetter("start")):
        by_file.setdefault(tensor.file, []).append(tensor)
    # A shard without tensors is still a file of the checkpoint.
    for file in inventory.file_nbytes:
        by_file.setdefault(file, [])
    record = Recorded(
        policyc_headers=1,
        id=inventory.id,
        notes=list(inventory.notes),
        config=dict(inventory.config),
        side_files=None if inventory.side_files is None else dict(inventory.side_files),
        totals=Totals(tensors=len(inventory.tensors), nbytes=inventory.nbytes),
        files=[
            _record_file(file, inventory.file_nbytes.get(file or ""), held)
            for file, held in by_file.items()
        ],
    )
    return "{" + ",\n ".join(_lines(record)) + "}\n"


def read_recorded(path: Path) -> Inventory:
    """The inventory that a recorded headers file holds, gzipped or not.

    Raises: PolicyError if it cannot be read, is malformed, or contradicts itself.
    """
    try:
        record = Recorded.model_validate(parse_json(_read_text(path)))
        return _inventory(record)
    except ValidationError as error:
        raise _bad(path, first_defect(error)) from error
    except ValueError as error:
        raise _bad(path, str(error)) from error


def _read_text(path: Path) -> bytes:
    text = read_whole(path, most=MAX_NBYTES)
    # Told by its first bytes, for names lie.
    if text.startswith(b"\x1f\x8b"):
        try:
            # One byte more than allowed shows a bomb without unpacking it.
            with gzip.open(BytesIO(text)) as unpacked:
                text = unpacked.read(MAX_NBYTES + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _bad(path, f"its compression is broken: {error}") from error
    refuse_placeholder(path.name, text, len(text))
    if len(text) > MAX_NBYTES:
        raise _bad(path, f"it holds more than {MAX_NBYTES} bytes")
    return text


def _inventory(record: Recorded) -> Inventory:
    _check_names(record)
    tensors: dict[str, TensorInfo] = {}
    letters = 0
    for held in record.files:
        here = _file_tensors(held, MAX_TENSORS - len(tensors), MAX_LETTERS - letters)
        letters += sum(map(len, here))
        both = tensors.keys() & here.keys()
        if both:
            raise ValueError(f'the tensor "{min(both)}" is in two files')
        tensors |= here
    inventory = Inventory(
        id=record.id,
        config=record.config,
        tensors=tensors,
        side_files=record.side_files,
        file_nbytes={
            held.file: held.nbytes
            for held in record.files
            if held.file is not None and held.nbytes is not None
        },
        notes=tuple(record.notes),
    )
    _check_totals(record, inventory)
    return inventory


def _check_totals(record: Recorded, inventory: Inventory) -> None:
    # Written records are right by construction; these catch edits by hand.
    counted = Totals(tensors=len(inventory.tensors), nbytes=inventory.nbytes)
    if counted != record.totals:
        raise ValueError(f"its totals are {record.totals}, its tensors have {counted}")


def _check_names(record: Recorded) -> None:
    # JSON can escape half of a pair, which no digest and no record of a bundle can hold.
    if not record.id.isascii() and any("\ud800" <= char <= "\udfff" for char in record.id):
        raise ValueError(f'its id "{shown(record.id, 80)}" is not a text')
    files = [held.file for held in record.files]
    if len(set(files)) != len(files):
        raise ValueError("a file is listed twice")
    # A recorded file's names must not lead anywhere, whatever is done with them later.
    wrong = [file for file in files if file is not None and not is_shard_name(file)]
    wrong += [file for file in record.side_files or () if not _is_side_name(file)]
    if wrong:
        raise ValueError(f'"{shown(wrong[0], 80)}" is not the plain name of such a file')


def _is_side_name(file: str) -> bool:
    folder, sign, name = file.rpartition("/")
    return is_plain_name(name) and (not sign or folder in SUBFOLDERS)


def _file_tensors(held: RecordedFile, limit: int, letters: int) -> dict[str, TensorInfo]:
    """The tensors of a file: at most so many, and so many letters of their names together."""
    found: dict[str, TensorInfo] = {}
    named = 0
    for group in held.tensors:
        if group.dtype not in DTYPE_BITS:
            raise ValueError(f'the dtype "{group.dtype[:40]}" is not known')
        shape = tuple(group.shape)
        nbytes = tensor_nbytes(group.dtype, shape)
        for pattern in group.names:
            names = expand_pattern(pattern, limit=limit - named, letters=letters)
            named += len(names)
            letters -= sum(map(len, names))
            dtype = group.dtype
            found |= {name: TensorInfo(name, dtype, shape, nbytes, held.file) for name in names}
    if len(found) != named:
        raise ValueError("two name patterns of a file stand for the same tensor")
    if held.file is None or held.nbytes is None:
        return found
    return placed(held, held.nbytes, found)


def _record_file(file: str | None, nbytes: int | None, held: Sequence[TensorInfo]) -> RecordedFile:
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for tensor in held:
        groups.setdefault((tensor.dtype, tensor.shape), []).append(tensor.name)
    named = {tensor.name: tensor for tensor in held}
    usual = nbytes is None or list(named) == usual_order(named)
    record = RecordedFile(
        file=file,
        nbytes=nbytes,
        tensors=[
            Group(dtype=dtype, shape=list(shape), names=name_patterns(names))
            for (dtype, shape), names in groups.items()
        ],
        order=None if usual else list(named),
    )
    if nbytes is not None and placed(record, nbytes, named) != named:
        raise ValueError(f"the tensors of {file} do not fill it without holes to its end")
    return record


def _lines(record: Recorded) -> Iterator[str]:
    for key, value in record.model_dump(exclude={"files"}).items():
        yield f'"{key}": {json.dumps(value)}'
    files = []
    for held in record.files:
        groups = ",\n   ".join(json.dumps(group.model_dump()) for group in held.tensors)
        head = json.dumps(held.model_dump(exclude={"tensors"}))
        files.append(f'{head[:-1]}, "tensors": [\n   {groups}]}}')
    yield '"files": [' + ",\n  ".join(files) + "]"


def _bad(path: Path, reason: str) -> PolicyError:
    return fail("bad-recorded-headers", file=str(path), reason=reason)
