"""The place of every tensor: shards of gapless safetensors, known before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from policy_dsl.formats import Shards
from policy_dsl.plan import PlannedTensor

# The safetensors library writes wide dtypes first, so every tensor is aligned to its element.
_FILE_ORDER = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_RANK = {dtype: rank for rank, dtype in enumerate(_FILE_ORDER)}


class Layout(NamedTuple):
    """All tensors in their places, by name, and every tensor file's size in bytes."""

    places: dict[str, PlannedTensor]
    file_nbytes: dict[str, int]


def lay_in_one(tensors: Sequence[PlannedTensor], file: str) -> Layout:
    """Places in a container: no gap in the given order, counted from the first tensor."""
    places: dict[str, PlannedTensor] = {}
    return Layout(places, {file: _put(tensors, file, 0, places)})


def lay_out(tensors: Sequence[PlannedTensor], files: Shards) -> Layout:
    """Places for the tensors, filled shard by shard in the given order.

    A tensor that is larger than a shard has one of its own.
    """
    shards = [in_file_order(shard) for shard in files.fill(tensors, files.nbytes)]
    layout = Layout({}, {})
    for number, shard in enumerate(shards, 1):
        name = files.name(number, len(shards))
        start = len(_header(shard, files.metadata))
        layout.file_nbytes[name] = _put(shard, name, start, layout.places)
    return layout


def _put(
    tensors: Sequence[PlannedTensor], file: str, start: int, places: dict[str, PlannedTensor]
) -> int:
    """Where the file ends in which the tensors follow each other from `start`."""
    for tensor in tensors:
        places[tensor.name] = tensor.placed(file, start)
        start += tensor.nbytes
    return start


def in_file_order(tensors: Sequence[PlannedTensor]) -> list[PlannedTensor]:
    """The tensors of one file in the order of their bytes: wide dtypes first, then by name."""
    return sorted(tensors, key=lambda tensor: (_RANK[tensor.dtype], tensor.name))


def header_bytes(tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    """Everything of a safetensors file before its tensors: length and padded JSON header.

    Source: safetensors 0.8, format description in its README; entries in the order that
    `save_file` writes.
    """
    return _header(in_file_order(tensors), metadata)


def _header(tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    about = json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False)
    entries = [f'"__metadata__":{about}'] if metadata else []
    start = 0
    for tensor in tensors:
        name, stop = _as_json(tensor.name), start + tensor.nbytes
        shape = ",".join(map(str, tensor.shape))
        # As text: a JSON document of a hundred thousand entries takes three times as long.
        entries.append(
            f'{name}:{{"dtype":"{tensor.dtype}","shape":[{shape}],"data_offsets":[{start},{stop}]}}'
        )
        start = stop
    text = f"{{{','.join(entries)}}}".encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
