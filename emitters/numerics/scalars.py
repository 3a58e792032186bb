"""Single numbers inside kernels: widening to float32 and rounding to 16 bits.

Branch-free on integers: no table, no library call.
"""

from __future__ import annotations

import numpy as np

from emitters.numerics.jit import device
from emitters.numerics.value_types import BF16, F16

_SIGN = np.uint32(0x80000000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_TWO_TO_MINUS_24 = np.float32(2.0**-24)
_HALF = np.float32(0.5)
_HALF_BITS = np.uint32(0x3F000000)
_HALF_OVERFLOW = np.uint32(0x477FF000)  # 65520, the first magnitude that rounds to infinity
_HALF_NORMAL = np.uint32(0x38800000)  # 2**-14


@device
def float_of(bits: np.uint32) -> np.float32:
    """The float32 with these bits."""
    return np.uint32(bits).view(np.float32)


@device
def bits_of(value: np.float32) -> np.uint32:
    """The bits of a float32."""
    return np.float32(value).view(np.uint32)


@device
def order_of(value: np.float32) -> np.int32:
    """An integer that compares as the float does; NaN is beyond the infinities."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & _ALL_BUT_SIGN))


@device
def float_at(order: np.int32) -> np.float32:
    """The inverse of `order_of`."""
    bits = np.int32(order ^ np.int32((order >> np.int32(31)) & _ALL_BUT_SIGN))
    return np.int32(bits).view(np.float32)


@device
def _widen_half(raw: np.uint32) -> np.float32:
    """Exactly the float32 value of float16 bits."""
    magnitude = np.uint32(raw & np.uint32(0x7FFF))
    # The biases differ by 112; infinities and NaN need that twice to reach the last exponent.
    bits = np.uint32((magnitude << np.uint32(13)) + np.uint32(0x38000000))
    bits = np.uint32(bits + np.uint32(0x38000000)) if magnitude >= 0x7C00 else bits
    # Subnormals as an integer times 2**-24: no float32 subnormal is ever an operand.
    small = bits_of(np.float32(np.int32(magnitude)) * _TWO_TO_MINUS_24)
    bits = small if magnitude < 0x0400 else bits
    return float_of(np.uint32(bits | np.uint32((raw & np.uint32(0x8000)) << np.uint32(16))))


@device
def widen(kind: int, raw: np.uint32) -> np.float32:
    """Exactly the float32 value of these bits, read as the value type `kind`."""
    if kind == BF16:
        return float_of(np.uint32(np.uint32(raw) << np.uint32(16)))
    if kind == F16:
        return _widen_half(np.uint32(raw))
    return float_of(np.uint32(raw))


@device
def _narrow_bfloat(bits: np.uint32) -> np.uint32:
    """bfloat16 bits nearest to a float32, ties to even; NaN is 0x7FC0."""
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(bits + odd + np.uint32(0x7FFF)) >> np.uint32(16))
    return np.uint32(0x7FC0) if np.uint32(bits & _MAGNITUDE) > _INFINITY else rounded


@device
def _narrow_half(bits: np.uint32) -> np.uint32:
    """float16 bits nearest to a float32, ties to even; NaN is sign | 0x7D00."""
    magnitude = np.uint32(bits & _MAGNITUDE)
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    # 0xC8000000 takes the difference of the exponent biases, 112, off the exponent field.
    normal = np.uint32(np.uint32(magnitude + odd + np.uint32(0xC8000FFF)) >> np.uint32(13))
    small = np.uint32(bits_of(float_of(magnitude) + _HALF) - _HALF_BITS)
    half = small if magnitude < _HALF_NORMAL else normal
    half = np.uint32(0x7C00) if magnitude >= _HALF_OVERFLOW else half
    half = np.uint32(0x7D00) if magnitude > _INFINITY else half
    return np.uint32(half | np.uint32(np.uint32(bits & _SIGN) >> np.uint32(16)))


@device
def half_toward_zero(bits: np.uint32) -> np.uint32:
    """float16 bits of a float32, cut off toward zero; overflow is infinite, NaN keeps its top.

    Source: Kaden-Schutt/hipfire 91e58a5, crates/hipfire-quantize, run on a CPU.
    """
    magnitude = np.uint32(bits & _MAGNITUDE)
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000000)) >> np.uint32(13))
    # Subnormals count units of 2**-24: the fraction with its leading one, shifted down.
    places = np.uint32(np.uint32(126) - (magnitude >> np.uint32(23)))
    fraction = np.uint32((magnitude & np.uint32(0x7FFFFF)) | np.uint32(0x800000))
    small = np.uint32(fraction >> places) if places < 32 else np.uint32(0)
    half = small if magnitude < _HALF_NORMAL else normal
    half = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else half
    nan = np.uint32(0x7C01) | np.uint32((magnitude & np.uint32(0x7FFFFF)) >> np.uint32(13))
    half = nan if magnitude > _INFINITY else half
    return np.uint32(half | np.uint32(np.uint32(bits & _SIGN) >> np.uint32(16)))


@device
def narrow(kind: int, value: np.float32) -> np.uint32:
    """The bits of the value type `kind` nearest to a float32, ties to even.

    Overflow gives infinity.
    Source: formats of mlx 0.32.4 (CPU), NaN patterns included.
    """
    if kind == BF16:
        return _narrow_bfloat(bits_of(value))
    if kind == F16:
        return _narrow_half(bits_of(value))
    return bits_of(value)


@device
def rounded(kind: int, value: np.float32) -> np.float32:
    """The value rounded to the value type `kind`, as float32."""
    return widen(kind, narrow(kind, value))
