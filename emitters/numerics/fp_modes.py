"""Microscaling quantization: small floats with one shared scale byte for each group.

| mode  | group | code | scale            |
| mxfp4 |    32 | E2M1 | E8M0, rounded up |
| mxfp8 |    32 | E4M3 | E8M0, rounded up |
| nvfp4 |    16 | E2M1 | E4M3, nearest    |

Codes are packed as in `bitpack`. Intermediate results are rounded to the value type of the
source, as mlx computes in it.
Source: mlx 0.32.4 (CPU), `mx.quantize` and `mx.dequantize` with these modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from emitters.numerics.bitpack import pack_codes, unpack_codes
from emitters.numerics.jit import device, factory, int64, kernel, reads, writes
from emitters.numerics.minifloats import (
    E2M1_MAX,
    E4M3_MAX,
    e2m1_code,
    e2m1_value,
    e4m3_code,
    e4m3_value,
    e8m0_byte,
    e8m0_value,
)
from emitters.numerics.scalars import bits_of, float_of, rounded, widen
from emitters.numerics.value_types import Array, flat, raw_bits, value_type

_MXFP4, _MXFP8, _NVFP4 = 0, 1, 2
_BLOCK = 512  # values encoded together; whole groups and whole runs of 32 codes
_ZERO = np.float32(0)


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
    """The scale byte of a group; codes = its codes. values: float32 [16].

    A group too small for any scale but zero gets all codes zero.
    """
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
    """The kernel that encodes a flat array of groups of one value type."""

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


@factory
def _decoder() -> Callable[..., None]:
    """The kernel that decodes a flat array of groups."""

    @kernel(reads("uint32"), reads("uint8"), int64, writes("float32"))
    def decode_fp(words: Array, scales: Array, number: int, values: Array) -> None:
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

    return decode_fp


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
    _decoder()(words, stored, number, values.reshape(-1))
    return values


def _fp_mode(mode: str) -> FpMode:
    """The mode of this name. Raises: ValueError for any other name."""
    if mode not in FP_MODES:
        raise ValueError(f"mode {mode!r} is none of {', '.join(FP_MODES)}")
    return FP_MODES[mode]
