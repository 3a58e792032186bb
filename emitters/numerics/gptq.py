"""How GPTQ stores a matrix: codes and zero points in columns of words, scales in float16.

Rows of the matrix are columns of every part: `qweight` [in*bits/32, rows] packs the codes of a
row from top to bottom, `qzeros` [groups, rows*bits/32] the zero points of neighbouring rows,
`scales` is [groups, rows]. Words are int32, the stream of bits that of `bitpack`.
value = scale * (code - zero point).
Source: auto-round 0.16.1, `auto_round_extension/torch/qlinear_torch_zp.py` and, for version 2,
`qlinear_torch.py`; GPTQModel 7.7.0 packs alike.

`gptq_rtn` rounds to nearest as AutoRound does. Symmetric: the zero point is the middle code, and
the sign of the scale is such that the extreme of larger magnitude gets code 0. Asymmetric: both
follow from the extremes and zero. Arithmetic is that of float32 or of the values' type up to the
scale, which is float16 from then on: with it bfloat16 values are promoted to float32.
Source: auto-round 0.16.1 (torch 2.13.0, CPU), `auto_round/data_type/int.py`, functions
registered as `rtn_int_sym` and `int_asym`; 0.12.2 calls the former `int_sym`. Its model-free
flow makes the values float32 first, the others keep their type.
"""

from typing import NamedTuple

import numpy as np

from emitters.numerics import BF16, F16, Array
from emitters.numerics.bitpack import pack, unpack
from emitters.numerics.jit import device, int64, kernel, reads, row_of, several, writes
from emitters.numerics.reach import FLOORS, UNITS, Width, outside, reach_of, slack_of, spread
from emitters.numerics.rounding import clamped, extremes, narrow, nearest_code, rounded, widen
from policy_dsl.formats import Slack

WIDTHS = (2, 3, 4, 8)
# What is added to a zero point to be stored; "gptq_v2" is the second version of the layout.
ZERO_OFFSETS = {"gptq": -1, "gptq_v2": 0}

_BAND = 32  # rows that become columns together: whole cache lines
_ZERO = np.float32(0)
_SMALLEST_SCALE = np.float32(np.float16(1e-5))  # a subnormal
_ROUNDER = np.float32(1.5 * 2.0**23)  # adding it leaves an integer in the low bits


class GptqParts(NamedTuple):
    """What rows become, not yet packed.

    codes: uint8 [rows, in]; zeros: int16 [groups, rows]; scales: float16 [groups, rows].
    """

    codes: Array
    zeros: Array
    scales: Array


@kernel(reads("int32"), int64, writes("int32"))
def _transpose(words: Array, columns: int, turned: Array) -> None:
    rows = words.shape[0] // max(columns, 1)
    for first in range(0, rows, _BAND):
        end = min(first + _BAND, rows)
        for j in range(columns):
            line = words[first * columns + j : end * columns : columns]
            turned[j * rows + first : j * rows + end] = line


@kernel(reads("uint8"), several(int64, 2), reads("int16"), reads("F16"), writes("float32"))
def _decode_gptq(
    codes: Array, layout: tuple[int, int], zeros: Array, scales: Array, values: Array
) -> None:
    columns, size = layout
    rows = codes.shape[0] // max(columns, 1)
    for at in range(scales.shape[0]):
        scale, zero = widen(F16, scales[at]), np.float32(zeros[at])
        start, first = at % rows * columns, at // rows * size
        end = start + min(first + size, columns)
        part, its_codes = values[start + first : end], codes[start + first : end]
        for i in range(part.shape[0]):
            part[i] = rounded(F16, (np.float32(its_codes[i]) - zero) * scale)


def pack_columns(codes: Array, *, bits: int) -> Array:
    """The codes of each row as a column of words: int32 [in*bits/32, rows].

    codes: uint8 [rows, in], each below 2**bits, in % 32 == 0.
    Raises: ValueError for other widths than 2, 3, 4 and 8, or rows that fill no whole words.
    """
    _check_words(codes.shape[1], bits)
    rows = pack(codes, bits).view(np.int32)
    words = np.empty(rows.shape[::-1], np.int32)
    _transpose(rows, rows.shape[1], words)
    return words


