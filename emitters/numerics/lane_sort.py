"""Sorting of 16 lanes at once, for use inside kernels: a bitonic network.

Lanes are as in `hadamard`. A network compares the same elements whatever their values, so
nothing branches on them, and neighbouring lanes share each instruction.
"""

from __future__ import annotations

import numpy as np

from emitters.numerics.hadamard import LANES
from emitters.numerics.jit import device
from emitters.numerics.value_types import Array

_Four = tuple[np.float32, np.float32, np.float32, np.float32]

# Unsigned, as in `hadamard`: LLVM must see that the parts of a stage do not overlap.
_LANES, _TWO = np.uint64(LANES), np.uint64(2)
_ROW = tuple(np.uint64(row * LANES) for row in range(9))


@device
def _lower(a: np.float32, b: np.float32) -> np.float32:
    return a if a < b else b


@device
def _upper(a: np.float32, b: np.float32) -> np.float32:
    return b if a < b else a


@device
def _merge_four(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> _Four:
    """In ascending order: four values that ascend and then descend."""
    a, b, c, d = _lower(a, c), _lower(b, d), _upper(a, c), _upper(b, d)
    return _lower(a, b), _upper(a, b), _lower(c, d), _upper(c, d)


@device
def _sort_four(a: np.float32, b: np.float32, c: np.float32, d: np.float32) -> _Four:
    """In ascending order: any four values."""
    return _merge_four(_lower(a, b), _upper(a, b), _upper(c, d), _lower(c, d))


@device
def _order_eights(lanes: Array, size: np.uint64, unordered: bool) -> None:
    """The last three stages of a merge into runs of size floats; every other run descends.

    Or else, eight elements in any order are sorted. They stay in registers all the time.
    """
    for start in range(np.uint64(0), np.uint64(lanes.shape[0]), _ROW[8]):
        ascends = start & size == 0
        for i in range(start, start + _LANES):
            a, b, c, d = lanes[i], lanes[i + _ROW[1]], lanes[i + _ROW[2]], lanes[i + _ROW[3]]
            e, f = lanes[i + _ROW[4]], lanes[i + _ROW[5]]
            g, h = lanes[i + _ROW[6]], lanes[i + _ROW[7]]
            if unordered:
                a, b, c, d = _sort_four(a, b, c, d)
                h, g, f, e = _sort_four(e, f, g, h)
            a, e, b, f = _lower(a, e), _upper(a, e), _lower(b, f), _upper(b, f)
            c, g, d, h = _lower(c, g), _upper(c, g), _lower(d, h), _upper(d, h)
            a, b, c, d = _merge_four(a, b, c, d)
            e, f, g, h = _merge_four(e, f, g, h)
            if not ascends:
                a, b, c, d, e, f, g, h = h, g, f, e, d, c, b, a
            lanes[i], lanes[i + _ROW[1]], lanes[i + _ROW[2]], lanes[i + _ROW[3]] = a, b, c, d
            lanes[i + _ROW[4]], lanes[i + _ROW[5]] = e, f
            lanes[i + _ROW[6]], lanes[i + _ROW[7]] = g, h


@device
def _order_pairs(lanes: Array, step: np.uint64, size: np.uint64) -> None:
    """The stage of a merge into runs of size floats that compares floats a step apart."""
    for start in range(np.uint64(0), np.uint64(lanes.shape[0]), _TWO * step):
        low, high = np.uint64(start), start + step
        if start & size:
            low, high = high, low
        for i in range(step):
            a, b = lanes[low + i], lanes[high + i]
            lanes[low + i], lanes[high + i] = _lower(a, b), _upper(a, b)


@device
def sort_lanes(lanes: Array) -> None:
    """Each lane in ascending order, in place; lanes: float32 [n, 16], flat, n = 8, 16, 32 …

    Equal values may change places, zeros of both signs too. NaN leaves no order.
    """
    size = _ROW[8]
    _order_eights(lanes, size, True)
    while size < np.uint64(lanes.shape[0]):
        step = size
        size *= _TWO
        while step >= _ROW[8]:
            _order_pairs(lanes, step, size)
            step //= _TWO
        _order_eights(lanes, size, False)
