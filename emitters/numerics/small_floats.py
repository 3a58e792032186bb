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

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from emitters.numerics.bitpack import pack_codes, unpack_codes
from emitters.numerics.jit import device, factory, int64, int64_pair, kernel, late, reads, writes
from emitters.numerics.reach import FLOORS, UNITS, slack_of, spread
from emitters.numerics.rounding import bits_of, cast, float_of, narrow, rounded, widen
from emitters.numerics.value_types import BF16, Array, flat, new_values, raw_bits, value_type
from policy_dsl.formats import Slack

E2M1_MAX = np.float32(6)
E4M3_MAX = np.float32(448)
_E4M3_NORMAL = np.uint32(0x3C800000)  # 2**-6
_UNIT_IS_SUBNORMAL = np.float32(2.0**14)  # its unit in the last place is 2**-9
_SUBNORMAL_BITS = np.uint32(0x46800000)
_SUBNORMAL_STEP = np.float32(2.0**-9)
_NAN_BITS = np.uint32(0x7FC00000)


@device
def e2m1_code(value: np.float32) -> np.uint8:
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
def e2m1_value(code: np.uint8) -> np.float32:
    """The float32 value of a code 0 .. 15."""
    exponent, half = np.uint32((code >> 1) & 3), np.uint32(code & 1)
    small = np.uint32(half * np.uint32(0x3F000000))
    normal = np.uint32(np.uint32(exponent + np.uint32(126)) << np.uint32(23))
    normal = np.uint32(normal | np.uint32(half << np.uint32(22)))
    sign = np.uint32(np.uint32(code & 8) << np.uint32(28))
    return float_of(np.uint32(sign | (small if exponent == 0 else normal)))


@device
def e4m3_code(value: np.float32) -> np.uint8:
    """The code of the nearest value, ties to even; beyond 448 saturates."""
    sign = np.uint32((bits_of(value) >> np.uint32(24)) & np.uint32(0x80))
    size = abs(value)
    # Saturating first keeps the carry of the rounding below the NaN code.
    size = size if size < E4M3_MAX else E4M3_MAX
    bits = bits_of(size)
    odd = np.uint32((bits >> np.uint32(20)) & np.uint32(1))
    # 0xC4000000 takes the difference of the exponent biases, 120, off the exponent field.
    normal = np.uint32(np.uint32(bits + odd + np.uint32(0xC407FFFF)) >> np.uint32(20))
    small = np.uint32(bits_of(size + _UNIT_IS_SUBNORMAL) - _SUBNORMAL_BITS)
    return np.uint8(sign | (small if bits < _E4M3_NORMAL else normal))


@device
def e4m3_value(code: np.uint8) -> np.float32:
    """The float32 value of a code; 0x7F and 0xFF are NaN."""
    size = np.uint32(code & 0x7F)
    normal = np.uint32(np.uint32(size << np.uint32(20)) + np.uint32(0x3C000000))
    small = bits_of(np.float32(np.int32(size)) * _SUBNORMAL_STEP)
    bits = small if size < 8 else normal
    bits = _NAN_BITS if size == 0x7F else bits
    sign = np.uint32(np.uint32(code & 0x80) << np.uint32(24))
    return float_of(np.uint32(bits | sign))


@device
def e8m0_byte(least: np.float32) -> np.uint8:
    """The byte of the smallest power of two that is not below `least`; 127 (1.0) for zero.

    2**-127, the smallest power there is, replaces smaller ones: mlx lets the byte wrap
    around there, which turns a group of tiny values into a group of enormous ones.
    """
    bits = bits_of(least)
    byte = np.uint32(bits >> np.uint32(23))
    byte += np.uint32((bits & np.uint32(0x007FFFFF)) != 0)
    byte = np.uint32(0) if bits <= np.uint32(0x00400000) else byte
    return np.uint8(127 if bits == 0 else byte)


@device
def e8m0_value(byte: np.uint8) -> np.float32:
    """The float32 value of a byte; 255 gives infinity."""
    bits = np.uint32(np.uint32(byte) << np.uint32(23))
    return float_of(np.uint32(0x00400000) if byte == 0 else bits)


