"""Recorded headers: an Inventory as a small JSON file, so that planning needs no checkpoint.

    write_recorded(inventory)  the text     read_recorded(path)  the inventory again

Names are written as patterns (see name_patterns). Tensors stand grouped by file; a file's
tensors lie by dtype in the order of the groups, then by name, as the safetensors library
writes them, else `order` lists them. A null file says that the shard map is not known.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.inventory import DTYPE_BITS, Inventory, TensorInfo, tensor_nbytes
from policy_dsl.name_patterns import expand_pattern, name_patterns
from policy_dsl.safetensors_header import LENGTH_NBYTES
from policy_dsl.shard_map import is_plain_name, is_shard_name

MAX_NBYTES = 100_000_000
MAX_TENSORS = 1_000_000

Size = Annotated[int, Field(ge=0, lt=1 << 63)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Group(_Record):
    """Tensors of one dtype and shape; `names` are patterns."""

    dtype: str
    shape: Annotated[list[Size], Field(max_length=64)]
    names: list[str]


class RecordedFile(_Record):
    """The tensors of one shard; file and nbytes are null if the shard map is not known."""

    file: str | None
    nbytes: Size | None
    tensors: list[Group]
    order: list[str] | None = None


class Totals(_Record):
    """What all tensors add up to, to check a record that was written or edited by hand."""

    tensors: Size
    nbytes: Size


class Recorded(_Record):
    """The whole document."""

    policyc_headers: Literal[1]
    id: str
    notes: list[str] = []
    config: dict[str, Any]
    side_files: dict[str, Size] | None
    totals: Totals
    files: list[RecordedFile]


def write_recorded(inventory: Inventory) -> str:
    """The inventory as JSON text, one line per group of tensors; its root is left out.

    Raises: ValueError if the tensors of a file leave holes, which no reader lets through.
    """
    by_file: dict[str | None, list[TensorInfo]] = {}
    for tensor in sorted(inventory.tensors.values(), key=attrgetter("start")):
        by_file.setdefault(tensor.file, []).append(tensor)
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
        record = Recorded.model_validate_json(_read_text(path))
        return _inventory(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise _bad(path, f"{where}: {first['msg']}") from error
    except ValueError as error:
        raise _bad(path, str(error)) from error


def _read_text(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            text = file.read(MAX_NBYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _bad(path, f"its compression is broken: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise fail("unreadable-file", path=str(path), reason=reason) from error
    if len(text) > MAX_NBYTES:
        raise _bad(path, f"it holds more than {MAX_NBYTES} bytes")
    return bytes(text)


def _inventory(record: Recorded) -> Inventory:
    tensors: dict[str, TensorInfo] = {}
    for held in record.files:
        here = _file_tensors(held, limit=MAX_TENSORS - len(tensors))
        both = tensors.keys() & here.keys()
        if both:
            raise ValueError(f'the tensor "{min(both)}" stands in two files')
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
    counted = Totals(tensors=len(inventory.tensors), nbytes=inventory.nbytes)
    if counted != record.totals:
        raise ValueError(f"its totals are {record.totals}, its tensors have {counted}")
    names = [held.file for held in record.files]
    for file in names:
        if file is not None and not is_shard_name(file):
            raise ValueError(f'"{file[:80]}" is not the plain name of a safetensors file')
    if len(set(names)) != len(names):
        raise ValueError("a file stands twice")
    for file in record.side_files or {}:
        if not is_plain_name(file):
            raise ValueError(f'"{file[:80]}" is not a plain file name')


def _file_tensors(held: RecordedFile, limit: int) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    named = 0
    for group in held.tensors:
        if group.dtype not in DTYPE_BITS:
            raise ValueError(f'the dtype "{group.dtype[:40]}" is not known')
        shape = tuple(group.shape)
        nbytes = tensor_nbytes(group.dtype, shape)
        for pattern in group.names:
            names = expand_pattern(pattern, limit=limit - named)
            named += len(names)
            dtype = group.dtype
            found |= {name: TensorInfo(name, dtype, shape, nbytes, held.file) for name in names}
    if len(found) != named:
        raise ValueError("two name patterns of a file stand for the same tensor")
    if held.file is None or held.nbytes is None:
        return found
    return _placed(held, held.nbytes, found)


def _placed(
    held: RecordedFile, file_nbytes: int, found: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    order = _usual_order(found) if held.order is None else held.order
    if len(order) != len(found) or found.keys() != set(order):
        raise ValueError(f"the order of {held.file} does not name each of its tensors once")
    # Tensors fill a file to its end, so the end says where they begin.
    place = file_nbytes - sum(tensor.nbytes for tensor in found.values())
    if place < LENGTH_NBYTES + len("{}"):
        raise ValueError(f"{held.file} has {file_nbytes} bytes, too few for its tensors")
    placed = {}
    for name in order:
        stop = place + found[name].nbytes
        placed[name] = found[name]._replace(start=place, stop=stop)
        place = stop
    return placed


def _usual_order(found: Mapping[str, TensorInfo]) -> list[str]:
    """Names by dtype in order of first sight, then by name in order of bytes."""
    rank: dict[str, int] = {}
    for tensor in found.values():
        rank.setdefault(tensor.dtype, len(rank))
    return sorted(found, key=lambda name: (rank[found[name].dtype], name.encode()))


def _record_file(
    file: str | None, nbytes: int | None, held: Sequence[TensorInfo]
) -> RecordedFile:
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for tensor in held:
        groups.setdefault((tensor.dtype, tensor.shape), []).append(tensor.name)
    named = {tensor.name: tensor for tensor in held}
    usual = nbytes is None or list(named) == _usual_order(named)
    record = RecordedFile(
        file=file,
        nbytes=nbytes,
        tensors=[
            Group(dtype=dtype, shape=list(shape), names=name_patterns(names))
            for (dtype, shape), names in groups.items()
        ],
        order=None if usual else list(named),
    )
    if nbytes is not None and _placed(record, nbytes, named) != named:
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
