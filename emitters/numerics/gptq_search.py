"""Symmetric codes with scales that AutoRound searches for, its "optimized RTN".

Each group tries about 200 scales around that of rounding to nearest, and takes the first one
of least squared error, weighted by column if there is an importance matrix. Arithmetic is that
of the values' type, but squares are weighted and added up as float32, in the order of torch.
Inner loops run over the candidates, which share each item of the group; candidates whose sums
have passed the best of what was tried first are given up.
Source: auto-round 0.16.1 (torch 2.13.0, CPU), `auto_round/data_type/int.py`, the function
registered as `opt_rtn_int_sym`; 0.12.2, the one registered as `rtn_int_sym`.
"""

from functools import cache

import numpy as np

from emitters.numerics import BF16, F16, Array
from emitters.numerics.column_weights import (
    FOLDED,
    LANES,
    LEVELS,
    RUN,
    SearchWeights,
    carry,
    check_grid,
    even_weights,
    sum_float32,
    weigh_by_magnitude,
)
from emitters.numerics.gptq import GptqParts, new_parts
from emitters.numerics.jit import device, int64, kernel, reads, writes
from emitters.numerics.rounding import bits_of, float_of, narrow, rounded, widen

_Target = tuple[int, np.float32]  # value type, 2**(bits - 1)
_Pair = tuple[np.float32, np.float32]  # inverse scale and scale, or value and weight
_Span = tuple[int, int]  # the candidates from the first to before the last

_N_CANDIDATES = 208  # beside that of rounding to nearest; all grids are filled up to it
_ROUNDER = np.float32(1.5 * 2.0**23)  # adding it leaves an integer in the low bits

# Where rows of the table begin; behind the sums of four lanes are those of higher levels.
# Unsigned: see `jit`.
_INVERSES, _SCALES, _TOTALS, _FIRST, _SECOND, _THIRD, _FOURTH = (
    np.uint64(row * _N_CANDIDATES) for row in range(7)
)
_BLOCK = 16  # candidates that are given up together
_ZERO, _ONE = np.float32(0), np.float32(1)
_EXPONENT = np.uint32(0x7F800000)
_TIMES_TWO_TO_16 = np.uint32(0x08400000)  # on exponent bits: times 1.5 * 2**16
_TIMES_TWO_TO_13 = np.uint32(0x06C00000)
_HALF_NORMAL = np.uint32(0x38800000)  # 2**-14
_HALF_OVERFLOW = np.float32(65520)
_SMALLEST_SCALE = np.float32(1e-5)
_LARGEST_PEAK = np.float32(2.0**64)  # far beyond what float16 scales can hold
_BELOW_TWO = np.float32(1.95)  # no rounding takes it to 2


@device
def _own(kind: int, value: np.float32) -> np.float32:
    """The value rounded to the values' type.

    bfloat16 from 2**-126 to 2**111 in magnitude: smaller errors square to zero, and larger
    values do not come here.
    """
    # What is so much larger swallows all but the type's bits, ties to even.
    exponent = np.uint32(bits_of(value) & _EXPONENT)
    if kind == BF16:
        rounder = float_of(np.uint32(exponent + _TIMES_TWO_TO_16))
        return (value + rounder) - rounder
    if kind == F16:
        rounder = float_of(np.uint32(max(exponent, _HALF_NORMAL) + _TIMES_TWO_TO_13))
        infinite = abs(value) >= _HALF_OVERFLOW
        return value * np.float32(np.inf) if infinite else (value + rounder) - rounder
    return value


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
def _error(target: _Target, item: _Pair, pair: _Pair, near: bool) -> np.float32:
    """The weighted squared error of an item under a candidate; near: see `_first_near`."""
    kind, half = target
    step = (_clamped(half, _own(kind, pair[0] * item[0])) + _ROUNDER) - _ROUNDER
    error = _own(kind, pair[1] * step) - item[0]
    error = error if near else _own(kind, error)
    return error * error * item[1]