def unpack_columns(words: Array, *, bits: int) -> Array:
    """The inverse of `pack_columns`: uint8 [rows, in]."""
    _check_words(words.shape[0] * 32 // max(bits, 1), bits)
    rows = np.empty(words.shape[::-1], np.int32)
    _transpose(words, words.shape[1], rows)
    return unpack(rows.view(np.uint32), bits)


def first_unstorable_zero(zeros: Array, *, bits: int, version: str) -> int:
    """The flat index of the first zero point that readers would not read back, or -1.

    zeros: int16 [groups, rows]; version: one of `ZERO_OFFSETS`. "gptq" has no zero point 0:
    what tools store for it is read as another one. A zero point of 2**bits, to which an
    asymmetric group can come, is cut off by some readers of "gptq", and "gptq_v2" has none.
    """
    lost = np.flatnonzero((zeros < -ZERO_OFFSETS[version]) | (zeros >= 1 << bits))
    return int(lost[0]) if len(lost) else -1


def pack_zeros(zeros: Array, *, bits: int, version: str) -> Array:
    """The zero points of each group, packed along the rows: int32 [groups, rows*bits/32].

    Arguments as in `first_unstorable_zero`, rows % 32 == 0.
    Raises: ValueError as `pack_columns` does, or if a zero point cannot be stored.
    """
    if (at := first_unstorable_zero(zeros, bits=bits, version=version)) >= 0:
        raise ValueError(f"{version} cannot store the zero point {zeros.reshape(-1)[at]}")
    _check_words(zeros.shape[1], bits)
    return pack((zeros + ZERO_OFFSETS[version]).astype(np.uint8), bits).view(np.int32)


def unpack_zeros(qzeros: Array, *, bits: int, version: str) -> Array:
    """The inverse of `pack_zeros`: int16 [groups, rows]."""
    _check_words(qzeros.shape[1] * 32 // max(bits, 1), bits)
    words = row_of(qzeros, "int32", "words").view(np.uint32)
    stored = unpack(words.reshape(qzeros.shape), bits)
    return stored.astype(np.int16) - np.int16(ZERO_OFFSETS[version])


def gptq_decode(parts: GptqParts, *, group_size: int) -> Array:
    """The float32 values [rows, in] that a reader on a CPU sees: products rounded to float16.

    group_size: -1 for one group a row. The last group of a row may be short.
    Raises: ValueError if the parts' shapes disagree.
    Source: auto-round 0.16.1, the weights that `QuantLinear.forward` multiplies with.
    """
    codes, zeros, scales = parts
    rows, columns = codes.shape
    size = columns if group_size == -1 else group_size
    if size < 1 or zeros.shape != scales.shape or scales.shape != (-(-columns // size), rows):
        shapes = f"{codes.shape}, {zeros.shape} and {scales.shape}"
        raise ValueError(f"shapes {shapes} are not one matrix in groups of {group_size}")
    values = np.empty((rows, columns), np.float32)
    _decode_gptq(codes, (columns, size), zeros, scales, values)
    return values


def group_order(g_idx: Array) -> Array:
    """The columns of a matrix group by group, those of a group in their own order.

    g_idx: int32 [in], the number of each column's group.
    """
    return np.argsort(g_idx, kind="stable")


def is_grouping(g_idx: Array, group_size: int) -> bool:
    """Whether columns are numbered by groups of this size, the last of which may be short."""
    return np.array_equal(g_idx[group_order(g_idx)], np.arange(len(g_idx)) // group_size)


def new_parts(shape: tuple[int, int], bits: int, group_size: int) -> GptqParts:
    """Uninitialized parts of a matrix [rows, in] in groups of -1 (whole rows) or group_size.

    Raises: ValueError for other widths than 2, 3, 4 and 8, or unless groups divide rows and
    fill whole words.
    """
    rows, columns = shape
    _check_words(columns, bits)
    size = columns if group_size == -1 else group_size
    if size <= 0 or size % 32 or columns % size:
        raise ValueError(f"groups of {group_size} do not divide rows of {columns} values")
    zeros = np.empty((columns // size, rows), np.int16)
    return GptqParts(np.empty(shape, np.uint8), zeros, np.empty(zeros.shape, np.float16))


def _check_words(columns: int, bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"GPTQ codes have 2, 3, 4 or 8 bits, not {bits}")
    if columns % 32:
        raise ValueError(f"{columns} codes do not fill whole words")


@device
def _quotient(kind: int, value: np.float32, scale: np.float32) -> np.float32:
    """value / scale; only float16 values keep their type beside a float16 scale."""
    quotient = value / scale
    return rounded(F16, quotient) if kind == F16 else quotient


@device
def _choose_line(
    kind: int, bits: int, symmetric: bool, values: Array
) -> tuple[np.float32, np.float32]:
    """Scale and zero point of a group; values: float32 [n]; kind: of the arithmetic."""
    half, top = np.float32(1 << (bits - 1)), np.float32((1 << bits) - 1)
    low, high = extremes(values, (_ZERO, _ZERO))
    # Equal extremes give a negative scale, a group of zeros a positive one.
    span = (-low if high < -low else -high) if symmetric else rounded(kind, high - low)
    scale = rounded(F16, rounded(kind, span / (half if symmetric else top)))
    floor = -_SMALLEST_SCALE if scale < _ZERO else _SMALLEST_SCALE
    scale = floor if abs(scale) < _SMALLEST_SCALE else scale
    return scale, half if symmetric else np.rint(_quotient(kind, -low, scale))


@kernel(reads("source"), several(int64, 2), writes("uint8"), writes("int16"), writes("F16"))
def _encode_rtn(  # noqa: PLR0913, PLR0917 - kernels take arrays one by one
    values: Array,
    layout: tuple[int, int],
    codes: Array,
    zeros: Array,
    scales: Array,
    source: int,
    kind: int,
    symmetric: bool,
) -> None:
    columns, bits = layout
    rows, top = values.shape[0] // columns, np.float32((1 << bits) - 1)
    n_groups = scales.shape[0] // max(rows, 1)
    size = columns // max(n_groups, 1)
    group = np.empty(size, np.float32)
    for k in range(scales.shape[0]):
        part, own = values[k * size : (k + 1) * size], codes[k * size : (k + 1) * size]
        for i in range(size):
            group[i] = widen(source, part[i])
        scale, zero = _choose_line(kind, bits, symmetric, group)
        for i in range(size):
            # Rounded before the zero point is added: ties go to even steps, not to even codes.
            code = (_quotient(kind, group[i], scale) + _ROUNDER) - _ROUNDER + zero
            # What is packed are the decoded weights, and bfloat16 may lose half a step.
            again = rounded(BF16, (clamped(code, top) - zero) * scale) / scale + zero
            own[i] = nearest_code(again if kind == BF16 and not symmetric else code, top)
        at = k % n_groups * rows + k // n_groups
        scales[at], zeros[at] = narrow(F16, scale), np.int16(zero)


def gptq_rtn(  # noqa: PLR0913 - one call is one block of rows under one set of rules
    values: Array,
    dtype: str,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    arithmetic: str = "F32",
) -> GptqParts:
    """Codes, zero points and scales of every group along the last axis.

    values: [rows, in] of value type `dtype` (BF16 as uint16), finite; bits: 2, 3, 4 or 8;
    group_size: a multiple of 32 that divides `in`, or -1 for one group a row; arithmetic: "F32"
    or `dtype`. Scales from 65520 on are infinite. Asymmetric zero points go from 0 to 2**bits,
    which is more than can be stored: see `first_unstorable_zero`.
    Raises: ValueError for other widths, value types or arithmetics, or for groups that do not
    divide rows.
    Source: auto-round 0.16.1 and 0.12.2, plain rounding to nearest.
    """
    if arithmetic not in ("F32", dtype):
        raise ValueError(f"arithmetic {arithmetic!r} is neither F32 nor {dtype}")
    rows, columns = values.shape
    parts = new_parts((rows, columns), bits, group_size)
    way = {"source": dtype, "kind": arithmetic, "symmetric": symmetric}
    _encode_rtn(values, (columns, bits), *parts, **way)
    return parts


def gptq_beyond(
    values: Array, parts: GptqParts, width: Width, slack: Slack, *, symmetric: bool
) -> Array:
    """Values [rows, in] that are too far from GPTQ codes.

    Symmetric scales may be searched for: AutoRound's go down to 1 / 1.75 of the one that
    reaches the largest value.
    """
    bits, size = width
    codes = parts.codes.astype(np.float32)
    decoded = gptq_decode(parts, group_size=size)
    step = spread(np.abs(parts.scales.astype(np.float32)).T, values)
    zeros = spread(parts.zeros.astype(np.float32).T, values)
    unit, floor = np.float32(UNITS["F16"]), np.float32(FLOORS["F16"])
    # The stored scale and the product; scale, quotient and product in the tool's arithmetic.
    each = step * np.float32(2 * unit + 3 * slack.arithmetic) + floor
    added = (np.abs(codes - zeros) + 1) * each + floor + slack_of(values, slack)
    end = 1 + 0.75 * 2 ** (bits - 1) if symmetric else 1.0
    return outside(values, decoded, step * reach_of(codes, bits, (end, end)) + added)
