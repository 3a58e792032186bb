"""MXTQ: rows rotated, divided by their norm, and coded by the nearest of 2**bits centroids.

A row is stored as its codes and its norm; the signs of the rotation and the centroids follow
from its length (`mxtq_tables`). Words of 32 bits hold 32 // bits codes, the first one lowest;
no code is in two words, and each row starts a new word.
Source: jang 2.5.50, `jang_tools.turboquant.linear.tq_quantize_weight`; where rows do not fill
whole words, `jang_tools.convert_zaya_common.tq_quantize_weight_rowwise`.
"""

from math import sqrt

import numpy as np

from emitters.numerics import F16, Array
from emitters.numerics.hadamard import LANES, load_lanes, rotate, rotate_rows, store_lanes
from emitters.numerics.jit import device, float32, kernel, reads, several, writes
from emitters.numerics.mxtq_tables import codebook, signs
from emitters.numerics.reach import FLOORS, UNITS, outside
from emitters.numerics.rounding import narrow, widen
from policy_dsl.formats import Slack

_STRETCH = 160  # columns coded at a time: whole words at every width
_RUN = 8  # squares added before the sums go back to memory
_LIMITS = 15  # borders between the codes of 4 bits
_SMALLEST_DIVISOR = np.float32(1e-10)
# Of the root mean square of what is rotated: errors of float32 additions, in any order.
_ROTATED = 2.0**-16
_LANES = np.uint64(LANES)
_ZERO, _ONE, _TWO, _THREE = np.uint32(0), np.uint32(1), np.uint32(2), np.uint32(3)
_FOUR, _EIGHT, _TWELVE = np.uint32(4), np.uint32(8), np.uint32(12)


@device
def _norms(lanes: Array, norms: Array) -> None:
    """norms [16] = the Euclidean norm of each lane [n, 16], squares added one after the other."""
    norms[:] = 0
    for start in range(0, lanes.shape[0], _RUN * LANES):
        part = lanes[start : start + _RUN * LANES]
        for k in range(LANES):
            total = norms[k]
            for j in range(_RUN):
                total += part[j * LANES + k] * part[j * LANES + k]
            norms[k] = total
    for k in range(LANES):
        norms[k] = np.sqrt(norms[k])


@device
def _code(bits: int, value: np.float32, limits: tuple[np.float32, ...]) -> np.uint32:
    """How many of 15 ascending limits are below the value, by two digits of base 4; of NaN none."""
    a, b, c, digit = limits[0], limits[1], limits[2], _ZERO
    if bits > 2:
        if value > limits[3]:
            a, b, c, digit = limits[4], limits[5], limits[6], _FOUR
        if value > limits[7]:
            a, b, c, digit = limits[8], limits[9], limits[10], _EIGHT
        if value > limits[11]:
            a, b, c, digit = limits[12], limits[13], limits[14], _TWELVE
    count = _ONE if value > a else _ZERO
    count = _TWO if value > b else count
    return np.uint32(digit + (_THREE if value > c else count))


@device
def _write_codes(
    bits: int, lanes: Array, divisors: Array, limits: tuple[np.float32, ...], codes: Array
) -> None:
    """codes = those of each quotient, and zeros, which fill up the last word of a row."""
    for i in range(lanes.shape[0]):
        codes[i] = _code(bits, lanes[i] / divisors[i], limits)
    codes[lanes.shape[0] :] = 0


