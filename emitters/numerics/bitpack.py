"""Dense packing of b-bit codes into little-endian uint32 words, for use inside kernels.

Code i takes bits [i*b, (i+1)*b) of the stream, least significant bit first. Eight codes are
a piece of 8*b bits, and four pieces fill b words, whatever b is; groups are multiples of 32
codes, so no group shares a word with another.
Source: mlx 0.32.4 (CPU), `mx.quantize`; same stream for b = 2, 3, 4, 5, 6, 8.
"""

from __future__ import annotations

import numpy as np

from emitters.numerics.jit import device
from emitters.numerics.value_types import Array

_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_FOURTHS = np.uint64(0x0001000100010001)
_HALVES = np.uint64(0x0000000100000001)


@device
def field_mask(n_bits: int) -> np.uint64:
    """The n_bits (1 .. 64) low bits set."""
    return _ALL >> np.uint64(64 - n_bits)


@device
def _fold(codes: Array, pieces: Array, bits: int) -> None:
    """pieces[i] = the 8 codes of codes[i] (uint64, one code a byte) side by side, 8*bits wide."""
    one, two = np.uint64(bits), np.uint64(2 * bits)
    low, pair = _FOURTHS * field_mask(bits), _HALVES * field_mask(2 * bits)
    half, four = field_mask(4 * bits), np.uint64(4 * bits)
    for i in range(codes.shape[0]):
        x = codes[i]
        x = (x & low) | ((x >> (np.uint64(8) - one)) & (low << one))
        x = (x & pair) | ((x >> (np.uint64(16) - two)) & (pair << two))
        pieces[i] = (x & half) | ((x >> np.uint64(32)) << four)


@device
def pack_codes(codes: Array, pieces: Array, words: Array, bits: int) -> None:
    """words = the packed codes.

    codes: uint8 [n], n % 32 == 0, each below 2**bits; pieces: uint64 [n/8], scratch;
    words: uint32 [n*bits/32].
    """
    if bits == 8:
        whole = codes.view(np.uint32)
        for i in range(words.shape[0]):
            words[i] = whole[i]
        return
    _fold(codes.view(np.uint64), pieces, bits)
    width = 8 * bits
    # A word spans at most two pieces; with j outside, the inner loop's shifts do not change.
    for j in range(bits):
        first = 32 * j // width
        second = min(first + 1, 3)
        right = np.uint64(32 * j - first * width)
        left = np.uint64(width) - right
        for i in range(words.shape[0] // bits):
            joined = (pieces[4 * i + first] >> right) | (pieces[4 * i + second] << left)
            words[i * bits + j] = np.uint32(joined)


@device
def _spread(pieces: Array, bits: int) -> None:
    """The inverse of `_fold`, in place: one code a byte."""
    one, two, four = np.uint64(bits), np.uint64(2 * bits), np.uint64(4 * bits)
    low, pair = _FOURTHS * field_mask(bits), _HALVES * field_mask(2 * bits)
    half = field_mask(4 * bits)
    for i in range(pieces.shape[0]):
        x = pieces[i]
        x = (x & half) | (((x >> four) & half) << np.uint64(32))
        x = (x & pair) | (((x >> two) & pair) << np.uint64(16))
        pieces[i] = (x & low) | (((x >> one) & low) << np.uint64(8))


@device
def unpack_codes(words: Array, codes: Array, bits: int) -> None:
    """codes = the codes of the packed words; shapes as in `pack_codes`."""
    # A piece spans at most two words for every width there is.
    pieces = codes.view(np.uint64)
    width = 8 * bits
    mask = field_mask(width)
    for j in range(4):
        first = width * j // 32
        second = min(first + 1, bits - 1)
        right = np.uint64(width * j - 32 * first)
        left = np.uint64(32) - right
        for i in range(words.shape[0] // bits):
            low = np.uint64(words[i * bits + first]) >> right
            high = np.uint64(words[i * bits + second]) << left
            pieces[4 * i + j] = (low | high) & mask
    _spread(pieces, bits)
