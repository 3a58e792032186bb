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

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from emitters.numerics.bitpack import pack_codes, unpack_codes
from emitters.numerics.jit import device, factory, int64, int64_pair, kernel, late, reads, writes
from emitters.numerics.reach import FLOORS, UNITS, Steps, Width, beyond_steps, slack_of, spread
from emitters.numerics.rounding import bits_of, float_at, narrow, order_of, rounded, widen
from emitters.numerics.value_types import BF16, F16, Array, flat, raw_bits, value_type
from policy_dsl.formats import Slack

WIDTHS = (2, 3, 4, 8)
# What is added to a zero point to be stored; "gptq_v2" is the second version of the layout.
ZERO_OFFSETS = {"gptq": -1, "gptq_v2": 0}

_BAND = 32  # rows that go to their columns together: whole cache lines
_ZERO = np.float32(0)
_SMALLEST_SCALE = np.float32(np.float16(1e-5))  # a subnormal
_ROUNDER = np.float32(1.5 * 2.0**23)  # adding it leaves an integer in the low bits
_WHOLE = np.float32(2.0**23)  # the same for what is an integer already

_Rule = tuple[int, int, bool]  # type of the arithmetic, bits, symmetric
_Line = tuple[np.float32, np.float32]  # scale, zero point


class GptqParts(NamedTuple):
    """What rows become, zero points not yet packed.

    qweight: int32 [in*bits/32, rows]; zeros: int16 [groups, rows]; scales: float16 [groups,
    rows].
    """

    qweight: Array
    zeros: Array
    scales: Array


@device
def new_band(n_words: int) -> Array:
    """Room for the words of the rows that go to their columns together: uint32, flat."""
    return np.empty(_BAND * n_words, np.uint32)