@device
def _add_errors(
    target: _Target, items: tuple[_Pair, ...], table: Array, span: _Span, near: bool
) -> None:
    """Add the errors of four items, one of each lane, to the sums of each candidate."""
    for k in range(np.uint64(span[0]), np.uint64(span[1])):
        pair = table[_INVERSES + k], table[_SCALES + k]
        table[_FIRST + k] += _error(target, items[0], pair, near)
        table[_SECOND + k] += _error(target, items[1], pair, near)
        table[_THIRD + k] += _error(target, items[2], pair, near)
        table[_FOURTH + k] += _error(target, items[3], pair, near)


@device
def _add_folded(
    target: _Target, group: Array, lane: int, table: Array, spans: tuple[_Span, _Span]
) -> None:
    """Add the errors of every 8th item to each candidate's total; spans: not near, near."""
    sums, added = table[_FIRST:].reshape(LEVELS, 4 * _N_CANDIDATES), 0
    values, weights = group[0], group[1]
    for a in range(lane, group.shape[1], LANES):
        b, c, d = a + FOLDED, a + 2 * FOLDED, a + 3 * FOLDED
        low = (values[a], weights[a]), (values[b], weights[b])
        high = (values[c], weights[c]), (values[d], weights[d])
        items = low[0], low[1], high[0], high[1]
        _add_errors(target, items, table, spans[0], False)
        _add_errors(target, items, table, spans[1], True)
        added += 1
        if added % RUN == 0:
            carry(sums, added)
    if added >= RUN:
        for level in range(1, LEVELS):
            for k in range(sums.shape[1]):
                sums[0, k] += sums[level, k]
                sums[level, k] = _ZERO
    for k in range(np.uint64(spans[0][0]), np.uint64(spans[1][1])):
        total = table[_FIRST + k] + table[_SECOND + k]
        table[_TOTALS + k] += (total + table[_THIRD + k]) + table[_FOURTH + k]
        table[_FIRST + k], table[_SECOND + k] = _ZERO, _ZERO
        table[_THIRD + k], table[_FOURTH + k] = _ZERO, _ZERO


@device
def _all_above(table: Array, first: int, limit: np.float32) -> bool:
    """Whether all totals of a block are above the limit; NaN is not."""
    n = 0
    for k in range(np.uint64(first), np.uint64(first + _BLOCK)):
        n += table[_TOTALS + k] > limit
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
def _first_near(target: _Target, group: Array, table: Array) -> int:
    """The first candidate from which on differences of bfloat16 values need no rounding.

    They are exact where a decoded value is within a factor of 2 of the value or zero. Only
    values whose sign is not the peak's may be cut off to less than half of themselves.
    """
    kind, half = target
    if kind != BF16:
        return _N_CANDIDATES
    low, high = _ZERO, _ZERO
    for i in range(group.shape[1]):
        low, high = min(low, group[0, i]), max(high, group[0, i])
    other, limit = min(-low, high), _BELOW_TWO * (half - _ONE)
    first = 0
    while first < _N_CANDIDATES and abs(table[_INVERSES + np.uint64(first)]) * other > limit:
        first += _BLOCK
    return first


