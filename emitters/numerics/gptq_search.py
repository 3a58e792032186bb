"""Symmetric codes with scales that AutoRound searches for, its "optimized RTN".

Each group tries about 200 scales around that of rounding to nearest, and takes the first one
of least squared error, weighted by column if there is an importance matrix. All arithmetic is
that of the values' type, except for the sum of the squares.
Source: auto-round 0.16.1 (torch 2.13.0, CPU), `auto_round/data_type/int.py`, the function
registered as `opt_rtn_int_sym`; 0.12.2, the one registered as `rtn_int_sym`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from emitters.numerics.gptq_layout import GptqParts, new_band, new_parts, pack_row
from emitters.numerics.gptq_weights import (
    SearchWeights,
    check_grid,
    even_weights,
    weigh_by_magnitude,
)
from emitters.numerics.jit import device, factory, int64, kernel, reads, writes
from emitters.numerics.scalars import bits_of, float_of, narrow, rounded, widen
from emitters.numerics.torch_sums import FOLDED, LANES, LEVELS, RUN, carry, sum_float32
from emitters.numerics.value_types import BF16, F16, Array, raw_bits, value_type

_Target = tuple[int, np.float32]  # value type, 2**(bits - 1)
_Pair = tuple[np.float32, np.float32]  # inverse scale and scale, or value and weight
_Span = tuple[int, int]  # the candidates from the first to before the last

# Rows of the table of candidates; from the last one on are the levels of `torch_sums`.
_INVERSES, _SCALES, _TOTALS, _PARTS, _SUMS = 0, 1, 2, 3, 4
_BLOCK = 16  # candidates that are given up together

_ZERO, _ONE = np.float32(0), np.float32(1)
_SMALLEST_SCALE = np.float32(1e-5)
_LARGEST_PEAK = np.float32(2.0**64)  # far beyond what float16 scales can hold
_ROUNDER = np.float32(1.5 * 2.0**23)  # adding it leaves an integer in the low bits
_EXPONENT = np.uint32(0x7F800000)
_TIMES_TWO_TO_16 = np.uint32(0x08400000)  # on exponent bits: times 1.5 * 2**16


@device
def _own(kind: int, value: np.float32) -> np.float32:
    """The value rounded to the values' type.

    bfloat16 from 2**-126 to 2**111 in magnitude: smaller errors square to zero, and larger
    values do not come here.
    """
    if kind == BF16:
        # What is that much larger swallows all but 8 bits, ties to even.
        rounder = float_of(np.uint32((bits_of(value) & _EXPONENT) + _TIMES_TWO_TO_16))
        return (value + rounder) - rounder
    return rounded(F16, value) if kind == F16 else value


@device
def _reciprocal(kind: int, value: np.float32) -> np.float32:
    """1 / value, or zero for what is next to nothing."""
    smallest = rounded(kind, np.float32(1e-5 if kind == F16 else 1e-30))
    return _own(kind, _ONE / value) if abs(value) >= smallest else _ZERO


@device
def _clamped(half: np.float32, step: np.float32) -> np.float32:
    """The step within -half .. half - 1; NaN stays."""
    step = -half if step < -half else step
    return half - _ONE if step > half - _ONE else step


@device
def _error(target: _Target, item: _Pair, pair: _Pair) -> np.float32:
    """The weighted squared error of an item under a candidate."""
    kind, half = target
    step = (_clamped(half, _own(kind, pair[0] * item[0])) + _ROUNDER) - _ROUNDER
    error = _own(kind, _own(kind, pair[1] * step) - item[0])
    return error * error * item[1]


@device
def _loss(target: _Target, group: Array, pair: _Pair, scratch: Array) -> np.float32:
    """The sum of a group's errors; scratch: float32 [4 + size / 32, 32]."""
    errors = scratch[LEVELS:].reshape(-1)
    for i in range(errors.shape[0]):
        errors[i] = _error(target, (group[0, i], group[1, i]), pair)
    return sum_float32(errors, scratch[:LEVELS])


@device
def _add_one(target: _Target, item: _Pair, table: Array, span: _Span) -> None:
    """Add the error of an item to the sum of each candidate."""
    # Unsigned, as in `hadamard`: LLVM must see that no index is one from the end.
    for k in range(np.uint64(span[0]), np.uint64(span[1])):
        table[_SUMS, k] += _error(target, item, (table[_INVERSES, k], table[_SCALES, k]))


