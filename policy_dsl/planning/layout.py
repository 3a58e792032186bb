"""Where every tensor lies: shards of gapless safetensors, known before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from policy_dsl.formats import Shards
from policy_dsl.plan import PlannedTensor

# The safetensors library writes wide dtypes first, so every tensor is aligned to its element.
_FILE_ORDER = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_RANK = {dtype: rank for rank, dtype in enumerate(_FILE_ORDER)}


class Place(NamedTuple):
    """A tensor's file and the byte offset of its first element in it."""

    file: str
    start: int


class Layout(NamedTuple):
    """Places of all tensors by name, and every tensor file's size in bytes."""

    places: dict[str, Place]
    file_nbytes: dict[str, int]


def lay_in_one(tensors: Sequence[PlannedTensor], file: str) -> Layout:
    """Places in a container: no gap in the given order, counted from the first tensor."""
    places: dict[str, Place] = {}
    start = 0
    for tensor in tensors:
        places[tensor.name] = Place(file, start)
        start += tensor.nbytes
    return Layout(places, {file: start})


def lay_out(tensors: Sequence[PlannedTensor], files: Shards) -> Layout:
    """Places for the tensors, filled shard by shard in the given order.

    A shard is closed when the next tensor would carry it past the largest size, in bytes of
    tensors; a larger tensor has a shard of its own. If they are overfull, it is closed after
    the tensor that brings it to that size.
    """
    shards = list(_filled(tensors, files.nbytes, overfull=files.overfull))
    places: dict[str, Place] = {}
    file_nbytes: dict[str, int] = {}
    for number, shard in enumerate(shards, 1):
        name = files.name(number, len(shards))
        start = len(header_bytes(shard, files.metadata))
        for tensor in in_file_order(shard):
            places[tensor.name] = Place(name, start)
            start += tensor.nbytes
        file_nbytes[name] = start
    return Layout(places, file_nbytes)


def _filled(
    tensors: Sequence[PlannedTensor], limit: int, *, overfull: bool
) -> Iterator[list[PlannedTensor]]:
    """The tensors of each shard."""
    shard: list[PlannedTensor] = []
    filled = 0
    for tensor in tensors:
        if shard and (filled >= limit if overfull else filled + tensor.nbytes > limit):
            yield shard
            shard, filled = [], 0
        shard.append(tensor)
        filled += tensor.nbytes
    yield shard


def in_file_order(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """The tensors of one file in the order of their bytes: wide dtypes first, then by name."""
    return sorted(tensors, key=lambda tensor: (_RANK[tensor.dtype], tensor.name))


def header_bytes(tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    """Everything of a safetensors file before its tensors: length and padded JSON header.

    Source: safetensors 0.8, format description in its README; entries in the order that
    `save_file` writes.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for tensor in in_file_order(tensors):
        stop = start + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
