"""Eight- and four-bit floats, alone and in groups or blocks that share a scale.

E2M1 magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6. E4M3 has bias 7, no infinity, 448 as its
largest value, and 0x7F and 0xFF as NaN. E8M0 byte x is 2**(x - 127).
Source: OCP Microscaling Formats (MX) Specification v1.0; roundings as mlx 0.32.4 (CPU).

Microscaling: groups of codes with one shared scale byte each.

| mode  | group | code | scale            |
| mxfp4 |    32 | E2M1 | E8M0, rounded up |
| mxfp8 |    32 | E4M3 | E8M0, rounded up |
| nvfp4 |    16 | E2M1 | E4M3, nearest    |

Codes are packed as in `bitpack`. Intermediate results are rounded to the value type of the
source, as mlx computes in it.
Source: mlx 0.32.4 (CPU), `mx.quantize` and `mx.dequantize` with these modes.

FP8: E4M3 matrices with one scale for each block. Three rules differ in what is rounded to
bfloat16 on the way: "f32" nothing; "bf16" the product (mlx, transformers); "bf16_bf16" the
scale and the product (AutoRound).
Source: mlx 0.32.4 (`mx.from_fp8`, mlx-lm's MiniMax sanitize); transformers 5.23
`Fp8Dequantize`; AutoRound 0.16.1.
"""

from functools import cache

import numpy as np

from emitters.numerics import BF16, Array, new_values, rounding
from emitters.numerics.bitpack import pack_codes, unpack_codes
from emitters.numerics.jit import device, int64, kernel, reads, several, writes
from emitters.numerics.reach import FLOORS, UNITS, Width, slack_of
from emitters.numerics.rounding import bits_of, float_of, largest_magnitude, narrow, rounded, widen
from policy_dsl.formats import Slack

_ZERO = np.float32(0)
_E4M3_MAX = np.float32(448)
_E4M3_NORMAL = np.uint32(0x3C800000)  # 2**-6
_UNIT_IS_SUBNORMAL = np.float32(2.0**14)  # its unit in the last place is 2**-9
_SUBNORMAL_BITS = np.uint32(0x46800000)
_SUBNORMAL_STEP = np.float32(2.0**-9)
_NAN_BITS = np.uint32(0x7FC00000)


@device
def _e2m1_code(value: np.float32) -> np.uint8:
    """The code of the nearest value, the smaller magnitude on ties; zero is always code 0."""
    # Counting passed midpoints has no branch, so loops over it become vector code.
    size = abs(value)
    code = np.uint32(size > np.float32(0.25)) + np.uint32(size > np.float32(0.75))
    code += np.uint32(size > np.float32(1.25)) + np.uint32(size > np.float32(1.75))
    code += np.uint32(size > np.float32(2.5)) + np.uint32(size > np.float32(3.5))
    code += np.uint32(size > np.float32(5))
    negative = value < np.float32(0) and code != 0
    return np.uint8(code + np.uint32(8 if negative else 0))


@device
def _e2m1_value(code: np.uint8) -> np.float32:
    """The float32 value of a code 0 .. 15."""
    size = np.uint32(code & 7)
    normal = np.uint32(np.uint32(size << np.uint32(22)) + np.uint32(0x3F000000))
    small = bits_of(np.float32(np.int32(size)) * np.float32(0.5))
    sign = np.uint32(np.uint32(code & 8) << np.uint32(28))
    return float_of(np.uint32((small if size < 2 else normal) | sign))


@device
def _e4m3_code(value: np.float32) -> np.uint8:
    """The code of the nearest value, ties to even; beyond 448 saturates."""
    sign = np.uint32((bits_of(value) >> np.uint32(24)) & np.uint32(0x80))
    size = abs(value)
    # Saturating first keeps the carry of the rounding below the NaN code.
    size = size if size < _E4M3_MAX else _E4M3_MAX
    bits = bits_of(size)
    odd = np.uint32((bits >> np.uint32(20)) & np.uint32(1))
    # 0xC4000000 takes the difference of the exponent biases, 120, off the exponent field.
    normal = np.uint32(np.uint32(bits + odd + np.uint32(0xC407FFFF)) >> np.uint32(20))
    small = np.uint32(bits_of(size + _UNIT_IS_SUBNORMAL) - _SUBNORMAL_BITS)
    return np.uint8(sign | (small if bits < _E4M3_NORMAL else normal))


@device
def _e4m3_value(code: np.uint8) -> np.float32:
    """The float32 value of a code; 0x7F and 0xFF are NaN."""
    size = np.uint32(code & 0x7F)
    normal = np.uint32(np.uint32(size << np.uint32(20)) + np.uint32(0x3C000000))
    small = bits_of(np.float32(np.int32(size)) * _SUBNORMAL_STEP)
    bits = small if size < 8 else normal
    bits = _NAN_BITS if size == 0x7F else bits
    sign = np.uint32(np.uint32(code & 0x80) << np.uint32(24))
    return float_of(np.uint32(bits | sign))


