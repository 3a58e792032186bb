"""Dense packing of b-bit codes into little-endian uint32 words.

Code i takes bits [i*b, (i+1)*b) of the stream, least significant bit first. Eight codes are
a piece of 8*b bits, and four pieces fill b words, whatever b is; groups are multiples of 32
codes, so no group shares a word with another.
Source: mlx 0.32.4 (CPU), `mx.quantize`; same stream for b = 2, 3, 4, 5, 6, 8.
"""

import numpy as np

from emitters.numerics import Array
from emitters.numerics.jit import device, int64, kernel, reads, writes

_FOURTHS = np.uint64(0x0001000100010001)
_HALVES = np.uint64(0x0000000100000001)
_RUN = 4096  # codes packed at a time


@device
def _mask(n_bits: int) -> np.uint64:
    """The n_bits (1 .. 64) low bits set."""
    return np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - n_bits)


@device
def pack_codes(codes: Array, pieces: Array, words: Array, bits: int) -> None:
    """words = the packed codes.

    codes: uint8 [n], n % 32 == 0, each below 2**bits; pieces: uint64 [n/8], scratch;
    words: uint32 [n*bits/32].
    """
    if bits == 8:
        words[:] = codes.view(np.uint32)
        return
    one, two, four = np.uint64(bits), np.uint64(2 * bits), np.uint64(4 * bits)
    low, pair, half = _FOURTHS * _mask(bits), _HALVES * _mask(2 * bits), _mask(4 * bits)
    eights, width = codes.view(np.uint64), 8 * bits
    for i in range(eights.shape[0]):
        x = eights[i]
        x = (x & low) | ((x >> (np.uint64(8) - one)) & (low << one))
        x = (x & pair) | ((x >> (np.uint64(16) - two)) & (pair << two))
        pieces[i] = (x & half) | ((x >> np.uint64(32)) << four)
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
def unpack_codes(words: Array, codes: Array, bits: int) -> None:
    """codes = the codes of the packed words; shapes as in `pack_codes`."""
    # A piece spans at most two words for every width there is.
    pieces, width = codes.view(np.uint64), 8 * bits
    for j in range(4):
        first = width * j // 32
        second = min(first + 1, bits - 1)
        right = np.uint64(width * j - 32 * first)
        left = np.uint64(32) - right
        for i in range(words.shape[0] // bits):
            lower = np.uint64(words[i * bits + first]) >> right
            upper = np.uint64(words[i * bits + second]) << left
            pieces[4 * i + j] = (lower | upper) & _mask(width)
    one, two, four = np.uint64(bits), np.uint64(2 * bits), np.uint64(4 * bits)
    low, pair, half = _FOURTHS * _mask(bits), _HALVES * _mask(2 * bits), _mask(4 * bits)
    for i in range(pieces.shape[0]):
        x = pieces[i]
        x = (x & half) | (((x >> four) & half) << np.uint64(32))
        x = (x & pair) | (((x >> two) & pair) << np.uint64(16))
        pieces[i] = (x & low) | (((x >> one) & low) << np.uint64(8))


@kernel(reads("uint8"), int64, writes("uint32"))
def _pack(codes: Array, bits: int, packed: Array) -> None:
    pieces = np.empty(_RUN // 8, np.uint64)
    for start in range(0, codes.shape[0], _RUN):
        words = packed[start // 32 * bits :][: _RUN // 32 * bits]
        pack_codes(codes[start : start + _RUN], pieces, words, bits)


@kernel(reads("uint32"), int64, writes("uint8"))
def _unpack(packed: Array, bits: int, codes: Array) -> None:
    for start in range(0, codes.shape[0], _RUN):
        words = packed[start // 32 * bits :][: _RUN // 32 * bits]
        unpack_codes(words, codes[start : start + _RUN], bits)


def pack(codes: Array, bits: int) -> Array:
    """uint32 [rows, n*bits/32]: the packed codes, uint8 [rows, n], n % 32 == 0."""
    packed = np.empty((codes.shape[0], codes.shape[1] // 32 * bits), np.uint32)
    _pack(codes, bits, packed)
    return packed


def unpack(packed: Array, bits: int) -> Array:
    """The inverse of `pack`: uint8 [rows, n]."""
    codes = np.empty((packed.shape[0], packed.shape[1] * 32 // bits), np.uint8)
    _unpack(packed, bits, codes)
    return codes