@device
def _best_scale(
    target: _Target, group: Array, multipliers: Array, table: Array, errors: Array
) -> np.float32:
    """The scale of least loss, the first of equals. If the loss of the first is NaN, it wins.

    group: float32 [2, size], values and weights; multipliers: float32 [1 + _N_CANDIDATES], what
    the reciprocal of the group's peak is multiplied with, in the order of preference; table:
    float32 [19 * _N_CANDIDATES], zero where sums are; errors: float32 [size + 128], scratch.
    """
    kind, peak, size = target[0], _ZERO, group.shape[1]
    for i in range(size):
        peak = group[0, i] if abs(group[0, i]) > abs(peak) else peak
    if abs(peak) > _LARGEST_PEAK:
        return np.float32(np.inf)
    base = _reciprocal(kind, peak)
    inverse = _own(kind, multipliers[0] * base)
    best = _reciprocal(kind, inverse)
    for i in range(size):
        errors[i] = _error(target, (group[0, i], group[1, i]), (inverse, best), False)
    limit = sum_float32(errors[:size], errors[size:].reshape(LEVELS, LANES))
    others = multipliers[1:]
    for k in range(np.uint64(_N_CANDIDATES)):
        table[_INVERSES + k] = _own(kind, others[k] * base)
        table[_SCALES + k] = _reciprocal(kind, table[_INVERSES + k])
        table[_TOTALS + k] = _ZERO
    first, last, near = 0, _N_CANDIDATES, _first_near(target, group, table)
    for lane in range(FOLDED):
        near = min(max(near, first), last)
        _add_folded(target, group, lane, table, ((first, near), (near, last)))
        first, last = _still_open(table, (first, last), limit)
    for k in range(np.uint64(first), np.uint64(last)):
        if table[_TOTALS + k] < limit:
            limit, best = table[_TOTALS + k], table[_SCALES + k]
    floor = rounded(kind, _SMALLEST_SCALE)
    return np.float32(min(best, -floor) if best < _ZERO else max(best, floor))


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


_COLUMNS = reads("float32"), reads("float32"), reads("float32")


@kernel(reads("kind"), *_COLUMNS, int64, writes("uint8"), writes("F16"))
def _encode_search(  # noqa: PLR0913, PLR0917 - kernels take arrays one by one
    values: Array,
    multipliers: Array,
    weights: Array,
    divisors: Array,
    bits: int,
    codes: Array,
    scales: Array,
    kind: int,
) -> None:
    columns, n_groups = weights.shape[0], divisors.shape[0]
    rows, size = values.shape[0] // columns, columns // n_groups
    target = kind, np.float32(1 << (bits - 1))
    group, errors = np.empty((2, size), np.float32), np.empty(size + LEVELS * LANES, np.float32)
    table = np.zeros((3 + 4 * LEVELS) * _N_CANDIDATES, np.float32)
    for at in range(rows * n_groups):
        row, k = at // n_groups, at % n_groups
        part = values[at * size : (at + 1) * size]
        for i in range(size):
            group[0, i], group[1, i] = widen(kind, part[i]), weights[k * size + i]
        if not np.isnan(divisors[k]):
            weigh_by_magnitude(kind, bits, divisors[k], group[0], group[1])
        scale = _best_scale(target, group, multipliers, table, errors)
        _write_codes(target, group[0], scale, codes[at * size : (at + 1) * size])
        scales[k * rows + row] = narrow(F16, scale)


@cache
def _multipliers(bits: int, grid: str) -> Array:
    """What the reciprocal of a group's peak is multiplied with: float32 [1 + _N_CANDIDATES]."""
    half = 2 ** (bits - 1)
    reach, step = 90, 0.01
    if grid == "0.16.1" and bits > 2:
        span = half * 0.75
        step = span / 200 * 2
        reach = int(span / step)
    others = [step * k - half for k in range(-reach, reach + 1) if k != 0]
    others += others[-1:] * (_N_CANDIDATES - len(others))
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
    rows, columns = values.shape
    parts = new_parts((rows, columns), bits, group_size)
    n_groups = len(parts.scales)
    chosen = weights or even_weights(columns, columns // n_groups)
    if (len(chosen.columns), len(chosen.divisors)) != (columns, n_groups):
        raise ValueError(f"weights of {len(chosen.columns)} columns for {columns} columns")
    parts.zeros[:] = 1 << (bits - 1)
    tables = _multipliers(bits, grid), *chosen
    _encode_search(values, *tables, bits, parts.codes, parts.scales, kind=dtype)
    return parts