@device
def pack_row(codes: Array, bits: int, place: tuple[int, int], band: Array, words: Array) -> None:
    """The packed codes of one row go to its column, together with the others of its band.

    codes: uint8 [in]; place: (row, rows); rows come in order. band: from `new_band`, kept
    between them; words: int32 [in*bits/32, rows], flat.
    """
    row, rows = place
    n_words, first = codes.shape[0] // 32 * bits, row // _BAND * _BAND
    pieces = np.empty(codes.shape[0] // 8, np.uint64)
    pack_codes(codes, pieces, band[(row - first) * n_words :][:n_words], bits)
    if row == rows - 1 or row == first + _BAND - 1:
        for j in range(n_words):
            line = words[j * rows + first : j * rows + row + 1]
            for k in range(line.shape[0]):
                line[k] = np.int32(band[k * n_words + j])


@device
def _unpack_row(words: Array, bits: int, place: tuple[int, int], band: Array, codes: Array) -> None:
    """The inverse of `pack_row`."""
    row, rows = place
    n_words, first = codes.shape[0] // 32 * bits, row // _BAND * _BAND
    if row == first:
        for j in range(n_words):
            line = words[j * rows + first : j * rows + min(first + _BAND, rows)]
            for k in range(line.shape[0]):
                band[k * n_words + j] = np.uint32(line[k])
    unpack_codes(band[(row - first) * n_words :][:n_words], codes, bits)


@late(reads("uint8"), int64, int64, writes("int32"))
def _pack_gptq(codes: Array, columns: int, bits: int, words: Array) -> None:
    rows, band = codes.shape[0] // columns, new_band(columns // 32 * bits)
    for row in range(rows):
        part = codes[row * columns : (row + 1) * columns]
        pack_row(part, bits, (row, rows), band, words)


@late(reads("int32"), int64, int64, writes("uint8"))
def _unpack_gptq(words: Array, columns: int, bits: int, codes: Array) -> None:
    rows, band = codes.shape[0] // columns, new_band(columns // 32 * bits)
    for row in range(rows):
        part = codes[row * columns : (row + 1) * columns]
        _unpack_row(words, bits, (row, rows), band, part)


@late(reads("uint8"), int64_pair, reads("int16"), reads("uint16"), writes("float32"))
def _decode_gptq(
    codes: Array, layout: tuple[int, int], zeros: Array, scales: Array, values: Array
) -> None:
    columns, size = layout
    rows = codes.shape[0] // columns
    for row in range(rows):
        for first in range(0, columns, size):
            at = first // size * rows + row
            scale, zero = widen(F16, scales[at]), np.float32(zeros[at])
            start, end = row * columns + first, row * columns + min(first + size, columns)
            part, its_codes = values[start:end], codes[start:end]
            for i in range(part.shape[0]):
                part[i] = rounded(F16, (np.float32(its_codes[i]) - zero) * scale)


def pack_columns(codes: Array, *, bits: int) -> Array:
    """The codes of each row as a column of words: int32 [in*bits/32, rows].

    codes: uint8 [rows, in], each below 2**bits, in % 32 == 0.
    Raises: ValueError for other widths than 2, 3, 4 and 8, or rows that fill no whole words.
    """
    rows, columns = codes.shape
    _check_words(columns, bits)
    words = np.empty((columns // 32 * bits, rows), np.int32)
    _pack_gptq(flat(codes, np.uint8, "codes"), columns, bits, words.reshape(-1))
    return words


def unpack_columns(words: Array, *, bits: int) -> Array:
    """The inverse of `pack_columns`: uint8 [rows, in]."""
    columns = words.shape[0] * 32 // max(bits, 1)
    _check_words(columns, bits)
    codes = np.empty((words.shape[1], columns), np.uint8)
    _unpack_gptq(flat(words, np.int32, "words"), columns, bits, codes.reshape(-1))
    return codes


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

    zeros, version: as in `first_unstorable_zero`; rows % 32 == 0.
    Raises: ValueError as `pack_columns` does, or if a zero point cannot be stored.
    """
    if (at := first_unstorable_zero(zeros, bits=bits, version=version)) >= 0:
        raise ValueError(f"{version} cannot store the zero point {zeros.reshape(-1)[at]}")
    stored = (zeros + ZERO_OFFSETS[version]).astype(np.uint8)
    return np.ascontiguousarray(pack_columns(stored, bits=bits).T)


def unpack_zeros(qzeros: Array, *, bits: int, version: str) -> Array:
    """The inverse of `pack_zeros`: int16 [groups, rows]."""
    stored = unpack_columns(np.ascontiguousarray(qzeros.T), bits=bits)
    return stored.astype(np.int16) - np.int16(ZERO_OFFSETS[version])


def gptq_decode(parts: GptqParts, *, bits: int, group_size: int) -> Array:
    """The float32 values [rows, in] that a reader on a CPU sees: products rounded to float16.

    parts: as the encoders give them; group_size: -1 for one group a row. The last group of a
    row may be short.
    Raises: ValueError for other widths than 2, 3, 4 and 8, or if the parts' shapes disagree.
    Source: auto-round 0.16.1, the weights that `QuantLinear.forward` multiplies with.
    """
    qweight, zeros, scales = parts
    codes = unpack_columns(qweight, bits=bits)
    rows, columns = codes.shape
    size = columns if group_size == -1 else group_size
    if size < 1 or zeros.shape != scales.shape or scales.shape != (-(-columns // size), rows):
        shapes = f"{qweight.shape}, {zeros.shape} and {scales.shape}"
        raise ValueError(f"shapes {shapes} are not one matrix at {bits} bits, {group_size}")
    values = np.empty((rows, columns), np.float32)
    stored = flat(zeros, np.int16, "zeros"), raw_bits(scales, "F16")
    _decode_gptq(codes.reshape(-1), (columns, size), *stored, values.reshape(-1))
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
    words, groups = np.empty((columns // 32 * bits, rows), np.int32), (columns // size, rows)
    return GptqParts(words, np.empty(groups, np.int16), np.empty(groups, np.float16))


def _check_words(columns: int, bits: int) -> None:
    if bits not in WIDTHS:
        raise ValueError(f"GPTQ codes have 2, 3, 4 or 8 bits, not {bits}")
    if columns % 32:
        raise ValueError(f"{columns} codes do not fill whole words")


@device
def _range(values: Array) -> tuple[np.float32, np.float32]:
    """The extremes of zero and float32 [n]."""
    low, high = np.int32(0), np.int32(0)
    for i in range(values.shape[0]):
        order = order_of(values[i])
        low, high = min(low, order), max(high, order)
    return float_at(low), float_at(high)


@device
def _quotient(kind: int, value: np.float32, scale: np.float32) -> np.float32:
    """value / scale; only float16 values keep their type beside a float16 scale."""
    quotient = value / scale
    return rounded(F16, quotient) if kind == F16 else quotient


@device
def _choose_line(rule: _Rule, values: Array) -> _Line:
    """Scale and zero point of a group; values: float32 [n]."""
    kind, bits, symmetric = rule
    half, top = np.float32(1 << (bits - 1)), np.float32((1 << bits) - 1)
    low, high = _range(values)
    # Equal extremes give a negative scale, a group of zeros a positive one.
    span = (-low if high < -low else -high) if symmetric else rounded(kind, high - low)
    scale = rounded(F16, rounded(kind, span / (half if symmetric else top)))
    floor = -_SMALLEST_SCALE if scale < _ZERO else _SMALLEST_SCALE
    scale = floor if abs(scale) < _SMALLEST_SCALE else scale
    return scale, half if symmetric else np.rint(_quotient(kind, -low, scale))


@device
def _clamped(code: np.float32, top: np.float32) -> np.float32:
    code = code if code > _ZERO else _ZERO
    return code if code < top else top


@device
def _write_codes(rule: _Rule, values: Array, line: _Line, codes: Array) -> None:
    """codes = the nearest code of each value; values: float32 [n], codes: uint8 [n]."""
    kind, bits, symmetric = rule
    scale, zero = line
    top = np.float32((1 << bits) - 1)
    for i in range(values.shape[0]):
        # Rounded before the zero point is added: ties go to even steps, not to even codes.
        step = (_quotient(kind, values[i], scale) + _ROUNDER) - _ROUNDER
        code = _clamped(step + zero, top)
        if kind == BF16 and not symmetric:
            # What is packed are the decoded weights, and bfloat16 may lose half a step.
            decoded = rounded(BF16, (code - zero) * scale)
            code = _clamped((decoded / scale + zero + _ROUNDER) - _ROUNDER, top)
        codes[i] = np.uint8(bits_of(code + _WHOLE))


@factory
def _encoder(dtype: str, kind: int, symmetric: bool) -> Callable[..., None]:
    source, _, raw = value_type(dtype)
    outputs = writes("int32"), writes("int16"), writes("uint16")

    @kernel(reads(raw.__name__), int64_pair, *outputs)
    def encode_rtn(
        values: Array, layout: tuple[int, int], words: Array, zeros: Array, scales: Array
    ) -> None:
        columns, bits = layout
        rows, rule = values.shape[0] // columns, (kind, bits, symmetric)
        n_groups = scales.shape[0] // max(rows, 1)
        size = columns // max(n_groups, 1)
        group, codes = np.empty(size, np.float32), np.empty(columns, np.uint8)
        band = new_band(columns // 32 * bits)
        for row in range(rows):
            for k in range(n_groups):
                part = values[row * columns + k * size :][:size]
                for i in range(size):
                    group[i] = widen(source, part[i])
                line, at = _choose_line(rule, group), k * rows + row
                _write_codes(rule, group, line, codes[k * size : (k + 1) * size])
                scales[at], zeros[at] = narrow(F16, line[0]), np.int16(line[1])
            pack_row(codes, bits, (row, rows), band, words)

    return encode_rtn


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
    raw, kind = raw_bits(values, dtype), value_type(arithmetic).kind
    parts = new_parts((values.shape[0], values.shape[1]), bits, group_size)
    outputs = parts.qweight.reshape(-1), parts.zeros.reshape(-1), raw_bits(parts.scales, "F16")
    _encoder(dtype, kind, symmetric)(raw, (values.shape[1], bits), *outputs)
    return parts


def gptq_beyond(
    values: Array, parts: GptqParts, width: Width, slack: Slack, *, symmetric: bool
) -> Array:
    """Values that are too far from GPTQ codes: float32 [rows, in].

    parts: zero points not packed. Symmetric scales may be searched for: AutoRound's go down to
    1 / 1.75 of the one that reaches the largest value.
    """
    bits, size = width
    codes = unpack_columns(parts.qweight, bits=bits).astype(np.float32)
    decoded = gptq_decode(parts, bits=bits, group_size=size)
    step = np.abs(parts.scales.astype(np.float32)).T
    zeros = spread(parts.zeros.astype(np.float32).T, values.shape)
    unit, floor = np.float32(UNITS["F16"]), np.float32(FLOORS["F16"])
    # The stored scale and the product; scale, quotient and product in the tool's arithmetic.
    each = spread(step, values.shape) * np.float32(2 * unit + 3 * slack.arithmetic) + floor
    added = (np.abs(codes - zeros) + 1) * each + floor + slack_of(values, slack)
    end = 1 + 0.75 * 2 ** (bits - 1) if symmetric else 1.0
    grid = Steps(codes, step, (1 << bits) - 1)
    return beyond_steps(values, decoded, grid, ends=(end, end), added=added)