_MXFP4, _MXFP8, _NVFP4 = 0, 1, 2
_BLOCK = 512  # values encoded together; whole groups and whole runs of 32 codes
_ZERO = np.float32(0)
_E2M1 = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


class FpMode(NamedTuple):
    """One mode: its number inside kernels, and its geometry."""

    number: int
    bits: int
    group_size: int


FP_MODES = {
    "mxfp4": FpMode(_MXFP4, 4, 32),
    "mxfp8": FpMode(_MXFP8, 8, 32),
    "nvfp4": FpMode(_NVFP4, 4, 16),
}


@device
def _largest(values: Array) -> np.float32:
    """The largest magnitude of finite float32 [n], compared as integers."""
    largest = np.uint32(0)
    for i in range(values.shape[0]):
        largest = max(largest, np.uint32(bits_of(values[i]) & np.uint32(0x7FFFFFFF)))
    return float_of(largest)


@device
def _write_mx(kind: int, number: int, values: Array, codes: Array) -> np.uint8:
    """The scale byte of a group; codes = its codes. values: float32 [32]."""
    top = E4M3_MAX if number == _MXFP8 else E2M1_MAX
    byte = e8m0_byte(rounded(kind, _largest(values) / top))
    # Exact, being a power of two: multiplying rounds as the division would.
    inverse = np.float32(1) / e8m0_value(byte)
    if number == _MXFP8:
        for i in range(values.shape[0]):
            codes[i] = e4m3_code(rounded(kind, values[i] * inverse))
    else:
        for i in range(values.shape[0]):
            codes[i] = e2m1_code(rounded(kind, values[i] * inverse))
    return byte


@device
def _write_nv(kind: int, values: Array, codes: Array) -> np.uint8:
    """The scale byte of a group [16]; codes = its codes, zeros under a scale of zero."""
    byte = e4m3_code(rounded(kind, _largest(values) / E2M1_MAX))
    scale = e4m3_value(byte)
    for i in range(values.shape[0]):
        code = e2m1_code(rounded(kind, values[i] / scale))
        codes[i] = np.uint8(0) if scale == _ZERO else code
    return byte


@device
def _write_groups(kind: int, number: int, values: Array, codes: Array, scales: Array) -> None:
    """codes, scales = those of the groups of this mode in values; one scale for each group."""
    size = values.shape[0] // scales.shape[0]
    for k in range(scales.shape[0]):
        group, its_codes = values[k * size : (k + 1) * size], codes[k * size : (k + 1) * size]
        if number == _NVFP4:
            scales[k] = _write_nv(kind, group, its_codes)
        else:
            scales[k] = _write_mx(kind, number, group, its_codes)


@device
def _read_groups(number: int, codes: Array, scales: Array, values: Array) -> None:
    """values = what the codes of each group mean under its scale byte."""
    size = values.shape[0] // scales.shape[0]
    for k in range(scales.shape[0]):
        scale = e4m3_value(scales[k]) if number == _NVFP4 else e8m0_value(scales[k])
        group, its_codes = values[k * size : (k + 1) * size], codes[k * size : (k + 1) * size]
        for i in range(size):
            code = its_codes[i]
            value = e4m3_value(code) if number == _MXFP8 else e2m1_value(code)
            group[i] = value * scale