@device
def _write_words(bits: int, codes: Array, words: Array, row_words: int) -> None:
    """words = the packed codes [columns of n words, 16]; codes are destroyed."""
    size = 32 // bits * LANES
    n = codes.shape[0] // size
    for j in range(n):
        # The first 16 codes become the words.
        for i in range(np.uint64(j * size), np.uint64(j * size + LANES)):
            word = codes[i]
            for m in range(1, 32 // bits):
                word |= np.uint32(codes[i + np.uint64(m) * _LANES] << np.uint32(m * bits))
            codes[i] = word
    for k in range(-(-words.shape[0] // row_words)):
        row = words[k * row_words :]
        for j in range(n):
            row[j] = codes[j * size + k]


@kernel(reads("kind"), reads("float32"), several(float32, 15), writes("uint32"), writes("F16"))
def _encode_mxtq(  # noqa: PLR0913, PLR0917 - kernels take arrays one by one
    values: Array,
    signs: Array,
    limits: tuple[np.float32, ...],
    packed: Array,
    norms: Array,
    kind: int,
    bits: int,
) -> None:
    columns, per_word = signs.shape[0], 32 // bits
    row_words = -(-columns // per_word)
    lanes = np.zeros(-(-columns // _RUN) * _RUN * LANES, np.float32)
    lane_norms, divisors = np.empty(LANES, np.float32), np.empty(_STRETCH * LANES, np.float32)
    codes = np.empty(_STRETCH * LANES, np.uint32)
    for first in range(0, norms.shape[0], LANES):
        end = min(first + LANES, norms.shape[0])
        load_lanes(kind, values[first * columns : end * columns], signs, lanes)
        rotate(lanes[: columns * LANES])
        _norms(lanes, lane_norms)
        for k in range(first, end):
            norms[k] = narrow(F16, lane_norms[k - first])
        for k in range(LANES):
            divisors[k::LANES] = max(lane_norms[k], _SMALLEST_DIVISOR)
        for start in range(0, columns, _STRETCH):
            stretch = lanes[start * LANES : min(start + _STRETCH, columns) * LANES]
            _write_codes(bits, stretch, divisors, limits, codes)
            used = codes[: -(-stretch.shape[0] // (per_word * LANES)) * per_word * LANES]
            begin = first * row_words + start // per_word
            _write_words(bits, used, packed[begin : end * row_words], row_words)


@device
def _unpack(bits: int, words: Array, centroids: Array, scales: Array, lanes: Array) -> None:
    """lanes [32 // bits, 16] = centroids of the codes in a word of each lane, times its scale."""
    mask = np.uint32((1 << bits) - 1)
    for j in range(32 // bits):
        for k in range(LANES):
            code = np.uint32(words[k] >> np.uint32(j * bits)) & mask
            lanes[j * LANES + k] = centroids[code] * scales[k]


@kernel(reads("uint32"), reads("F16"), reads("float32"), reads("float32"), writes("float32"))
def _decode_mxtq(  # noqa: PLR0913, PLR0917 - kernels take arrays one by one
    packed: Array, norms: Array, signs: Array, centroids: Array, values: Array, bits: int
) -> None:
    columns, size = signs.shape[0], 32 // bits * LANES
    row_words = -(-columns * LANES // size)
    lanes = np.empty(row_words * size, np.float32)
    # Lanes without a row stay zero.
    words, scales = np.zeros(LANES, np.uint32), np.zeros(LANES, np.float32)
    for first in range(0, norms.shape[0], LANES):
        end = min(first + LANES, norms.shape[0])
        for k in range(first, end):
            scales[k - first] = widen(F16, norms[k])
        for j in range(row_words):
            words[: end - first] = packed[first * row_words + j : end * row_words : row_words]
            _unpack(bits, words, centroids, scales, lanes[j * size : (j + 1) * size])
        rotate(lanes[: columns * LANES])
        store_lanes(lanes, signs, values[first * columns : end * columns])


def mxtq_encode(values: Array, dtype: str, *, bits: int, seed: int = 42) -> tuple[Array, Array]:
    """Packed codes and norms of every row.

    values: [rows, in] of value type `dtype` (BF16 as uint16), in >= 4; bits: 1 to 4; seed: of
    the signs. packed: uint32 [rows, ceil(in / (32 // bits))]; norms: float16 [rows]. Norms
    from 65520 on are stored as infinity. A zero row, or one whose squares overflow, gets the
    lower of the two middle codes throughout; a NaN makes a row's codes 0 and its norm NaN.
    Raises: ValueError for other widths or value types, or for shorter rows.
    Source: jang 2.5.50 on mlx 0.32.4 (CPU, x86-64), `tq_quantize_weight`.
    """
    rows, columns = values.shape
    centroids = codebook(columns, bits)
    limits = ((centroids[1:] + centroids[:-1]) / np.float32(2)).tolist()
    limits += [np.inf] * (_LIMITS - len(limits))
    packed = np.empty((rows, -(-columns // (32 // bits))), np.uint32)
    norms = np.empty(rows, np.float16)
    _encode_mxtq(values, signs(columns, seed), tuple(limits), packed, norms, kind=dtype, bits=bits)
    return packed, norms


def mxtq_decode(packed: Array, norms: Array, *, columns: int, bits: int, seed: int = 42) -> Array:
    """The float32 values [rows, columns]: centroids times norm, rotated back.

    packed, norms: as `mxtq_encode` gives them, with the same bits and seed.
    Raises: ValueError as `mxtq_encode` does, or if the parts' shapes disagree.
    Source: jang 2.5.50 on mlx 0.32.4 (CPU), `hadamard_inverse` of the centroids times norms.
    """
    centroids = codebook(columns, bits)
    if norms.ndim != 1 or packed.shape != (norms.shape[0], -(-columns // (32 // bits))):
        shapes = f"{packed.shape} and {norms.shape}"
        raise ValueError(f"shapes {shapes} are not {columns} columns at {bits} bits")
    values = np.empty((norms.shape[0], columns), np.float32)
    _decode_mxtq(packed, norms, signs(columns, seed), centroids, values, bits=bits)
    return values


def mxtq_beyond(values: Array, parts: tuple[Array, Array], *, bits: int, slack: Slack) -> Array:
    """Values [rows, in] of MXTQ rows with another code than the nearest.

    parts: packed codes and norms. All of a row is wrong if its norm is not that of the values.
    """
    packed, norms = parts
    columns = values.shape[1]
    wanted_packed, wanted_norms = mxtq_encode(values, "F32", bits=bits)
    codes = _codes(packed, columns, bits)
    wrong: Array = codes != _codes(wanted_packed, columns, bits)
    norm, wanted = norms.astype(np.float32), wanted_norms.astype(np.float32)
    # One unit in the last place: tools add up the squares in several orders.
    apart = wanted * (2 * UNITS["F16"] + slack.relative) + 2 * FLOORS["F16"]
    rows = wrong.any(axis=1)
    rotated = np.empty(values[rows].shape, np.float32)
    rotate_rows(values[rows], signs(columns), np.ones(columns, np.float32), rotated)
    line = rotated.astype(np.float64)
    line /= np.maximum(np.sqrt((line**2).sum(axis=1, keepdims=True)), 1e-10)
    centroids = codebook(columns, bits).astype(np.float64)
    limits = np.concatenate([[-np.inf], (centroids[1:] + centroids[:-1]) / 2, [np.inf]])
    # Not even almost in the cells of their codes.
    near, own = (_ROTATED + 8 * slack.relative) / sqrt(columns), codes[rows]
    wrong[rows] &= (line < limits[own] - near) | (line > limits[own + 1] + near)
    wrong[outside(wanted, norm, apart)] = True
    return wrong


def _codes(packed: Array, columns: int, bits: int) -> Array:
    """uint8 [rows, columns]: the codes in words of 32 // bits each."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (packed[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    rows: Array = codes.astype(np.uint8).reshape(len(packed), -1)
    return rows[:, :columns]
