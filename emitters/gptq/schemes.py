"""The schemes of the format: how zero points are stored, and whether groups are numbered.

Source: auto-round 0.16.1 and GPTQModel 7.7.0, packers and readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from policy_dsl.formats import PartShape
from policy_dsl.treatments import WHOLE_ROW, Coded, Plain, Stored

WIDTHS = (4, 8, 3, 2)
GROUP_SIZES = (128, 64, 32, WHOLE_ROW)
RTN = "rtn"
# Method -> the version of AutoRound whose scales it tries.
SEARCHES: Mapping[str, str] = {"opt-rtn": "0.16.1", "opt-rtn-0.12.2": "0.12.2"}
BAND = 32  # rows whose codes and zero points fill whole words


class Storage(NamedTuple):
    """version: of zero points, "gptq" (one less is stored) or "gptq_v2"; g_idx: if there.

    act_order: whether groups are of any columns, as g_idx says, and not of neighbours.
    """

    version: str
    g_idx: bool
    act_order: bool = False


STORAGE: Mapping[str, Storage] = {
    "int": Storage("gptq", g_idx=False),
    "int-gidx": Storage("gptq", g_idx=True),
    "int-v2": Storage("gptq_v2", g_idx=False),
    "int-v2-gidx": Storage("gptq_v2", g_idx=True),
}
# What others write, and is read only.
READ: Mapping[str, Storage] = {
    **STORAGE,
    "int-act-order": Storage("gptq", g_idx=True, act_order=True),
    "int-v2-act-order": Storage("gptq_v2", g_idx=True, act_order=True),
}


def part_shapes(treatment: Stored, shape: tuple[int, ...], dtype: str) -> tuple[PartShape, ...]:
    """The tensors of a module [out, in]: `qweight`, `qzeros`, `scales`, perhaps `g_idx`.

    Codes are packed along `in`, zero points along `out`, both into int32 words; rows of the
    module are columns of the tensors. Plain modules have a `weight`.
    Raises: ValueError if a quantized module is no matrix, or stored in no way of the format.
    """
    if isinstance(treatment, Plain):
        return (PartShape("weight", dtype, shape),)
    if len(shape) != 2:
        raise ValueError(f"{list(shape)} is no matrix")
    storage, bits = READ.get(treatment.scheme), treatment.bits
    if storage is None or bits not in WIDTHS:
        raise ValueError(f"{bits} bits of {treatment.scheme} are none of the format's")
    out, columns = shape
    size = group_length(treatment, columns)
    groups = columns // size
    parts = (
        _by_columns("qweight", "I32", (columns * bits // 32, out)),
        _by_columns("qzeros", "I32", (groups, out * bits // 32)),
        _by_columns("scales", "F16", (groups, out)),
    )
    if not storage.g_idx:
        return parts
    if storage.act_order:
        return (*parts, PartShape("g_idx", "I32", (columns,), whole=True))
    return (*parts, PartShape("g_idx", "I32", (columns,), constant=_g_idx(columns, size)))


def group_length(treatment: Coded, columns: int) -> int:
    """How many values of a row of `columns` share a scale."""
    return columns if treatment.group_size == WHOLE_ROW else treatment.group_size


def _by_columns(part: str, dtype: str, shape: tuple[int, int]) -> PartShape:
    return PartShape(part, dtype, shape, together=BAND, by_columns=True)


# One object for all modules of a shape: a large model has tens of thousands.
@lru_cache(maxsize=64)
def _g_idx(columns: int, size: int) -> bytes:
    """The number of each column's group, as little-endian int32."""
    numbers = range(-(-columns // size))
    return b"".join(group.to_bytes(4, "little") * size for group in numbers)[: 4 * columns]
