"""What the kinds of HFQ blocks share: signs of the rotation, and codes from lanes to blocks.

Lanes are as in `hadamard`. A group is rotated by signs, the transform of `hadamard` and other
signs; the inverse has the signs exchanged.
Source: Kaden-Schutt/hipfire at 91e58a5 (0.1.8-alpha.2), crates/hipfire-quantize.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from emitters.numerics.bitpack import pack_codes, unpack_codes
from emitters.numerics.jit import device
from emitters.numerics.value_types import Array

_ROTATED_SIZE = 256
_FIRST_SEED, _LAST_SEED = 42, 1042
_ZERO = np.float32(0)


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
