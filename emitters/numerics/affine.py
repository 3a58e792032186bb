"""Affine quantization of groups of consecutive values: value = scale * code + bias.

The scale may be negative: code 0 is the extreme of larger magnitude. Codes come from
the float32 scale and bias; what is stored are those rounded to the value type of the source.
Source: mlx 0.32.4 (CPU), `mx.quantize` and `mx.dequantize` with mode "affine".
"""

import numpy as np

from emitters.numerics import Array, new_values
from emitters.numerics.bitpack import pack_codes, unpack, unpack_codes
from emitters.numerics.jit import device, kernel, reads, writes
from emitters.numerics.reach import FLOORS, UNITS, Width, outside, reach_of, slack_of, spread
from emitters.numerics.rounding import extremes, narrow, nearest_code, rounded, to_float32, widen
from policy_dsl.formats import Slack

_LANES = 16  # groups side by side
_SMALLEST_STEP = np.float32(1e-7)
_ZERO, _INFINITY = np.float32(0), np.float32(np.inf)


@device
def _choose_scales(lows: Array, highs: Array, top: np.float32) -> None:
    """Scale and bias of each group in place of its extremes; all float32 [lanes]."""
    for k in range(lows.shape[0]):
        low, high = lows[k], highs[k]
        step = (high - low) / top
        step = _SMALLEST_STEP if step < _SMALLEST_STEP else step
        low_edge = abs(low) > abs(high)
        scale = step if low_edge else -step
        edge = low if low_edge else high
        # True divisions: a reciprocal would not give the same bits.
        zero_code = np.rint(edge / scale)
        reaches = zero_code != _ZERO
        lows[k] = edge / zero_code if reaches else scale
        highs[k] = edge if reaches else _ZERO


@kernel(reads("kind"), writes("uint32"), writes("kind"), writes("kind"))
def _encode_affine(values: Array, packed: Array, scales: Array, biases: Array, kind: int) -> None:
    size = values.shape[0] // max(scales.shape[0], 1)
    bits = packed.shape[0] * 32 // max(values.shape[0], 1)
    top = np.float32((1 << bits) - 1)
    # Rows end where groups end, so the matrix is one run of groups; the steps of one block
    # of them stay in the first-level cache, and only results go to memory.
    wide, codes = np.empty(_LANES * size, np.float32), np.empty(_LANES * size, np.uint8)
    pieces = np.empty(_LANES * size // 8, np.uint64)
    lows, highs = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for first in range(0, scales.shape[0], _LANES):
        # The last block may have fewer groups.
        lanes = min(_LANES, scales.shape[0] - first)
        n = lanes * size
        part = values[first * size : first * size + n]
        for i in range(n):
            wide[i] = widen(kind, part[i])
        for k in range(lanes):
            group = wide[k * size : (k + 1) * size]
            lows[k], highs[k] = extremes(group, (_INFINITY, -_INFINITY))
        _choose_scales(lows[:lanes], highs[:lanes], top)
        for k in range(lanes):
            group, own = wide[k * size : (k + 1) * size], codes[k * size : (k + 1) * size]
            scale, bias = lows[k], highs[k]
            for i in range(size):
                own[i] = nearest_code((group[i] - bias) / scale, top)
            scales[first + k], biases[first + k] = narrow(kind, scale), narrow(kind, bias)
        start = first * size // 32 * bits
        pack_codes(codes[:n], pieces, packed[start : start + n // 32 * bits], bits)


@kernel(reads("uint32"), reads("kind"), reads("kind"), writes("float32"))
def _decode_affine(packed: Array, scales: Array, biases: Array, values: Array, kind: int) -> None:
    size = values.shape[0] // max(scales.shape[0], 1)
    bits = packed.shape[0] * 32 // max(values.shape[0], 1)
    codes, n_words = np.empty(size, np.uint8), size // 32 * bits
    for k in range(scales.shape[0]):
        unpack_codes(packed[k * n_words : (k + 1) * n_words], codes, bits)
        scale, bias = widen(kind, scales[k]), widen(kind, biases[k])
        part = values[k * size : (k + 1) * size]
        for i in range(size):
            part[i] = rounded(kind, rounded(kind, np.float32(codes[i]) * scale) + bias)


def affine_encode(
    values: Array, dtype: str, *, bits: int, group_size: int
) -> tuple[Array, Array, Array]:
    """Packed codes, scales and biases of every group along the last axis.

    values: [rows, in] of value type `dtype` (BF16 as uint16), in % group_size == 0;
    bits in 2, 3, 4, 5, 6, 8; group_size a multiple of 32. packed: uint32 [rows, in*bits/32];
    scales, biases: [rows, in/group_size], stored as the values are. A group holding an
    infinity gets scale NaN; NaN elements get code 0 and are otherwise ignored.
    Raises: ValueError for other widths, or if a group would be split.
    Source: mlx 0.32.4 (CPU), `mx.quantize`.
    """
    rows, columns = values.shape
    _check_geometry(columns, bits, group_size)
    packed = np.empty((rows, columns * bits // 32), np.uint32)
    scales, biases = (new_values((rows, columns // group_size), dtype) for _ in range(2))
    _encode_affine(values, packed, scales, biases, kind=dtype)
    return packed, scales, biases


def affine_decode(
    parts: tuple[Array, Array, Array], dtype: str, *, bits: int, group_size: int
) -> Array:
    """The float32 values [rows, in] that a reader on a CPU sees: each product and sum rounded.

    parts: (packed, scales, biases) as `affine_encode` gives them.
    Raises: ValueError as `affine_encode` does, or if the parts' shapes disagree.
    Source: mlx 0.32.4 (CPU), `mx.dequantize`.
    """
    packed, scales, biases = parts
    rows, columns = scales.shape[0], scales.shape[1] * group_size
    _check_geometry(columns, bits, group_size)
    if packed.shape != (rows, columns * bits // 32) or biases.shape != scales.shape:
        shapes = f"{packed.shape}, {scales.shape} and {biases.shape}"
        raise ValueError(f"shapes {shapes} are not one matrix at {bits} bits, {group_size}")
    values = np.empty((rows, columns), np.float32)
    _decode_affine(packed, scales, biases, values, kind=dtype)
    return values


def _check_geometry(columns: int, bits: int, group_size: int) -> None:
    if bits not in (2, 3, 4, 5, 6, 8):
        raise ValueError(f"affine codes have 2, 3, 4, 5, 6 or 8 bits, not {bits}")
    if group_size <= 0 or group_size % 32 or columns % group_size:
        raise ValueError(f"groups of {group_size} do not divide rows of {columns} values")


def affine_beyond(
    values: Array, parts: tuple[Array, Array, Array], dtype: str, width: Width, slack: Slack
) -> Array:
    """Values [rows, in] that are too far from affine codes; parts, dtype: of `affine_decode`.

    mlx makes one extreme a whole number of steps; the other may be a step beyond the last code.
    """
    bits, size = width
    packed, scales, biases = parts
    codes = unpack(packed, bits).astype(np.float32)
    decoded = affine_decode(parts, dtype, bits=bits, group_size=size)
    step, base = (spread(np.abs(to_float32(part, dtype)), values) for part in (scales, biases))
    unit, floor = np.float32(UNITS[dtype]), np.float32(FLOORS[dtype])
    # The stored scale, the product; the stored bias, the sum.
    lost = (codes + 1) * (2 * unit * step + floor)
    lost += unit * (base + np.abs(decoded)) + 2 * floor
    reach = step * reach_of(codes, bits, (0.5, 1.0))
    return outside(values, decoded, reach + (lost + slack_of(values, slack)))
