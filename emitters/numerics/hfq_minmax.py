"""Codes of equal steps between a group's extremes, for 16 groups: value = scale * code + low.

Every step is one float32 operation. A constant group has scale 1 and all codes zero.
Source: Kaden-Schutt/hipfire at 91e58a5 (0.1.8-alpha.2), crates/hipfire-quantize.
"""

from __future__ import annotations

import numpy as np

from emitters.numerics.hadamard import LANES
from emitters.numerics.hfq_groups import zero_at
from emitters.numerics.jit import device
from emitters.numerics.scalars import bits_of, float_of
from emitters.numerics.value_types import Array

HEADER_WORDS = 2  # scale and low, float32
_STRETCH = 16 * LANES  # floats coded in one loop
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)


@device
def _find_extremes(lanes: Array, lows: Array, highs: Array) -> None:
    """The first 16 of lows and highs = the extremes of each lane.

    lanes: float32 [size, 16], size a power of two; lows, highs: float32 [size / 2, 16]; flat.
    """
    # By halves, so that every loop is over many neighbours; unsigned, as in `hadamard`.
    n = np.uint64(lows.shape[0])
    for i in range(n):
        a, b = lanes[i], lanes[i + n]
        lows[i], highs[i] = (b if b < a else a), (b if b > a else a)
    while n > np.uint64(LANES):
        n //= np.uint64(2)
        for i in range(n):
            a, b = lows[i], lows[i + n]
            lows[i] = b if b < a else a
        for i in range(n):
            a, b = highs[i], highs[i + n]
            highs[i] = b if b > a else a
    for k in range(LANES):
        if lows[k] == _ZERO:
            # The first of them, as when comparing one after the other.
            lows[k] = zero_at(lanes[k::LANES], 0)


@device
def write_minmax(bits: int, lanes: Array, codes: Array, blocks: Array) -> None:
    """codes = those of each lane; the first two words of each block = its scale and low.

    lanes: float32 [size, 16], flat; codes: uint8 [size, 16], flat; blocks: uint32 [n, words],
    n up to 16. The low of a group of zeros is +0.
    """
    top = np.float32((1 << bits) - 1)
    half = lanes.shape[0] // 2
    lows, highs = np.empty(half, np.float32), np.empty(half, np.float32)
    _find_extremes(lanes, lows, highs)
    inverses = highs
    for k in range(LANES):
        span = highs[k] - lows[k]
        differ = span > _ZERO
        scale, low = (span / top, lows[k]) if differ else (_ONE, lows[k] + _ZERO)
        inverses[k] = _ONE / scale if differ else _ZERO
        if k < blocks.shape[0]:
            blocks[k, 0], blocks[k, 1] = bits_of(scale), bits_of(low)
    for i in range(LANES, _STRETCH):
        lows[i], inverses[i] = lows[i - LANES], inverses[i - LANES]
    for start in range(0, lanes.shape[0], _STRETCH):
        part, its_codes = lanes[start : start + _STRETCH], codes[start : start + _STRETCH]
        for i in range(_STRETCH):
            code = (part[i] - lows[i]) * inverses[i] + _HALF
            code = code if code > _ZERO else _ZERO
            its_codes[i] = np.uint8(np.int32(code if code < top else top))


@device
def read_minmax(codes: Array, blocks: Array, rows: Array) -> None:
    """rows = the values of the codes of each block; codes: uint8, rows: float32, [16, size]."""
    for k in range(blocks.shape[0]):
        scale, low = float_of(blocks[k, 0]), float_of(blocks[k, 1])
        its_codes, row = codes[k], rows[k]
        for i in range(row.shape[0]):
            product = np.float32(its_codes[i]) * scale
            row[i] = product + low
