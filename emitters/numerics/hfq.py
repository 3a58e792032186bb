"""HFQ blocks: groups of consecutive values, each coded as a header and packed codes.

Of a "line": a scale and the lowest value; value = scale * code + low, every step one float32
operation; a constant group has scale 1 and all codes zero. Of Q8: a float16 scale before 32
signed bytes; value = scale * code; codes come from the float32 scale, which is then cut off
toward zero. Of "levels": see `hfq_lloyd`.

Groups may be rotated before they are coded: by signs, the transform of `hadamard` and other signs;
the inverse has the signs exchanged. They know of no rows: only the last group of all values can be
short, and it is stored as a whole block. Lanes are as in `hadamard`.
Source: Kaden-Schutt/hipfire at 91e58a5 (0.1.8-alpha.2) and 0e5eb9a, crates/hipfire-quantize.
"""

from functools import cache

import numpy as np

from emitters.numerics import F32, Array, rounding
from emitters.numerics.bitpack import pack_codes, unpack, unpack_codes
from emitters.numerics.hadamard import LANES, load_lanes, rotate, rotate_lanes, rotate_rows
from emitters.numerics.hfq_lloyd import read_lloyd, write_lloyd, zero_at
from emitters.numerics.jit import device, int64, kernel, reads, row_of, several, writes
from emitters.numerics.reach import FLOORS, STEP_SLOP, UNITS, Width, outside, slack_of
from emitters.numerics.rounding import bits_of, clamped, float_of
from policy_dsl.formats import Slack
from policy_dsl.sources.hfq_container import QUANT_CODES, QuantCode

_MQ8 = 14  # has blocks, but no codec here
_Q8_SIZE = 32
_Q8_TOP, _Q8_MOST = np.float32(127), np.float32(128)
_ROTATED_SIZE = 256
_SEEDS = {0: 42, _ROTATED_SIZE: 1042}  # of the signs before and after
_STRETCH = 16 * LANES  # floats coded in one loop
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
# Of the root mean square of what is rotated: errors of float32 additions, in any order.
_ROTATED = 2.0**-16
_CODES = {code: known for code, known in QUANT_CODES.items() if known.header and code != _MQ8}


@cache
def rotation_signs() -> Array:
    """The signs before and after the transform: float32 [2 * 256], read-only.

    They come from a linear congruential generator.
    """
    signs, state = np.empty(2 * _ROTATED_SIZE, np.float32), 0
    for i in range(signs.size):
        state = _SEEDS.get(i, state)
        state = (state * 1103515245 + 12345) % 2**31
        signs[i] = 1 if state >> 16 & 1 else -1
    signs.flags.writeable = False
    return signs


@device
def _lanes_to_rows(codes: Array, scratch: Array) -> None:
    """codes [size, 16] to [16, size], in place; codes, scratch: uint8, flat."""
    half = codes.shape[0] // 2
    # Each pass moves the lowest bit of the address to the front: four are a lane's number.
    for _ in range(2):
        for i in range(half):
            scratch[i], scratch[half + i] = codes[2 * i], codes[2 * i + 1]
        for i in range(half):
            codes[i], codes[half + i] = scratch[2 * i], scratch[2 * i + 1]


@device
def _find_extremes(lanes: Array, lows: Array, highs: Array) -> None:
    """The first 16 of lows, highs [256] = the extremes of each lane; at first, lanes begin them."""
    for start in range(_STRETCH, lanes.shape[0], _STRETCH):
        part = lanes[start : start + _STRETCH]
        for i in range(_STRETCH):
            lows[i], highs[i] = min(lows[i], part[i]), max(highs[i], part[i])
    for start in range(LANES, _STRETCH, LANES):
        for k in range(LANES):
            lows[k], highs[k] = min(lows[k], lows[start + k]), max(highs[k], highs[start + k])


