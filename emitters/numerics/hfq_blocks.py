"""HFQ blocks of equal steps, and what all kinds of blocks share: signs, and codes in blocks.

Lanes are as in `hadamard`. A group is rotated by signs, the transform of `hadamard` and other
signs; the inverse has the signs exchanged.
minmax: value = scale * code + low, every step one float32 operation; a constant group has scale
1 and all codes zero.
Q8: 32 signed bytes after a float16 scale; value = scale * code. Codes come from the float32
scale, which is then cut off toward zero.
Source: Kaden-Schutt/hipfire at 91e58a5 (0.1.8-alpha.2), crates/hipfire-quantize, run on a CPU.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from emitters.numerics.bitpack import pack_codes, unpack_codes
from emitters.numerics.hadamard import LANES
from emitters.numerics.jit import device, late, reads, writes
from emitters.numerics.rounding import bits_of, float_of, half_toward_zero, widen
from emitters.numerics.value_types import F16, Array, flat

_ROTATED_SIZE = 256
_FIRST_SEED, _LAST_SEED = 42, 1042
_STRETCH = 16 * LANES  # floats coded in one loop
_Q8_SIZE, _Q8_NBYTES = 32, 34
_Q8_TOP, _Q8_MOST = np.float32(127), np.float32(128)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)


def _signs(seed: int) -> Array:
    """256 signs from a linear congruential generator: float32."""
    signs, state = np.empty(_ROTATED_SIZE, np.float32), seed
    for i in range(_ROTATED_SIZE):
        state = (state * 1103515245 + 12345) % 2**31
        signs[i] = 1 if state >> 16 & 1 else -1
    return signs


@cache
def rotation_signs() -> Array:
    """The signs before and after the transform: float32 [2 * 256], read-only."""
    signs = np.concatenate([_signs(_FIRST_SEED), _signs(_LAST_SEED)])
    signs.flags.writeable = False
    return signs


@device
def lanes_to_rows(codes: Array, scratch: Array) -> None:
    """codes [size, 16] to [16, size], in place; codes, scratch: uint8, flat."""
    half = codes.shape[0] // 2
    # Each pass moves the lowest bit of the address to the front: four are a lane's number.
    for _ in range(2):
        for i in range(half):
            scratch[i], scratch[half + i] = codes[2 * i], codes[2 * i + 1]
        for i in range(half):
            codes[i], codes[half + i] = scratch[2 * i], scratch[2 * i + 1]


@device
def write_codes(bits: int, codes: Array, blocks: Array) -> None:
    """The packed codes of each group go to the end of its block.

    codes: uint8 [>= n, size]; blocks: uint32 [n, words].
    """
    size = codes.shape[1]
    pieces, start = np.empty(size // 8, np.uint64), blocks.shape[1] - size * bits // 32
    for k in range(blocks.shape[0]):
        pack_codes(codes[k], pieces, blocks[k, start:], bits)


@device
def read_codes(bits: int, blocks: Array, codes: Array) -> None:
    """The inverse of `write_codes`."""
    start = blocks.shape[1] - codes.shape[1] * bits // 32
    for k in range(blocks.shape[0]):
        unpack_codes(blocks[k, start:], codes[k], bits)


@device
def zero_at(lane: Array, rank: int) -> np.float32:
    """The zero of this rank, from 0, among all zeros of a lane, by index.

    Zeros of both signs are equal: where one of them is chosen, their order decides.
    """
    for i in range(lane.shape[0]):
        if lane[i] == _ZERO:
            if rank == 0:
                return np.float32(lane[i])
            rank -= 1
    # Only lanes that are not finite have fewer.
    return _ZERO


@device
def _find_extremes(lanes: Array, lows: Array, highs: Array) -> None:
    """The first 16 of lows, highs [size / 2, 16] = the extremes of each lane [size, 16]."""
    # By halves, so that every loop is over many neighbours.
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


@device
def _q8_scale(values: Array) -> np.float32:
    """The float32 scale of finite float32 [n]; magnitudes are compared as integers."""
    largest = np.uint32(0)
    for i in range(values.shape[0]):
        largest = max(largest, np.uint32(bits_of(values[i]) & np.uint32(0x7FFFFFFF)))
    return float_of(largest) / _Q8_TOP


@device
def _write_q8_codes(values: Array, scale: np.float32, codes: Array) -> None:
    """codes = int8, the values times 1 / scale, rounded to nearest, halves away from zero."""
    inverse = _ONE / scale if scale > _ZERO else _ZERO
    for i in range(values.shape[0]):
        quotient = values[i] * inverse
        # Clamped before rounding: the inverse of the smallest scales is infinite, and 0 times
        # that is NaN, which counts as 0.
        size = abs(quotient)
        size = size if size >= _ZERO else _ZERO
        size = size if size < _Q8_MOST else _Q8_MOST
        whole = np.int32(size)
        whole += np.int32(size - np.float32(whole) >= _HALF)
        whole = -whole if quotient < _ZERO else whole
        codes[i] = np.int8(whole if whole < 128 else 127)


@late(reads("float32"), writes("uint16"))
def _encode_q8(values: Array, stored: Array) -> None:
    codes = np.empty(_Q8_SIZE, np.int8)
    blocks = stored.reshape(values.shape[0] // _Q8_SIZE, -1)
    for k in range(blocks.shape[0]):
        group = values[k * _Q8_SIZE : (k + 1) * _Q8_SIZE]
        scale = _q8_scale(group)
        _write_q8_codes(group, scale, codes)
        blocks[k, 0] = half_toward_zero(bits_of(scale))
        blocks[k, 1:] = codes.view(np.uint16)


@late(reads("uint16"), writes("float32"))
def _decode_q8(stored: Array, values: Array) -> None:
    codes = np.empty(_Q8_SIZE, np.int8)
    blocks = stored.reshape(values.shape[0] // _Q8_SIZE, -1)
    for k in range(blocks.shape[0]):
        scale = widen(F16, blocks[k, 0])
        codes.view(np.uint16)[:] = blocks[k, 1:]
        group = values[k * _Q8_SIZE : (k + 1) * _Q8_SIZE]
        for i in range(_Q8_SIZE):
            group[i] = np.float32(codes[i]) * scale


def q8_encode(values: Array) -> Array:
    """The blocks of the values: uint8 [blocks, 34].

    values: float32 [n], finite; not changed. What is missing of the last group gets code 0. A
    scale that overflows is stored as infinity.
    Raises: ValueError if the values are not float32.
    """
    whole = flat(values, np.float32, "values")
    if missing := -whole.size % _Q8_SIZE:
        whole = np.append(whole, np.zeros(missing, np.float32))
    blocks = np.empty((whole.size // _Q8_SIZE, _Q8_NBYTES), np.uint8)
    _encode_q8(whole, blocks.reshape(-1).view(np.uint16))
    return blocks


def q8_decode(blocks: Array, count: int) -> Array:
    """The float32 values [count] of blocks as `q8_encode` gives them.

    Raises: ValueError if the blocks are not those of so many values.
    """
    shape = -(-count // _Q8_SIZE), _Q8_NBYTES
    if blocks.shape != shape:
        raise ValueError(f"blocks {blocks.shape} of {count} values should be {shape}")
    values = np.empty(shape[0] * _Q8_SIZE, np.float32)
    _decode_q8(flat(blocks, np.uint8, "blocks").view(np.uint16), values)
    return values[:count]