@device
def _add_four(target: _Target, items: tuple[_Pair, ...], table: Array, span: _Span) -> None:
    """Add the errors of four items, added up before, to the part of each candidate."""
    for k in range(np.uint64(span[0]), np.uint64(span[1])):
        pair = table[_INVERSES, k], table[_SCALES, k]
        total = _error(target, items[0], pair)
        total += _error(target, items[1], pair)
        total += _error(target, items[2], pair)
        table[_PARTS, k] += total + _error(target, items[3], pair)


@device
def _four(group: Array, start: int, step: int) -> tuple[_Pair, ...]:
    """Four items of a group, a step apart."""
    a, b, c, d = start, start + step, start + 2 * step, start + 3 * step
    low = (group[0, a], group[1, a]), (group[0, b], group[1, b])
    high = (group[0, c], group[1, c]), (group[0, d], group[1, d])
    return low[0], low[1], high[0], high[1]


@device
def _move(table: Array, row: int, sums: int, span: _Span) -> None:
    """Add a row of the table to another one, and clear it."""
    for k in range(np.uint64(span[0]), np.uint64(span[1])):
        table[sums, k] += table[row, k]
        table[row, k] = _ZERO


@device
def _add_lane(target: _Target, group: Array, lane: int, table: Array, span: _Span) -> None:
    """Add the errors of every 32nd item to the part of each candidate."""
    added = 0
    for i in range(lane, group.shape[1], LANES):
        _add_one(target, (group[0, i], group[1, i]), table, span)
        added += 1
        if added % RUN == 0:
            carry(table[_SUMS:], added)
    if added >= RUN:
        for level in range(_SUMS + 1, _SUMS + LEVELS):
            _move(table, level, _SUMS, span)
    _move(table, _SUMS, _PARTS, span)


@device
def _add_folded(target: _Target, group: Array, lane: int, table: Array, span: _Span) -> None:
    """Add the errors of every 8th item to the total of each candidate."""
    length = group.shape[1] // LANES
    if length == 1:
        # Each lane has one item, and the four lanes that are folded are four items.
        _add_four(target, _four(group, lane, FOLDED), table, span)
    elif length == 4:
        for start in range(lane, LANES, FOLDED):
            _add_four(target, _four(group, start, LANES), table, span)
    else:
        for start in range(lane, LANES, FOLDED):
            _add_lane(target, group, start, table, span)
    _move(table, _PARTS, _TOTALS, span)


@device
def _all_above(table: Array, first: int, limit: np.float32) -> bool:
    """Whether all totals of a block are above the limit; NaN is not."""
    n = 0
    for k in range(first, first + _BLOCK):
        n += table[_TOTALS, k] > limit
    return n == _BLOCK


@device
def _still_open(table: Array, span: _Span, limit: np.float32) -> _Span:
    """The span without the blocks at its ends that have lost: totals only grow."""
    first, last = span
    while first < last and _all_above(table, first, limit):
        first += _BLOCK
    while first < last and _all_above(table, last - _BLOCK, limit):
        last -= _BLOCK
    return first, last


@device
def _best_scale(target: _Target, group: Array, table: Array, scratch: Array) -> np.float32:
    """The scale of least loss, the first of them if there are more.

    group: float32 [2, size], values and weights; table: float32 [8, 1 + n], n % 16 == 0, with
    inverses and scales. Its column 0 is tried first, and wins if its loss is NaN.
    """
    best = table[_SCALES, 0]
    limit = _loss(target, group, (table[_INVERSES, 0], best), scratch)
    if not limit <= np.inf:
        return np.float32(best)
    table[_TOTALS:] = _ZERO
    span = 1, table.shape[1]
    for lane in range(FOLDED):
        _add_folded(target, group, lane, table, span)
        span = _still_open(table, span, limit)
    for k in range(span[0], span[1]):
        if table[_TOTALS, k] < limit:
            limit, best = table[_TOTALS, k], table[_SCALES, k]
    return np.float32(best)


@device
def _search(
    target: _Target, group: Array, multipliers: Array, table: Array, scratch: Array
) -> np.float32:
    """The scale of a group, in the values' type; multipliers: float32 [1 + n]."""
    kind, peak = target[0], _ZERO
    for i in range(group.shape[1]):
        peak = group[0, i] if abs(group[0, i]) > abs(peak) else peak
    if abs(peak) > _LARGEST_PEAK:
        return np.float32(np.inf)
    base, floor = _reciprocal(kind, peak), rounded(kind, _SMALLEST_SCALE)
    for k in range(multipliers.shape[0]):
        table[_INVERSES, k] = _own(kind, multipliers[k] * base)
        table[_SCALES, k] = _reciprocal(kind, table[_INVERSES, k])
    scale = _best_scale(target, group, table, scratch)
    return np.float32(min(scale, -floor) if scale < _ZERO else max(scale, floor))