@device
def _write_minmax(bits: int, lanes: Array, codes: Array, blocks: Array) -> None:
    """codes [size, 16] = those of the lanes; each block [n, words] begins with its scale and low.

    n: up to 16. The low of a group of zeros is +0.
    """
    top, lows, highs = np.float32((1 << bits) - 1), lanes[:_STRETCH].copy(), lanes[:_STRETCH].copy()
    _find_extremes(lanes, lows, highs)
    inverses = highs
    for k in range(LANES):
        # The first of zeros, as when comparing one after the other.
        low = zero_at(lanes[k::LANES], 0) if lows[k] == _ZERO else lows[k]
        span = highs[k] - low
        differ = span > _ZERO
        scale, low = (span / top, low) if differ else (_ONE, low + _ZERO)
        inverses[k] = _ONE / scale if differ else _ZERO
        if k < blocks.shape[0]:
            blocks[k, 0], blocks[k, 1] = bits_of(scale), bits_of(low)
    for i in range(LANES, _STRETCH):
        lows[i], inverses[i] = lows[i - LANES], inverses[i - LANES]
    for start in range(0, lanes.shape[0], _STRETCH):
        part, its_codes = lanes[start : start + _STRETCH], codes[start : start + _STRETCH]
        for i in range(_STRETCH):
            code = clamped((part[i] - lows[i]) * inverses[i] + _HALF, top)
            its_codes[i] = np.uint8(np.int32(code))


@device
def _read_minmax(block: Array, codes: Array, row: Array) -> None:
    """row = the values of a block's codes; codes: uint8, row: float32, [size]."""
    scale, low = float_of(block[0]), float_of(block[1])
    for i in range(row.shape[0]):
        product = np.float32(codes[i]) * scale
        row[i] = product + low


@kernel(reads("float32"), writes("uint16"))
def _encode_q8(values: Array, stored: Array) -> None:
    groups = values.reshape(-1, _Q8_SIZE)
    blocks = stored.reshape(groups.shape[0], -1)
    for k in range(groups.shape[0]):
        group, codes = groups[k], blocks[k, 1:].view(np.int8)
        scale = rounding.largest_magnitude(group) / _Q8_TOP
        inverse = _ONE / scale if scale > _ZERO else _ZERO
        blocks[k, 0] = rounding.half_toward_zero(bits_of(scale))
        for i in range(_Q8_SIZE):
            quotient = group[i] * inverse
            # Rounded to nearest, halves away from zero; clamped before that: the inverse of the
            # smallest scales is infinite, and 0 times that is NaN, which counts as 0.
            size = clamped(abs(quotient), _Q8_MOST)
            whole = np.int32(size)
            whole += np.int32(size - np.float32(whole) >= _HALF)
            whole = -whole if quotient < _ZERO else whole
            codes[i] = np.int8(whole if whole < 128 else 127)


