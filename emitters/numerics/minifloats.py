"""Eight- and four-bit floats inside kernels: E2M1, E4M3 (the finite kind) and E8M0.

E2M1 magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6. E4M3 has bias 7, no infinity, 448 as its
largest value, and 0x7F and 0xFF as NaN. E8M0 byte x is 2**(x - 127).
Source: OCP Microscaling Formats (MX) Specification v1.0; roundings as mlx 0.32.4 (CPU).
"""

from __future__ import annotations

import numpy as np

from emitters.numerics.jit import device
from emitters.numerics.scalars import bits_of, float_of

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

    2**-127, the smallest power there is, stands in for smaller ones: mlx lets the byte wrap
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
