"""The recorded headers document as types, and where its tensors lie in their files.

A file's tensors lie by dtype in the order of its groups, then by name, as the safetensors
library writes them, unless `order` lists them; and they fill the file to its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    model_validator,
)

from policy_dsl.escaping import shown
from policy_dsl.inventory import TensorInfo
from policy_dsl.sources.safetensors_header import LENGTH_NBYTES

# Offsets and sizes of files are signed 64-bit numbers wherever they are used.
Size = Annotated[int, Field(ge=0, lt=1 << 63)]


T = TypeVar("T")
_MOST_KEYS = 20
_LONGEST_PLACE = 120
# The first defect says enough, and a million of them would fill the memory.
Listed = Annotated[list[T], FailFast()]


def _refuse_sizes(value: Any) -> Any:
    """A mapping of sizes as it is. Raises: ValueError at its first wrong value."""
    for name, size in value.items() if isinstance(value, dict) else ():
        if type(size) is not int or size < 0:
            raise ValueError(f'"{shown(name, 80)}" has no size')
    return value


def _refuse_texts(value: Any) -> Any:
    """A list of texts as it is. Raises: ValueError at its first other value."""
    for name in value if isinstance(value, list) else ():
        if type(name) is not str:
            raise ValueError("it holds something else than names")
    return value


def first_defect(error: ValidationError) -> str:
    """The first thing that is wrong with a document, after its place."""
    # A document of another kind breaks every rule; the first says enough.
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))[:_LONGEST_PLACE] or "the document"
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_many_keys(cls, value: Any) -> Any:
        # Each key that it does not have becomes a defect of its own.
        if isinstance(value, dict) and len(value) > _MOST_KEYS:
            raise ValueError(f"it has {len(value):,} keys")
        return value


class Group(_Record):
    """Tensors of one dtype and shape; `names` are patterns."""

    dtype: str
    shape: Annotated[list[Size], Field(max_length=64), FailFast()]
    names: Listed[str]


class RecordedFile(_Record):
    """The tensors of one shard; file and nbytes are null if the shard map is not known."""

    file: str | None
    nbytes: Size | None
    tensors: Listed[Group]
    order: Annotated[list[str] | None, BeforeValidator(_refuse_texts)] = None


class Totals(_Record):
    """What all tensors add up to, to check a record that was written or edited by hand."""

    tensors: Size
    nbytes: Size


class Recorded(_Record):
    """The whole document."""

    policyc_headers: Literal[1]
    id: str
    notes: Listed[str] = []
    config: dict[str, Any]
    side_files: Annotated[dict[str, Size] | None, BeforeValidator(_refuse_sizes)]
    totals: Totals
    files: Listed[RecordedFile]


def placed(
    held: RecordedFile, file_nbytes: int, found: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The tensors of a file of `file_nbytes` with their places in it, in order of place.

    Raises: ValueError if the order is not of these tensors, or they need a larger file.
    """
    order = usual_order(found) if held.order is None else held.order
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


def usual_order(found: Mapping[str, TensorInfo]) -> list[str]:
    """Names by dtype in order of first sight, then by name in order of bytes."""
    rank: dict[str, int] = {}
    for tensor in found.values():
        rank.setdefault(tensor.dtype, len(rank))
    return sorted(found, key=lambda name: (rank[found[name].dtype], name.encode()))