@kernel(reads("float32"), reads("float32"), several(int64, 2), writes("uint32"))
def _encode_hfq(values: Array, signs: Array, layout: Width, stored: Array, level_bits: int) -> None:
    """level_bits: of codes that name levels, for which loops are unrolled; else 0."""
    bits, size = layout
    blocks = stored.reshape(values.shape[0] // size, -1)
    # A sign for each lane, so that the loop runs over neighbours.
    after, lanes = signs[size:].repeat(LANES), np.empty(size * LANES, np.float32)
    codes, scratch = np.empty(size * LANES, np.uint8), np.empty(size * LANES, np.uint8)
    pieces = np.empty(size // 8, np.uint64)
    for first in range(0, blocks.shape[0], LANES):
        groups, target = values[first * size :][: LANES * size], blocks[first:][:LANES]
        load_lanes(F32, groups.view(np.uint32), signs[:size], lanes)
        if after.shape[0]:
            rotate(lanes)
        for i in range(after.shape[0]):
            lanes[i] *= after[i]
        if level_bits:
            write_lloyd(level_bits, lanes, codes, target)
        else:
            _write_minmax(bits, lanes, codes, target)
        _lanes_to_rows(codes, scratch)
        for k in range(target.shape[0]):
            part, words = codes[k * size : (k + 1) * size], target[k, -size * bits // 32 :]
            pack_codes(part, pieces, words, bits)


@kernel(reads("uint32"), reads("float32"), several(int64, 2), writes("float32"))
def _decode_hfq(
    stored: Array, signs: Array, layout: Width, values: Array, has_levels: bool
) -> None:
    bits, size = layout
    blocks, rows = stored.reshape(values.shape[0] // size, -1), values.reshape(-1, size)
    codes, levels = np.empty(size, np.uint8), np.empty(1 << bits, np.float32)
    lanes = np.empty(size * LANES, np.float32)
    for k in range(blocks.shape[0]):
        block, row = blocks[k], rows[k]
        unpack_codes(block[-size * bits // 32 :], codes, bits)
        if has_levels:
            read_lloyd(block, codes, levels, row)
        else:
            _read_minmax(block, codes, row)
        if signs.shape[0] > size and (k % LANES == LANES - 1 or k == blocks.shape[0] - 1):
            # Backwards: the signs change places.
            part = values[k // LANES * LANES * size : (k + 1) * size]
            rotate_lanes(part, signs[size:], signs[:size], lanes, part)


def encode_blocks(values: Array, code: int) -> Array:
    """The blocks of the values under a quant code: uint8 [blocks, bytes].

    values: float32 [n], finite; not changed. Scales and levels that overflow float16 are
    stored as infinity. The lowest value of a group of zeros is +0; hipfire leaves its sign
    open.
    Raises: ValueError for another code, or if the values are not float32.
    Source: Kaden-Schutt/hipfire at 91e58a5 and 0e5eb9a, run on a CPU.
    """
    layout = _layout(code)
    if missing := -values.size % layout.group:
        # Rotations are of zeros, and all that comes out is coded. Of a line, the group's lowest
        # value leaves its extremes as they are, and its code is zero.
        last = values[values.size // layout.group * layout.group :]
        filling = last.min() if layout.header == "line" and not layout.rotated else 0
        values = np.append(values, np.full(missing, filling, values.dtype))
    blocks = np.empty((values.size // layout.group, layout.nbytes), np.uint8)
    if layout.header == "scale":
        _encode_q8(values, blocks.view(np.uint16))
    else:
        level_bits, width = layout.bits * (layout.header == "levels"), (layout.bits, layout.group)
        words = blocks.view(np.uint32)
        _encode_hfq(values, _signs(layout), width, words, level_bits=level_bits)
    return blocks


def decode_blocks(blocks: Array, code: int, count: int) -> Array:
    """The float32 values [count] that blocks encode, rotated back.

    blocks, code: as in `encode_blocks`.
    Raises: ValueError for another code, or if the blocks are not those of so many values.
    Source: as of `encode_blocks`; each product, sum and step of the rotation is rounded.
    """
    layout = _layout(code)
    shape = -(-count // layout.group), layout.nbytes
    if blocks.shape != shape:
        raise ValueError(f"blocks {blocks.shape} of {count} values should be {shape}")
    values = np.empty((shape[0], layout.group), np.float32)
    stored = row_of(blocks, "uint8", "blocks")
    if layout.header == "scale":
        scales = block_header(blocks, code).astype(np.float32)
        with np.errstate(invalid="ignore"):
            np.multiply(blocks[:, 2:].view(np.int8), scales, values)
    else:
        has_levels, width = layout.header == "levels", (layout.bits, layout.group)
        words = stored.view(np.uint32)
        _decode_hfq(words, _signs(layout), width, values, has_levels=has_levels)
    return values.reshape(-1)[:count]


def _layout(code: int) -> QuantCode:
    if code not in _CODES:
        raise ValueError(f"quant code {code} is none of {str([*_CODES])[1:-1]}")
    return _CODES[code]


def _signs(layout: QuantCode) -> Array:
    """The signs before and after the rotation; ones and nothing where there is none."""
    return rotation_signs() if layout.rotated else np.ones(layout.group, np.float32)


def block_header(blocks: Array, code: int) -> Array:
    """The numbers before the codes of blocks, uint8 [blocks, bytes]; none of other codes.

    float32 [blocks, 2]: scale and lowest value; or float16 [blocks, n]: a scale, or levels.
    """
    layout = QUANT_CODES[code]
    nbytes = layout.nbytes - layout.group * layout.bits // 8 if layout.header else 0
    stored = np.float32 if layout.header == "line" else np.float16
    return np.ascontiguousarray(blocks[:, :nbytes]).view(stored)


def first_bad_header(header: Array, code: int) -> int:
    """The first block whose numbers no reader can compute with, or -1; header: [blocks, n].

    Numbers must be finite, the scale of a line above 0 and another scale not below, and levels
    must ascend.
    """
    # A NaN that signals would warn; it is not finite.
    with np.errstate(invalid="ignore"):
        good = np.isfinite(header).all(axis=1)
        match QUANT_CODES[code].header:
            case "line":
                good &= header[:, 0] > 0
            case "scale":
                good &= header[:, 0] >= 0
            case "levels":
                good &= (header[:, 1:] >= header[:, :-1]).all(axis=1)
    return -1 if good.all() else int(np.argmin(good))


def hfq_beyond(values: Array, blocks: Array, code: int, slack: Slack) -> Array:
    """Values that are too far from the codes of HFQ blocks: float32 [n], n up to all of them.

    blocks: uint8 [blocks, bytes]. Of rotated groups, the values after the rotation count.
    """
    layout, numbers = QUANT_CODES[code], block_header(blocks, code).astype(np.float32)
    packed = np.ascontiguousarray(blocks[:, -layout.group * layout.bits // 8 :])
    is_q8 = layout.header == "scale"
    codes = packed.view(np.int8) if is_q8 else unpack(packed.view(np.uint32), layout.bits)
    groups = np.zeros(codes.shape, np.float32)
    groups.reshape(-1)[: values.size] = values
    size = np.sqrt((groups.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
    if layout.rotated:
        rotate_rows(groups, *rotation_signs().reshape(2, -1), groups)
    added = slack_of(groups, slack)
    if layout.rotated:
        # Additions of a rotation, and what was rounded before it, are spread over the group.
        added = added + (size * (_ROTATED + 4 * slack.relative)).astype(np.float32)
    wrong = _beyond_levels if layout.header == "levels" else _beyond_lines
    return wrong(groups, codes, numbers, added).reshape(-1)[: values.size]


def _beyond_lines(groups: Array, codes: Array, numbers: Array, added: Array) -> Array:
    """Of blocks with a scale and a lowest value: both stored whole; or a cut-off scale."""
    scale, low = numbers[:, :1], numbers[:, 1:2]
    with np.errstate(invalid="ignore", over="ignore"):
        decoded = codes * scale + (low if low.size else 0)
    step = np.abs(scale)
    if low.size:
        # A group of equal values has no step, and 1 is used.
        step = np.where((step == 1) & (codes.max(axis=1, keepdims=True) == 0), 0, step)
    else:
        # Cut off, not rounded: twice the unit.
        cut = step * np.float32(2 * UNITS["F16"]) + np.float32(2 * FLOORS["F16"])
        added = added + (np.abs(codes.astype(np.float32)) + 1) * cut
    return outside(groups, decoded, step * np.float32(0.5 + STEP_SLOP) + added)


def _beyond_levels(groups: Array, codes: Array, levels: Array, added: Array) -> Array:
    """Of blocks with levels: up to a quarter of a gap beyond the middle between two levels.

    All values of a level are wrong if it is farther from their mean than half-way to the next.
    """
    codes = codes.astype(np.intp)
    own = np.take_along_axis(levels, codes, axis=1)
    added = added + 2 * UNITS["F16"] * np.abs(own) + 2 * FLOORS["F16"]
    wrong: Array = ~np.isfinite(own)
    lost, best = np.abs(groups - own), np.full(groups.shape, np.inf, np.float32)
    nearest = own
    for level in levels.T[:, :, None]:
        distance = np.abs(groups - level)
        nearest = np.where(distance < best, level, nearest)
        best = np.fmin(best, distance)
    with np.errstate(invalid="ignore"):
        wrong |= ~(lost - best <= np.abs(own - nearest) / 2 + added)
    wrong |= np.take_along_axis(_moved(groups, codes, levels), codes, axis=1) > added
    return wrong


def _moved(groups: Array, codes: Array, levels: Array) -> Array:
    """How far each level is from the mean of its values, beyond half-way to the next level."""
    n = levels.shape[1]
    apart = np.zeros(levels.shape)
    for k in range(n):
        mine = codes == k
        counts = mine.sum(axis=1)
        means = (groups * mine).sum(axis=1, dtype=np.float64) / np.maximum(counts, 1)
        others = np.delete(levels, k, axis=1)
        with np.errstate(invalid="ignore"):
            gap = np.fmin.reduce(np.abs(others - levels[:, k : k + 1]), axis=1)
            apart[:, k] = np.where(counts, np.abs(levels[:, k] - means) - gap / 2, 0)
    return apart
