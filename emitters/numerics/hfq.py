"""HFQ blocks: groups of consecutive values, each coded as a header and packed codes.

A header is a scale and the lowest value or, of Q8, a scale alone (`hfq_blocks`), or a table of
levels (`hfq_lloyd`). Groups may be rotated before they are coded. They know of no rows: only
the last group of all values can be short, and it is stored as a whole block.
Source: Kaden-Schutt/hipfire at 91e58a5 (0.1.8-alpha.2) and 0e5eb9a, crates/hipfire-quantize.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from emitters.numerics.hadamard import LANES, load_lanes, rotate, store_lanes
from emitters.numerics.hfq_blocks import (
    lanes_to_rows,
    q8_decode,
    q8_encode,
    read_codes,
    read_minmax,
    rotation_signs,
    write_codes,
    write_minmax,
)
from emitters.numerics.hfq_lloyd import read_lloyd, write_lloyd
from emitters.numerics.jit import device, factory, int64, int64_pair, kernel, late, reads, writes
from emitters.numerics.reach import FLOORS, HALF_REACH, UNITS, slack_of
from emitters.numerics.value_types import F32, Array, flat
from policy_dsl.formats import Slack
from policy_dsl.sources.hfq_container import QUANT_CODES, QuantCode

_Q8 = 3
# Of the root mean square of what is rotated: errors of float32 additions, in any order.
_ROTATED = 2.0**-16
_CODES = {code: known for code, known in QUANT_CODES.items() if known.header in ("line", "levels")}


@device
def _load(values: Array, before: Array, after: Array, lanes: Array) -> None:
    """lanes [size, 16] = up to 16 groups of values, rotated if there are signs for after it."""
    load_lanes(F32, values, before, lanes)
    if after.shape[0]:
        rotate(lanes)
        for i in range(lanes.shape[0]):
            lanes[i] *= after[i]


@factory
def _encoder(level_bits: int) -> Callable[..., None]:
    """level_bits: of codes that name levels, for which loops are unrolled; else 0."""

    @kernel(reads("uint32"), reads("float32"), int64_pair, int64, writes("uint32"))
    def encode_hfq(
        values: Array, signs: Array, layout: tuple[int, int], n_codes: int, stored: Array
    ) -> None:
        bits, size = layout
        blocks = stored.reshape(values.shape[0] // size, -1)
        # A sign for each lane, so that the loop runs over neighbours.
        after = signs[size:].repeat(LANES)
        lanes = np.empty(size * LANES, np.float32)
        codes, scratch = np.empty(size * LANES, np.uint8), np.empty(size * LANES, np.uint8)
        for first in range(0, blocks.shape[0], LANES):
            start, target = first * size, blocks[first:][:LANES]
            _load(values[start:][: LANES * size], signs[:size], after, lanes)
            if level_bits:
                write_lloyd(level_bits, lanes, codes, target)
            else:
                write_minmax(bits, lanes, codes, target)
            lanes_to_rows(codes, scratch)
            codes[min(n_codes - start, codes.shape[0]) :] = 0
            write_codes(bits, codes.reshape(LANES, size), target)

    return encode_hfq


@late(reads("uint32"), reads("float32"), int64_pair, int64, writes("float32"))
def _decode_hfq(
    stored: Array, signs: Array, layout: tuple[int, int], has_levels: int, values: Array
) -> None:
    bits, size = layout
    blocks = stored.reshape(values.shape[0] // size, -1)
    lanes, codes = np.empty(size * LANES, np.float32), np.empty((LANES, size), np.uint8)
    for first in range(0, blocks.shape[0], LANES):
        source, target = blocks[first:][:LANES], values[first * size :][: LANES * size]
        read_codes(bits, source, codes)
        if has_levels:
            read_lloyd(bits, codes, source, target.reshape(-1, size))
        else:
            read_minmax(codes, source, target.reshape(-1, size))
        if signs.shape[0] > size:
            # Backwards: the signs change places.
            load_lanes(F32, target.view(np.uint32), signs[size:], lanes)
            rotate(lanes)
            store_lanes(lanes, signs[:size], target)


def encode_blocks(values: Array, code: int) -> Array:
    """The blocks of the values under a quant code: uint8 [blocks, bytes].

    values: float32 [n], finite; not changed. Scales and levels that overflow float16 are
    stored as infinity. The lowest value of a group of zeros is +0; hipfire leaves its sign
    open.
    Raises: ValueError for another code, or if the values are not float32.
    Source: Kaden-Schutt/hipfire at 91e58a5 and 0e5eb9a, run on a CPU.
    """
    raw = flat(values, np.float32, "values")
    if code == _Q8:
        return q8_encode(raw)
    layout = _layout(code)
    size, n_codes = layout.group, raw.size
    if missing := -raw.size % size:
        # Rotations are of zeros, and all that comes out is coded. Else the group's first value
        # again leaves its extremes as they are, and is not coded.
        filling = np.float32(0) if layout.rotated else raw[raw.size // size * size]
        raw = np.append(raw, np.full(missing, filling))
        n_codes += missing if layout.rotated else 0
    blocks = np.empty((raw.size // size, layout.nbytes), np.uint8)
    encode = _encoder(layout.bits if layout.header == "levels" else 0)
    stored = blocks.reshape(-1).view(np.uint32)
    encode(raw.view(np.uint32), _signs(layout), (layout.bits, size), n_codes, stored)
    return blocks


def decode_blocks(blocks: Array, code: int, count: int) -> Array:
    """The float32 values [count] that blocks encode, rotated back.

    blocks, code: as in `encode_blocks`.
    Raises: ValueError for another code, or if the blocks are not those of so many values.
    Source: as of `encode_blocks`; each product, sum and step of the rotation is rounded.
    """
    if code == _Q8:
        return q8_decode(blocks, count)
    layout = _layout(code)
    size, shape = layout.group, (-(-count // layout.group), layout.nbytes)
    if blocks.shape != shape:
        raise ValueError(f"blocks {blocks.shape} of {count} values should be {shape}")
    values = np.empty(shape[0] * size, np.float32)
    stored, has_levels = flat(blocks, np.uint8, "blocks").view(np.uint32), layout.header == "levels"
    _decode_hfq(stored, _signs(layout), (layout.bits, size), int(has_levels), values)
    return values[:count]


class HfqBlocks(NamedTuple):
    """What blocks hold. codes: [groups, size], signed for Q8. numbers: float32, of each header:

    scale and lowest value, the levels in ascending order, or the scale alone.
    """

    codes: Array
    numbers: Array
    rotated: bool
    has_levels: bool


def read_blocks(blocks: Array, code: int) -> HfqBlocks:
    """The headers and codes of blocks, uint8 [blocks, bytes], under a quant code.

    Raises: ValueError for another code.
    """
    numbers = block_header(blocks, code).astype(np.float32)
    if code == _Q8:
        return HfqBlocks(blocks[:, 2:].view(np.int8), numbers, False, False)
    layout = _layout(code)
    packed = blocks[:, layout.nbytes - layout.group * layout.bits // 8 :]
    bits = np.unpackbits(packed, axis=1, bitorder="little").reshape(-1, layout.bits)
    weights = (1 << np.arange(layout.bits)).astype(np.uint8)
    codes = (bits * weights).sum(axis=1, dtype=np.uint8).reshape(len(blocks), layout.group)
    return HfqBlocks(codes, numbers, layout.rotated, layout.header == "levels")


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


@late(reads("uint32"), reads("float32"), writes("float32"))
def _rotate_hfq(values: Array, signs: Array, rotated: Array) -> None:
    size = signs.shape[0] // 2
    after, ones = signs[size:].repeat(LANES), np.ones(size, np.float32)
    lanes = np.empty(size * LANES, np.float32)
    for start in range(0, values.shape[0], LANES * size):
        _load(values[start:][: LANES * size], signs[:size], after, lanes)
        store_lanes(lanes, ones, rotated[start:][: LANES * size])


def rotate_groups(groups: Array) -> Array:
    """Groups [n, 256] as they are coded: rotated, in float32."""
    rotated = np.empty(groups.shape, np.float32)
    raw = flat(groups, np.float32, "groups")
    _rotate_hfq(raw.view(np.uint32), rotation_signs(), rotated.reshape(-1))
    return rotated


def _layout(code: int) -> QuantCode:
    if code not in _CODES:
        raise ValueError(f"quant code {code} is none of {_Q8}, {str([*_CODES])[1:-1]}")
    return _CODES[code]


def _signs(layout: QuantCode) -> Array:
    """The signs before and after the rotation; ones and nothing where there is none."""
    return rotation_signs() if layout.rotated else np.ones(layout.group, np.float32)


def hfq_beyond(values: Array, blocks: Array, code: int, slack: Slack) -> Array:
    """Values that are too far from the codes of HFQ blocks: float32 [n], n up to all of them.

    blocks: uint8 [blocks, bytes]. Of rotated groups, the values after the rotation count.
    """
    held = read_blocks(blocks, code)
    groups = np.zeros(held.codes.shape, np.float32)
    groups.reshape(-1)[: values.size] = values
    size = np.sqrt((groups.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
    if held.rotated:
        groups = rotate_groups(groups)
    # Additions of a rotation, and what was rounded before it, are spread over the group.
    added = slack_of(groups, slack)
    if held.rotated:
        added = added + (size * (_ROTATED + 4 * slack.relative)).astype(np.float32)
    wrong = _beyond_levels if held.has_levels else _beyond_lines
    return wrong(groups, held, added).reshape(-1)[: values.size]


def _beyond_lines(groups: Array, held: HfqBlocks, added: Array) -> Array:
    """Of blocks with a scale and a lowest value: both stored whole; or a cut-off scale."""
    scale, low = held.numbers[:, :1], held.numbers[:, 1:2]
    with np.errstate(invalid="ignore", over="ignore"):
        decoded = held.codes * scale + (low if low.size else 0)
    step = np.abs(scale)
    if low.size:
        # A group of equal values has no step, and 1 is used.
        step = np.where((step == 1) & (held.codes.max(axis=1, keepdims=True) == 0), 0, step)
    else:
        # Cut off, not rounded: twice the unit.
        cut = step * np.float32(2 * UNITS["F16"]) + np.float32(2 * FLOORS["F16"])
        added = added + (np.abs(held.codes.astype(np.float32)) + 1) * cut
    with np.errstate(invalid="ignore"):
        return ~(np.abs(groups - decoded) <= step * np.float32(HALF_REACH) + added)


def _beyond_levels(groups: Array, held: HfqBlocks, added: Array) -> Array:
    """Of blocks with levels: up to a quarter of a gap beyond the middle between two levels.

    All values of a level are wrong if it is farther from their mean than half-way to the next.
    """
    levels, codes = held.numbers, held.codes.astype(np.intp)
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
