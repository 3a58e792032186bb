"""Codes of 2**bits levels that Lloyd's iteration finds in a group, for 16 groups of 256.

The rule: levels start at quantiles. Eight times, each value takes the nearest level, the
first of equally near ones, and each level moves to the mean of its values. Distances are
float32; means are float64 sums in the order of the values, divided and rounded. The reference
stops after a pass without a change of code; more passes would change no level either.

Values in ascending order take ascending levels. So the borders between the values of two
levels are found by bisection, and a sum between borders is a difference of partial sums. That
gives the same bits if sums are exact in any order, and if levels are not so close that rounded
distances to them are equal. Both are rare; then the rule is followed value by value.

Lanes are as in `hadamard`. They are sorted by a bitonic network, which compares the same elements
whatever their values: nothing branches on them, and neighbouring lanes share each instruction.
Source: Kaden-Schutt/hipfire at 0e5eb9a, crates/hipfire-quantize/src/quant_mq.rs.
"""

import numpy as np

from emitters.numerics import F16, Array
from emitters.numerics.hadamard import LANES
from emitters.numerics.jit import device
from emitters.numerics.rounding import bits_of, float_of, narrow, widen

_Four = tuple[np.float32, np.float32, np.float32, np.float32]

_PASSES = 8
_STRETCH = 16 * LANES  # floats summed in one loop
_ZERO = np.float32(0)
# Unsigned: see `jit`.
_LANES, _TWO = np.uint64(LANES), np.uint64(2)
_ROWS = tuple(np.uint64(row * LANES) for row in range(9))
_EXPONENT = np.uint32(0x7F800000)
# 2**e times this has its last bit at 2**(e - 44). Of numbers below 2**(e + 1) without smaller
# bits, 256 add up exactly in any order: 44 + 1 + 8 bits are those of a float64.
_COARSE = np.float64(1.5 * 2**8)
_CLOSE = np.float32(2.0**-20)  # of the span; distances are rounded to 2**-24 of it