@device
def _e8m0_byte(least: np.float32) -> np.uint8:
    """The byte of the smallest power of two that is not below `least`; 127 (1.0) for zero."""
    # 2**-127, the smallest power there is, replaces smaller ones: mlx lets the byte wrap around
    # there, which turns a group of tiny values into a group of enormous ones.
    bits = bits_of(least)
    byte = np.uint32(bits >> np.uint32(23))
    byte += np.uint32((bits & np.uint32(0x007FFFFF)) != 0)
    byte = np.uint32(0) if bits <= np.uint32(0x00400000) else byte
    return np.uint8(127 if bits == 0 else byte)


@device
def _e8m0_value(byte: np.uint8) -> np.float32:
    """The float32 value of a byte; 255 gives infinity."""
    bits = np.uint32(np.uint32(byte) << np.uint32(23))
    return float_of(np.uint32(0x00400000) if byte == 0 else bits)


FP_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, and values in a group
_RUN = 512  # values coded together; whole groups and whole runs of 32 codes


@kernel(reads("kind"), writes("uint32"), writes("uint8"))
def _encode_fp(values: Array, packed: Array, scales: Array, kind: int, width: Width) -> None:
    bits, size = width
    wide, codes = np.empty(_RUN, np.float32), np.zeros(_RUN, np.uint8)
    pieces = np.empty(_RUN // 8, np.uint64)
    is_nv, top = size == 16, np.float32(448 if bits == 8 else 6)
    for first in range(0, values.shape[0], _RUN):
        part = values[first : first + _RUN]
        for i in range(part.shape[0]):
            wide[i] = widen(kind, part[i])
        for start in range(0, part.shape[0], size):
            group, own = wide[start : start + size], codes[start : start + size]
            least = rounded(kind, largest_magnitude(group) / top)
            byte = _e4m3_code(least) if is_nv else _e8m0_byte(least)
            scale = _e4m3_value(byte) if is_nv else _e8m0_value(byte)
            # A power of two: multiplying by its inverse rounds as the division would.
            inverse = np.float32(1) / scale
            for i in range(size):
                ratio = rounded(kind, group[i] / scale if is_nv else group[i] * inverse)
                code = _e4m3_code(ratio) if bits == 8 else _e2m1_code(ratio)
                own[i] = np.uint8(0) if is_nv and scale == _ZERO else code
            scales[(first + start) // size] = byte
        words = packed[first // 32 * bits :][: _RUN // 32 * bits]
        pack_codes(codes[: words.shape[0] // bits * 32], pieces, words, bits)


@kernel(reads("uint32"), reads("uint8"), writes("float32"))
def _decode_fp(packed: Array, scales: Array, values: Array, bits: int, size: int) -> None:
    codes = np.empty(_RUN, np.uint8)
    for first in range(0, values.shape[0], _RUN):
        unpack_codes(packed[first // 32 * bits :][: _RUN // 32 * bits], codes, bits)
        part = values[first : first + _RUN]
        for start in range(0, part.shape[0], size):
            byte = scales[(first + start) // size]
            scale = _e4m3_value(byte) if size == 16 else _e8m0_value(byte)
            group, own = part[start : start + size], codes[start : start + size]
            for i in range(group.shape[0]):
                value = _e4m3_value(own[i]) if bits == 8 else _e2m1_value(own[i])
                group[i] = value * scale


def fp_encode(values: Array, dtype: str, *, mode: str) -> tuple[Array, Array]:
    """Packed codes and scale bytes of every group along the last axis.

    values: [rows, in] of value type `dtype` (BF16 as uint16), finite, in % group == 0; mode:
    a key of `FP_MODES`. packed: uint32 [rows, in*bits/32]; scales: uint8 [rows, in/group].
    Equal to mlx, but for two places where its arithmetic breaks down: see `_e8m0_byte`; and
    nvfp4 values above 2**32 saturate (mlx finds all codes equally near and takes code 0).
    Raises: ValueError for other modes, or if a group would be split.
    Source: mlx 0.32.4 (CPU), `mx.quantize`.
    """
    bits, size = _width(mode)
    rows, columns = values.shape
    if columns % size:
        raise ValueError(f"{mode} groups of {size} do not divide rows of {columns} values")
    # Packing takes 32 codes at a time; the last group of 16 may leave half of that.
    packed = np.empty(-(-values.size // 32) * bits, np.uint32)
    scales = np.empty((rows, columns // size), np.uint8)
    _encode_fp(values, packed, scales, kind=dtype, width=(bits, size))
    return packed[: values.size * bits // 32].reshape(rows, columns * bits // 32), scales


def fp_decode(packed: Array, scales: Array, *, mode: str) -> Array:
    """The float32 values [rows, in]; exact, also in bfloat16.

    packed, scales: as `fp_encode` gives them.
    Raises: ValueError for other modes, or if the shapes disagree.
    Source: mlx 0.32.4 (CPU), `mx.dequantize`.
    """
    bits, size = _width(mode)
    rows, columns = scales.shape[0], scales.shape[1] * size
    if packed.shape != (rows, columns * bits // 32):
        raise ValueError(f"{packed.shape} and {scales.shape} are not one {mode} matrix")
    values = np.empty((rows, columns), np.float32)
    if missing := -packed.size % bits:
        packed = np.append(packed, np.zeros(missing, packed.dtype))
    _decode_fp(packed, scales, values, bits=bits, size=size)
    return values


def _width(mode: str) -> Width:
    if mode not in FP_MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(FP_MODES)}")
    return FP_MODES[mode]


FP8_RULES = ("f32", "bf16", "bf16_bf16")


@kernel(reads("uint8"), reads("float32"), several(int64, 2), writes("kind"))
def _dequantize_fp8(  # noqa: PLR0913, PLR0917 - kernels take arrays one by one
    codes: Array, scales: Array, geometry: Width, result: Array, kind: int, by_bf16: bool
) -> None:
    columns, width = geometry
    blocks = -(-columns // width)
    for block in range(scales.shape[0]):
        first, start = block // blocks * columns, block % blocks * width
        scale, end = scales[block], first + min(start + width, columns)
        part, target = codes[first + start : end], result[first + start : end]
        for i in range(part.shape[0]):
            value = _e4m3_value(part[i]) * scale
            target[i] = narrow(kind, rounded(BF16, value) if by_bf16 else value)


def fp8_dequantize(  # noqa: PLR0913 - one call is one slice of rows, one grid, one rule
    codes: Array,
    scale_inv: Array,
    *,
    block: tuple[int, int] = (128, 128),
    first_row: int = 0,
    rule: str,
    out_dtype: str,
) -> Array:
    """The weights [rows, in] of these codes, in value type `out_dtype`.

    codes: uint8 [rows, in], rows `first_row` and following of the matrix; scale_inv: float32
    grid of multipliers of the whole matrix, one for each block [out, in], blocks at the edges
    smaller; rule: one of `FP8_RULES`. A bfloat16 result is rounded once from the rule's
    result. NaN codes give NaN; overflow gives infinity.
    Raises: ValueError for another rule or dtype, or if the grid does not cover the rows.
    """
    if rule not in FP8_RULES:
        raise ValueError(f"rule {rule!r} is none of {', '.join(FP8_RULES)}")
    rows, columns = codes.shape
    height, width = block
    end_row = first_row + rows
    if scale_inv.shape[0] < -(-end_row // height) or scale_inv.shape[1] != -(-columns // width):
        grid = f"scales {scale_inv.shape} of blocks {block}"
        raise ValueError(f"{grid} do not cover rows up to {end_row} of {columns}")
    # The scales of each row.
    scales = scale_inv[np.arange(first_row, end_row) // height].astype(np.float32)
    if rule == "bf16_bf16":
        scales = rounding.cast(rounding.cast(scales, "F32", "BF16"), "BF16", "F32")
    result, by_bf16 = new_values((rows, columns), out_dtype), rule != "f32"
    _dequantize_fp8(codes, scales, (columns, width), result, kind=out_dtype, by_bf16=by_bf16)
    return result


def fp_beyond(
    values: Array, parts: tuple[Array, Array], mode: str, dtype: str, slack: Slack
) -> Array:
    """Values [rows, in] that are too far from codes of small floats; parts: as of `fp_decode`.

    dtype: of the arithmetic in which codes were chosen.
    """
    packed, scales = parts
    is_nv, ones = mode == "nvfp4", 0x38383838 if mode == "mxfp8" else 0x22222222
    # The codes' own values under scales of one, and the scales of codes of one.
    codes = fp_decode(packed, _scales_of_one(scales.shape, mode), mode=mode)
    scale = fp_decode(np.full_like(packed, ones), scales, mode=mode)
    grid = _code_values(mode)
    at = np.searchsorted(grid, codes)
    below = (grid[np.maximum(at - 1, 0)] + codes) / 2
    above = (grid[np.minimum(at + 1, len(grid) - 1)] + codes) / 2
    # The last code is reached by rounding; an E4M3 scale may be a 16th too small.
    more = np.float32(1 + 2.0**-4 * 1.1 * is_nv)
    below[at == 0] *= more
    above[at == len(grid) - 1] *= more
    edges = np.sort(np.stack([below * scale, above * scale]), axis=0)
    added = slack_of(values, slack) + 2 * np.float32(UNITS[dtype]) * np.abs(values)
    added += np.abs(codes) * np.float32(FLOORS[dtype])
    if is_nv:
        # So far are scales from numbers smaller than an E4M3 has.
        added += np.abs(codes) * np.float32(2.0**-10) + 6 * np.float32(2.0**-10) * (scale == 0)
    with np.errstate(invalid="ignore"):
        within: Array = (values >= edges[0] - added) & (values <= edges[1] + added)
    return ~within


def _scales_of_one(shape: tuple[int, ...], mode: str) -> Array:
    return np.full(shape, 0x38 if mode == "nvfp4" else 127, np.uint8)


@cache
def _code_values(mode: str) -> Array:
    """float32, ascending: the finite values of all codes."""
    bits, size = FP_MODES[mode]
    every = np.arange(256, dtype=np.uint8).view(np.uint32)[None]
    values = fp_decode(every, _scales_of_one((1, 2048 // bits // size), mode), mode=mode)
    return np.unique(values[np.isfinite(values)])