@factory
def _encoder(kind: int, raw: str) -> Callable[..., None]:
    @kernel(reads(raw), int64, writes("uint32"), writes("uint8"))
    def encode_fp(values: Array, number: int, words: Array, scales: Array) -> None:
        size = 16 if number == _NVFP4 else 32
        bits = 8 if number == _MXFP8 else 4
        wide = np.empty(_BLOCK, np.float32)
        codes = np.zeros(_BLOCK, np.uint8)
        pieces = np.empty(_BLOCK // 8, np.uint64)
        packed = np.empty(_BLOCK * bits // 32, np.uint32)
        for start in range(0, values.shape[0], _BLOCK):
            part = values[start : start + _BLOCK]
            n = part.shape[0]
            for i in range(n):
                wide[i] = widen(kind, part[i])
            its_scales = scales[start // size : (start + n) // size]
            _write_groups(kind, number, wide[:n], codes, its_scales)
            # Packing takes 32 codes at a time; the last groups of 16 may leave half of that.
            pack_codes(codes, pieces, packed, bits)
            target = words[start * bits // 32 : (start + n) * bits // 32]
            for i in range(target.shape[0]):
                target[i] = packed[i]

    return encode_fp


@late(reads("uint32"), reads("uint8"), int64, writes("float32"))
def _decode_fp(words: Array, scales: Array, number: int, values: Array) -> None:
    size = 16 if number == _NVFP4 else 32
    bits = 8 if number == _MXFP8 else 4
    codes = np.empty(_BLOCK, np.uint8)
    packed = np.zeros(_BLOCK * bits // 32, np.uint32)
    for start in range(0, values.shape[0], _BLOCK):
        part = values[start : start + _BLOCK]
        source = words[start * bits // 32 : (start + part.shape[0]) * bits // 32]
        for i in range(source.shape[0]):
            packed[i] = source[i]
        unpack_codes(packed, codes, bits)
        its_scales = scales[start // size : (start + part.shape[0]) // size]
        _read_groups(number, codes, its_scales, part)


def fp_encode(values: Array, dtype: str, *, mode: str) -> tuple[Array, Array]:
    """Packed codes and scale bytes of every group along the last axis.

    values: [rows, in] of value type `dtype` (BF16 as uint16), finite, in % group == 0; mode:
    a key of `FP_MODES`. packed: uint32 [rows, in*bits/32]; scales: uint8 [rows, in/group].
    Equal to mlx, but for two places where its arithmetic breaks down: see `e8m0_byte`; and
    nvfp4 values above 2**32 saturate (mlx finds all codes equally near and takes code 0).
    Raises: ValueError for other modes, or if a group would be split.
    Source: mlx 0.32.4 (CPU), `mx.quantize`.
    """
    number, bits, size = _fp_mode(mode)
    rows, columns = values.shape
    if columns % size:
        raise ValueError(f"{mode} groups of {size} do not divide rows of {columns} values")
    kind, _, raw = value_type(dtype)
    packed = np.empty((rows, columns * bits // 32), np.uint32)
    scales = np.empty((rows, columns // size), np.uint8)
    outputs = packed.reshape(-1), scales.reshape(-1)
    _encoder(kind, raw.__name__)(raw_bits(values, dtype), number, *outputs)
    return packed, scales


def fp_decode(packed: Array, scales: Array, *, mode: str) -> Array:
    """The float32 values [rows, in]; exact, also in bfloat16.

    packed, scales: as `fp_encode` gives them.
    Raises: ValueError for other modes, or if the shapes disagree.
    Source: mlx 0.32.4 (CPU), `mx.dequantize`.
    """
    number, bits, size = _fp_mode(mode)
    rows, columns = scales.shape[0], scales.shape[1] * size
    if packed.shape != (rows, columns * bits // 32):
        raise ValueError(f"{packed.shape} and {scales.shape} are not one {mode} matrix")
    values = np.empty((rows, columns), np.float32)
    words, stored = flat(packed, np.uint32, "packed"), flat(scales, np.uint8, "scales")
    _decode_fp(words, stored, number, values.reshape(-1))
    return values


def _fp_mode(mode: str) -> FpMode:
    if mode not in FP_MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(FP_MODES)}")
    return FP_MODES[mode]


FP8_RULES = ("f32", "bf16", "bf16_bf16")


@device
def _write_block(target: tuple[int, bool], scale: np.float32, codes: Array, result: Array) -> None:
    """result = the weights of codes [n] under one scale; target: (kind, by way of bfloat16)."""
    kind, by_bf16 = target
    for i in range(codes.shape[0]):
        value = e4m3_value(codes[i]) * scale
        result[i] = narrow(kind, rounded(BF16, value) if by_bf16 else value)


@factory
def _dequantizer(kind: int, raw: str, by_bf16: bool) -> Callable[..., None]:
    @kernel(reads("uint8"), reads("float32"), int64_pair, writes(raw))
    def dequantize_band(
        codes: Array, scales: Array, geometry: tuple[int, int], result: Array
    ) -> None:
        columns, width = geometry
        for start in range(0, codes.shape[0], columns):
            for first in range(0, columns, width):
                begin, end = start + first, start + min(first + width, columns)
                part, target = codes[begin:end], result[begin:end]
                _write_block((kind, by_bf16), scales[first // width], part, target)

    return dequantize_band


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
    end_band = -(-(first_row + rows) // height)
    if scale_inv.shape[0] < end_band or scale_inv.shape[1] != -(-columns // width):
        grid = f"scales {scale_inv.shape} of blocks {block}"
        raise ValueError(f"{grid} do not cover rows up to {first_row + rows} of {columns}")
    scales = np.require(scale_inv, np.float32, ["C", "ALIGNED"])
    if rule == "bf16_bf16":
        scales = cast(cast(scales, "F32", "BF16"), "BF16", "F32")
    kind, _, raw = value_type(out_dtype)
    result = new_values((rows, columns), out_dtype)
    dequantize = _dequantizer(kind, raw.__name__, rule != "f32")
    if height == 1 and columns % width == 0:
        # Rows with scales of their own are one long row of blocks.
        part, target = flat(codes, np.uint8, "codes"), raw_bits(result, out_dtype)
        own = scales[first_row : first_row + rows].reshape(-1)
        dequantize(part, own, (max(1, rows * columns), width), target)
        return result
    # One call for each row of blocks: inside it, every row has the same scales.
    for band in range(first_row // height, end_band):
        band_rows = slice(max(band * height - first_row, 0), (band + 1) * height - first_row)
        part = flat(codes[band_rows], np.uint8, "codes")
        target = raw_bits(result[band_rows], out_dtype)
        dequantize(part, scales[band], (columns, width), target)
    return result


def fp_beyond(
    values: Array, parts: tuple[Array, Array], mode: str, dtype: str, slack: Slack
) -> Array:
    """Values that are too far from codes of small floats: float32 [rows, in].

    parts: as of `fp_decode`. dtype: of the arithmetic in which codes were chosen.
    """
    packed, scales = parts
    # Scales of one: what comes out are the codes' own values.
    one = np.full(scales.shape, 0x38 if mode == "nvfp4" else 127, np.uint8)
    codes = fp_decode(packed, one, mode=mode)
    e4m3 = _e4m3_values()
    grid = np.unique(e4m3[~np.isnan(e4m3)]) if mode == "mxfp8" else _E2M1
    at = np.searchsorted(grid, codes)
    below = (grid[np.maximum(at - 1, 0)] + codes) / 2
    above = (grid[np.minimum(at + 1, len(grid) - 1)] + codes) / 2
    # The last code is reached by rounding; an E4M3 scale may be a 16th too small.
    more = 2.0**-4 * 1.1 if mode == "nvfp4" else 0.0
    below[at == 0] *= np.float32(1 + more)
    above[at == len(grid) - 1] *= np.float32(1 + more)
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)
    scale = spread(e4m3[scales] if mode == "nvfp4" else powers, values.shape)
    edges = np.sort(np.stack([below * scale, above * scale]), axis=0)
    added = slack_of(values, slack) + 2 * np.float32(UNITS[dtype]) * np.abs(values)
    added += np.abs(codes) * np.float32(FLOORS[dtype])
    if mode == "nvfp4":
        # So far are scales from numbers smaller than an E4M3 has.
        added += np.abs(codes) * np.float32(2.0**-10) + 6 * np.float32(2.0**-10) * (scale == 0)
    with np.errstate(invalid="ignore"):
        within: Array = (values >= edges[0] - added) & (values <= edges[1] + added)
    return ~within


@cache
def _e4m3_values() -> Array:
    """float32 [256]: the values of all E4M3 bytes."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, -1).view(np.uint32)
    values: Array = fp_decode(codes, np.full((1, 8), 127, np.uint8), mode="mxfp8")[0]
    return values