@device
def _merge_four(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> _Four:
    """In ascending order: four values that ascend and then descend."""
    a, b, c, d = min(a, c), min(b, d), max(a, c), max(b, d)
    return min(a, b), max(a, b), min(c, d), max(c, d)


@device
def _order_eights(lanes: Array, size: np.uint64, unordered: bool) -> None:
    """The last three stages of a merge into runs of size floats, every other one descending."""
    for start in range(np.uint64(0), np.uint64(lanes.shape[0]), _ROWS[8]):
        ascends = start & size == 0
        for i in range(start, start + _LANES):
            a, b, c, d = lanes[i], lanes[i + _ROWS[1]], lanes[i + _ROWS[2]], lanes[i + _ROWS[3]]
            e, f = lanes[i + _ROWS[4]], lanes[i + _ROWS[5]]
            g, h = lanes[i + _ROWS[6]], lanes[i + _ROWS[7]]
            if unordered:
                a, b, c, d = _merge_four(min(a, b), max(a, b), max(c, d), min(c, d))
                h, g, f, e = _merge_four(min(e, f), max(e, f), max(g, h), min(g, h))
            a, e, b, f = min(a, e), max(a, e), min(b, f), max(b, f)
            c, g, d, h = min(c, g), max(c, g), min(d, h), max(d, h)
            a, b, c, d = _merge_four(a, b, c, d)
            e, f, g, h = _merge_four(e, f, g, h)
            if not ascends:
                a, b, c, d, e, f, g, h = h, g, f, e, d, c, b, a
            lanes[i], lanes[i + _ROWS[1]], lanes[i + _ROWS[2]], lanes[i + _ROWS[3]] = a, b, c, d
            lanes[i + _ROWS[4]], lanes[i + _ROWS[5]] = e, f
            lanes[i + _ROWS[6]], lanes[i + _ROWS[7]] = g, h


@device
def _order_pairs(lanes: Array, step: np.uint64, size: np.uint64) -> None:
    """The stage of a merge into runs of size floats that compares floats a step apart."""
    for start in range(np.uint64(0), np.uint64(lanes.shape[0]), _TWO * step):
        low, high = np.uint64(start), start + step
        if start & size:
            low, high = high, low
        for i in range(step):
            a, b = lanes[low + i], lanes[high + i]
            lanes[low + i], lanes[high + i] = min(a, b), max(a, b)


@device
def sort_lanes(lanes: Array) -> None:
    """Each lane in ascending order, in place; lanes: float32 [n, 16], flat, n = 8, 16, 32 …

    Equal values may change places, zeros of both signs too. NaN leaves no order.
    """
    size = _ROWS[8]
    _order_eights(lanes, size, True)
    while size < np.uint64(lanes.shape[0]):
        step = size
        size *= _TWO
        while step >= _ROWS[8]:
            _order_pairs(lanes, step, size)
            step //= _TWO
        _order_eights(lanes, size, False)


@device
def zero_at(lane: Array, rank: int) -> np.float32:
    """The zero of this rank, from 0, among all zeros of a lane, by index.

    Zeros of both signs are equal: where one of them is chosen, their order decides.
    """
    for i in range(lane.shape[0]):
        if lane[i] == _ZERO and rank == 0:
            return np.float32(lane[i])
        rank -= lane[i] == _ZERO
    # Only lanes that are not finite have fewer.
    return _ZERO


@device
def _start(lanes: Array, ordered: Array, levels: Array) -> None:
    """levels [n, 16] = the middles of equal parts of each ordered lane [size, 16]."""
    n, last = levels.shape[0] // LANES, lanes.shape[0] // LANES - 1
    for i in range(levels.shape[0]):
        rank = int((2 * (i // LANES) + 1) * last / (2 * n) + 0.5)
        k = i % LANES
        levels[i] = ordered[rank * LANES + k]
        if levels[i] == _ZERO:
            # In a stable order, zeros of both signs stay as they came.
            lane = lanes[k::LANES]
            levels[i] = zero_at(lane, rank - int(np.count_nonzero(lane < _ZERO)))


@device
def _add_up(ordered: Array, below: Array) -> bool:
    """below [size + 1, 16] = sums of the elements before each; whether exact in any order."""
    n = np.uint64(ordered.shape[0])
    coarse = np.empty(_STRETCH, np.float64)
    for k in range(LANES):
        largest = max(abs(ordered[k]), abs(ordered[ordered.shape[0] - LANES + k]))
        coarse[k] = np.float64(float_of(bits_of(largest) & _EXPONENT)) * _COARSE
        below[k] = 0
    for i in range(LANES, _STRETCH):
        coarse[i] = coarse[i - LANES]
    inexact = 0
    for start in range(np.uint64(0), n, np.uint64(_STRETCH)):
        for i in range(np.uint64(_STRETCH)):
            value = np.float64(ordered[start + i])
            below[start + i + _LANES] = below[start + i] + value
            inexact += (value + coarse[i]) - coarse[i] != value
    return inexact == 0


@device
def _are_apart(levels: Array, spans: Array) -> bool:
    """Whether the levels [n, 16] of each lane ascend, by more than distances are rounded."""
    close = 0
    for i in range(levels.shape[0] - LANES):
        span = spans[i % LANES]
        step = levels[i + LANES] - levels[i]
        close += span > _ZERO and not step > span * _CLOSE
    return close == 0


@device
def _find_borders(ordered: Array, levels: Array, borders: Array) -> None:
    """borders [n - 1, 16] = where elements nearer to a level than to the one before begin."""
    n = np.uint64(borders.shape[0])
    values = np.empty(n, np.float32)
    for i in range(n):
        borders[i] = i % _LANES
    # All bisections go side by side, without a branch. The largest element is always nearest to
    # the last level, so that no border is beyond it.
    step = np.uint32(ordered.shape[0] // 2)
    while step >= np.uint32(LANES):
        for i in range(n):
            values[i] = ordered[np.uint64(np.uint32(borders[i] + step - np.uint32(LANES)))]
        for i in range(n):
            nearer = abs(values[i] - levels[i + _LANES]) < abs(values[i] - levels[i])
            borders[i] += np.uint32(0) if nearer else step
        step = np.uint32(step >> np.uint32(1))


@device
def _assign(bits: int, lanes: Array, levels: Array, codes: Array) -> None:
    """codes [256, 16] = the nearest level [2**bits, 16] of each value, first of equals."""
    for start in range(np.uint64(0), np.uint64(lanes.shape[0]), _LANES):
        for k in range(np.uint64(0), _LANES):
            value = lanes[start + k]
            best, code = abs(value - levels[k]), np.int32(0)
            for m in range(1, 1 << bits):
                distance = abs(value - levels[np.uint64(m) * _LANES + k])
                code = np.int32(m) if distance < best else code
                best = distance if distance < best else best
            codes[start + k] = code


@device
def _exchange(lane: Array, code: int) -> None:
    """This code and the one above it change places; lane: uint8 [size]."""
    for i in range(lane.shape[0]):
        lane[i] = 2 * code + 1 - lane[i] if code <= lane[i] <= code + 1 else lane[i]


@device
def _order_levels(levels: Array, codes: Array) -> None:
    """The levels of each lane in ascending order, equal ones as they were; codes follow."""
    for last in range(levels.shape[0] - LANES, 0, -LANES):
        for i in range(last):
            if levels[i] > levels[i + LANES]:
                levels[i], levels[i + LANES] = levels[i + LANES], levels[i]
                _exchange(codes[i % LANES :: LANES], i // LANES)


@device
def _find_levels(bits: int, lanes: Array, codes: Array, levels: Array) -> None:
    """codes, levels = those of each lane; codes are nearest to levels before their last move."""
    ordered, before, n = lanes.copy(), levels.copy(), levels.shape[0]
    sort_lanes(ordered)
    spans = ordered[-LANES:] - ordered[:LANES]
    _start(lanes, ordered, levels)
    below = np.empty(lanes.shape[0] + LANES, np.float64)
    exact = _add_up(ordered, below)
    borders = np.empty(n + LANES, np.uint32)
    for k in range(LANES):
        borders[k], borders[n + k] = k, lanes.shape[0] + k
    sums, counts = np.empty(n, np.float64), np.empty(n, np.int64)
    for _ in range(_PASSES):
        before[:] = levels
        if exact and _are_apart(levels, spans):
            _find_borders(ordered, levels, borders[LANES:n])
            for i in range(n):
                start, end = borders[i], borders[i + LANES]
                sums[i], counts[i] = below[end] - below[start], (end - start) // LANES
        else:
            _assign(bits, lanes, levels, codes)
            sums[:], counts[:] = 0, 0
            for i in range(lanes.shape[0]):
                at = codes[i] * LANES + i % LANES
                sums[at] += np.float64(lanes[i])
                counts[at] += 1
        for i in range(n):
            moves = counts[i] > 0 and spans[i % LANES] > _ZERO
            levels[i] = np.float32(sums[i] / counts[i]) if moves else levels[i]
    _assign(bits, lanes, before, codes)


@device
def write_lloyd(bits: int, lanes: Array, codes: Array, blocks: Array) -> None:
    """codes [256, 16] = those of the lanes; each block [n, words] begins with its levels, float16.

    n: up to 16.
    """
    levels = np.empty(LANES << bits, np.float32)
    _find_levels(bits, lanes, codes, levels)
    _order_levels(levels, codes)
    for k in range(blocks.shape[0]):
        halves = blocks[k].view(np.uint16)
        for m in range(1 << bits):
            halves[m] = narrow(F16, levels[m * LANES + k])


@device
def read_lloyd(block: Array, codes: Array, levels: Array, row: Array) -> None:
    """row = the levels of a block's codes, uint8; levels: float32 [2**bits], scratch."""
    halves = block.view(np.uint16)
    for m in range(levels.shape[0]):
        levels[m] = widen(F16, halves[m])
    for i in range(row.shape[0]):
        row[i] = levels[codes[i]]
