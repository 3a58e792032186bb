"""HFQ blocks: groups of consecutive values, each coded as a header and packed codes.

A header is a scale and the lowest value or, of Q8, a scale alone (`hfq_blocks`), or a table of
levels (`hfq_lloyd`). Groups may be rotated before they are coded. They know of no rows: only
the last group of all values can be short, and it is stored as a whole block.
Source: Kaden-Schutt/hipfire at 91e58a5 (0.1.8-alpha.2) and 0e5eb9a, crates/hipfire-quantize.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from emitters.numerics.hadamard import LANES, load_lanes, rotate, store_lanes
from emitters.numerics.hfq_blocks import (
    HEADER_WORDS,
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
from emitters.numerics.jit import device, factory, int64, int64_pair, kernel, reads, writes
from emitters.numerics.value_types import F32, Array, flat

_Q8 = 3


class _Layout(NamedTuple):
    """What a block holds: codes of so many bits, for so many values, and their kind."""

    bits: int
    size: int
    rotated: bool = False
    has_levels: bool = False

    @property
    def words(self) -> int:
        """Words of 32 bits: those of the header, and of the codes."""
        header = 2**self.bits // 2 if self.has_levels else HEADER_WORDS
        return header + self.size * self.bits // 32


# By quant code.
_LAYOUTS: Mapping[int, _Layout] = MappingProxyType(
    {
        6: _Layout(4, 256),
        7: _Layout(4, 128),
        8: _Layout(6, 256),
        9: _Layout(2, 256),
        10: _Layout(2, 128),
        11: _Layout(3, 256),
        12: _Layout(3, 128),
        13: _Layout(4, 256, rotated=True),
        15: _Layout(6, 256, rotated=True),
        17: _Layout(3, 256, rotated=True),
        18: _Layout(2, 256, rotated=True),
        19: _Layout(2, 256, rotated=True, has_levels=True),
        20: _Layout(3, 256, rotated=True, has_levels=True),
        30: _Layout(4, 256, rotated=True, has_levels=True),
    }
)


@device
def _load(values: Array, before: Array, after: Array, lanes: Array) -> None:
    """lanes = up to 16 groups of values, rotated if there are signs for after it.

    values: bits of float32 [groups * size]; before: float32 [size]; after: float32 [size, 16]
    or empty; lanes: float32 [size, 16]; all flat.
    """
    load_lanes(F32, values, before, lanes)
    if after.shape[0]:
        rotate(lanes)
        for i in range(lanes.shape[0]):
            lanes[i] *= after[i]


@factory
def _encoder(level_bits: int) -> Callable[..., None]:
    """The kernel that encodes whole groups.

    level_bits: the width of codes that stand for levels, for which loops are unrolled; 0 for
    codes of equal steps.
    """

    @kernel(reads("uint32"), reads("float32"), int64_pair, int64, writes("uint32"))
    def encode_hfq(
        values: Array, signs: Array, layout: tuple[int, int], n_codes: int, stored: Array
    ) -> None:
        bits, size = layout
        blocks = stored.reshape(values.shape[0] // size, -1)
        # A sign for each lane: long loops over neighbours are what becomes vector code.
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


@factory
def _decoder() -> Callable[..., None]:
    """The kernel that decodes blocks to whole groups."""

    @kernel(reads("uint32"), reads("float32"), int64_pair, int64, writes("float32"))
    def decode_hfq(
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

    return decode_hfq


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
    size, n_codes = layout.size, raw.size
    if missing := -raw.size % size:
        # Rotations are of zeros, and all that comes out is coded. Else the group's first value
        # again leaves its extremes as they are, and is not coded.
        filling = np.float32(0) if layout.rotated else raw[raw.size // size * size]
        raw = np.append(raw, np.full(missing, filling))
        n_codes += missing if layout.rotated else 0
    blocks = np.empty((raw.size // size, 4 * layout.words), np.uint8)
    encode = _encoder(layout.bits if layout.has_levels else 0)
    stored = blocks.reshape(-1).view(np.uint32)
    encode(raw.view(np.uint32), _signs(layout), layout[:2], n_codes, stored)
    return blocks


def decode_blocks(blocks: Array, code: int, count: int) -> Array:
    """The float32 values [count] that blocks stand for, rotated back.

    blocks, code: as in `encode_blocks`.
    Raises: ValueError for another code, or if the blocks are not those of so many values.
    Source: as of `encode_blocks`; each product, sum and step of the rotation is rounded.
    """
    if code == _Q8:
        return q8_decode(blocks, count)
    layout = _layout(code)
    size, shape = layout.size, (-(-count // layout.size), 4 * layout.words)
    if blocks.shape != shape:
        raise ValueError(f"blocks {blocks.shape} of {count} values should be {shape}")
    values = np.empty(shape[0] * size, np.float32)
    stored = flat(blocks, np.uint8, "blocks").view(np.uint32)
    _decoder()(stored, _signs(layout), layout[:2], int(layout.has_levels), values)
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
    if code == _Q8:
        scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
        return HfqBlocks(blocks[:, 2:].view(np.int8), scales, False, False)
    layout = _layout(code)
    split = 4 * layout.words - layout.size * layout.bits // 8
    header, packed = np.ascontiguousarray(blocks[:, :split]), blocks[:, split:]
    stored = np.float16 if layout.has_levels else np.float32
    bits = np.unpackbits(packed, axis=1, bitorder="little").reshape(-1, layout.bits)
    weights = (1 << np.arange(layout.bits)).astype(np.uint8)
    codes = (bits * weights).sum(axis=1, dtype=np.uint8).reshape(len(blocks), layout.size)
    return HfqBlocks(
        codes, header.view(stored).astype(np.float32), layout.rotated, layout.has_levels
    )


@factory
def _rotator() -> Callable[..., None]:
    """The kernel that rotates whole groups."""

    @kernel(reads("uint32"), reads("float32"), writes("float32"))
    def rotate_hfq(values: Array, signs: Array, rotated: Array) -> None:
        size = signs.shape[0] // 2
        after, ones = signs[size:].repeat(LANES), np.ones(size, np.float32)
        lanes = np.empty(size * LANES, np.float32)
        for start in range(0, values.shape[0], LANES * size):
            _load(values[start:][: LANES * size], signs[:size], after, lanes)
            store_lanes(lanes, ones, rotated[start:][: LANES * size])

    return rotate_hfq


def rotate_groups(groups: Array) -> Array:
    """Groups [n, 256] as they are coded: rotated, in float32."""
    rotated = np.empty(groups.shape, np.float32)
    raw = flat(groups, np.float32, "groups")
    _rotator()(raw.view(np.uint32), rotation_signs(), rotated.reshape(-1))
    return rotated


def _layout(code: int) -> _Layout:
    if code not in _LAYOUTS:
        raise ValueError(f"quant code {code} is none of {_Q8}, {str([*_LAYOUTS])[1:-1]}")
    return _LAYOUTS[code]


def _signs(layout: _Layout) -> Array:
    """The signs before and after the rotation; ones and nothing where there is none."""
    return rotation_signs() if layout.rotated else np.ones(layout.size, np.float32)


def minmax_header(blocks: Array) -> Array:
    """float32 [blocks, 2]: scale and smallest value. blocks: uint8 [blocks, bytes]."""
    return np.ascontiguousarray(blocks[:, :8]).view(np.float32)


def half_header(blocks: Array, count: int) -> Array:
    """float16 [blocks, count]: a scale, or levels. blocks: uint8 [blocks, bytes]."""
    return np.ascontiguousarray(blocks[:, : 2 * count]).view(np.float16)


def first_bad_minmax(header: Array) -> int:
    """The first block whose scale is not above 0, or has a number that is not finite; or -1."""
    # A NaN that signals would warn; it is not finite.
    with np.errstate(invalid="ignore"):
        return _first(np.all(np.isfinite(header), axis=1) & (header[:, 0] > 0))


def first_bad_scale(header: Array) -> int:
    """The first block whose scale is below 0 or not finite, or -1."""
    scale = header[:, 0]
    with np.errstate(invalid="ignore"):
        return _first(np.isfinite(scale) & (scale >= 0))


def first_bad_levels(header: Array) -> int:
    """The first block whose levels do not ascend or are not all finite, or -1."""
    with np.errstate(invalid="ignore"):
        ascending = np.all(header[:, 1:] >= header[:, :-1], axis=1)
        return _first(np.all(np.isfinite(header), axis=1) & ascending)


def _first(good: Array) -> int:
    """The index of the first False, or -1."""
    return -1 if good.all() else int(np.argmin(good))