@device
def _write_codes(target: _Target, values: Array, scale: np.float32, codes: Array) -> None:
    """codes = the nearest code of each value; values: float32 [n], codes: uint8 [n]."""
    kind, half = target
    for i in range(values.shape[0]):
        step = (_clamped(half, _own(kind, values[i] / scale)) + _ROUNDER) - _ROUNDER
        if kind == BF16:
            # What is packed are the decoded weights: at 8 bits their rounding can move a code.
            again = _own(kind, _own(kind, step * scale) / scale)
            step = _clamped(half, _own(kind, again + half) - half)
        # The middle code is even: ties stay what they are.
        codes[i] = np.uint8(bits_of(step + (_ROUNDER + half)))


@factory
def _encoder(kind: int, raw: str) -> Callable[..., None]:
    """The kernel that encodes rows of one value type."""
    inputs = reads(raw), reads("float32"), reads("float32"), reads("float32")

    @kernel(*inputs, int64, writes("int32"), writes("uint16"))
    def encode_search(  # noqa: PLR0913, PLR0917 - kernels take arrays one by one
        values: Array,
        multipliers: Array,
        weights: Array,
        divisors: Array,
        bits: int,
        words: Array,
        scales: Array,
    ) -> None:
        columns, n_groups = weights.shape[0], divisors.shape[0]
        rows, size = values.shape[0] // columns, columns // n_groups
        target, codes = (kind, np.float32(1 << (bits - 1))), np.empty(columns, np.uint8)
        table = np.empty((_SUMS + LEVELS, multipliers.shape[0]), np.float32)
        scratch = np.empty((LEVELS + size // LANES, LANES), np.float32)
        group, band = np.empty((2, size), np.float32), new_band(columns // 32 * bits)
        for row in range(rows):
            for k in range(n_groups):
                part = values[row * columns + k * size :][:size]
                for i in range(size):
                    group[0, i], group[1, i] = widen(kind, part[i]), weights[k * size + i]
                if divisors[k] == divisors[k]:
                    weigh_by_magnitude(kind, bits, divisors[k], group[0], group[1])
                scale = _search(target, group, multipliers, table, scratch)
                _write_codes(target, group[0], scale, codes[k * size : (k + 1) * size])
                scales[k * rows + row] = narrow(F16, scale)
            pack_row(codes, bits, (row, rows), band, words)

    return encode_search


@cache
def _multipliers(bits: int, grid: str) -> Array:
    """What the reciprocal of a group's peak is multiplied with: float32 [1 + n], n % 16 == 0.

    The first is that of rounding to nearest. At the end one is repeated, and never wins.
    """
    half = 2 ** (bits - 1)
    reach, step = 90, 0.01
    if grid == "0.16.1" and bits > 2:
        span = half * 0.75
        step = span / 200 * 2
        reach = int(span / step)
    others = [step * k - half for k in range(-reach, reach + 1) if k != 0]
    others += others[-1:] * (-len(others) % _BLOCK)
    return np.array([-half, *others], np.float32)


def gptq_search(  # noqa: PLR0913 - one call is one block of rows under one set of rules
    values: Array,
    dtype: str,
    *,
    bits: int,
    group_size: int,
    weights: SearchWeights | None = None,
    grid: str = "0.16.1",
) -> GptqParts:
    """Codes, zero points and scales of every group along the last axis, all symmetric.

    values, bits, group_size: as for `gptq_rtn`; weights: of the columns, from `search_weights`
    with the same options; grid: the version of AutoRound whose scales are tried, "0.16.1" or
    "0.12.2". Scales from 65520 on are infinite.
    Raises: ValueError for other widths, value types or versions, if a group would be split,
    or if the weights are those of another shape.
    Source: auto-round 0.16.1 and 0.12.2, `search_scales` and its callers.
    """
    check_grid(grid)
    kind, _, raw = value_type(dtype)
    columns = values.shape[1]
    parts = new_parts((values.shape[0], columns), bits, group_size)
    n_groups = len(parts.scales)
    chosen = weights or even_weights(columns, columns // n_groups)
    if (len(chosen.columns), len(chosen.divisors)) != (columns, n_groups):
        raise ValueError(f"weights of {len(chosen.columns)} columns for {columns} columns")
    parts.zeros[:] = 1 << (bits - 1)
    inputs = raw_bits(values, dtype), _multipliers(bits, grid), *chosen
    outputs = parts.qweight.reshape(-1), raw_bits(parts.scales, "F16")
    _encoder(kind, raw.__name__)(*inputs, bits, *outputs)
    return parts
