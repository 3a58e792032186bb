"""Rounding between value types: single numbers inside kernels, and whole arrays.

Widening to float32 and rounding to 16 bits are branch-free on integers: no table, no library call.
"""

from collections.abc import Callable

import numpy as np

from emitters.numerics import BF16, F16, Array, new_values, value_type
from emitters.numerics.jit import device, factory, int64, kernel, reads, writes

_SIGN = np.uint32(0x80000000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_TWO_TO_MINUS_24 = np.float32(2.0**-24)
_ZERO, _HALF = np.float32(0), np.float32(0.5)
_HALF_BITS = np.uint32(0x3F000000)
_HALF_OVERFLOW = np.uint32(0x477FF000)  # 65520, the first magnitude that rounds to infinity
_HALF_NORMAL = np.uint32(0x38800000)  # 2**-14
_STRETCH = 4096  # values searched between two looks at the result
# Exponent bits all set; for E4M3 the mantissa too, as it has no infinity.
_NOT_FINITE = {"F8_E4M3": 0x7F, "BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


@device
def float_of(bits: np.uint32) -> np.float32:
    """The float32 with these bits."""
    return np.uint32(bits).view(np.float32)


@device
def bits_of(value: np.float32) -> np.uint32:
    """The bits of a float32."""
    return np.float32(value).view(np.uint32)


@device
def _order_of(value: np.float32) -> np.int32:
    """An integer that compares as the float does; NaN is beyond the infinities."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & _ALL_BUT_SIGN))


@device
def _float_at(order: np.int32) -> np.float32:
    """The inverse of `_order_of`."""
    bits = np.int32(order ^ np.int32((order >> np.int32(31)) & _ALL_BUT_SIGN))
    return np.int32(bits).view(np.float32)


@device
def extremes(values: Array, start: tuple[np.float32, np.float32]) -> tuple[np.float32, np.float32]:
    """The smallest and the largest of float32 [n] and of those to start with, NaN ignored."""
    least, most = _order_of(start[0]), _order_of(start[1])
    low, high = least, most
    for i in range(values.shape[0]):
        order = _order_of(values[i])
        is_number = values[i] == values[i]
        low = min(low, order if is_number else least)
        high = max(high, order if is_number else most)
    return _float_at(low), _float_at(high)


@device
def largest_magnitude(values: Array) -> np.float32:
    """The largest magnitude of float32 [n] without NaN."""
    largest = np.uint32(0)
    for i in range(values.shape[0]):
        largest = max(largest, np.uint32(bits_of(values[i]) & _MAGNITUDE))
    return float_of(largest)


@device
def clamped(value: np.float32, top: np.float32) -> np.float32:
    """The value held within 0 .. top; NaN gives 0."""
    value = value if value > _ZERO else _ZERO
    return value if value < top else top


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
    """The bits of the value type `kind` nearest to a float32, ties to even; overflow is infinite.

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


@factory
def _caster(from_dtype: str, to_dtype: str, cuts_off: bool) -> Callable[..., None]:
    from_kind, to_kind = value_type(from_dtype).kind, value_type(to_dtype).kind

    @kernel(reads(from_dtype), writes(to_dtype))
    def cast_values(values: Array, result: Array) -> None:
        for i in range(values.shape[0]):
            wide = widen(from_kind, values[i])
            result[i] = half_toward_zero(bits_of(wide)) if cuts_off else narrow(to_kind, wide)

    return cast_values


def cast(values: Array, from_dtype: str, to_dtype: str, *, cuts_off: bool = False) -> Array:
    """The values in another value type, rounded to nearest, ties to even.

    values: any shape, of value type `from_dtype` (BF16 as uint16); returned as they are when
    both types are the same. What overflows becomes infinite: see `first_nonfinite`. cuts_off:
    values that become F16 are rounded toward zero.
    Raises: ValueError for an unknown dtype, or if the array is not stored as it says.
    """
    if from_dtype == to_dtype:
        reads(from_dtype).row(values)  # only checked
        return values
    result = new_values(values.shape, to_dtype)
    _caster(from_dtype, to_dtype, cuts_off and to_dtype == "F16")(values, result)
    return result


def to_float32(values: Array, dtype: str) -> Array:
    """The values as float32, exactly; arguments as in `cast`."""
    return cast(values, dtype, "F32")


@factory
def _searcher(element: str) -> Callable[..., int]:
    @kernel(reads(element), reads(element), returns=int64)
    def find(values: Array, mask: Array) -> int:
        # The mask and zero, in the values' type.
        for start in range(0, values.shape[0], _STRETCH):
            part, largest = values[start : start + _STRETCH], mask[1]
            for i in range(part.shape[0]):
                largest = max(largest, part[i] & mask[0])
            if largest == mask[0]:
                return start
        return -1

    return find


def first_nonfinite(values: Array, dtype: str) -> int:
    """The flat index of the first infinity or NaN, or -1.

    values: any shape, of value type `dtype`, or codes (uint8) of dtype "F8_E4M3".
    Raises: ValueError for an unknown dtype, or if the array is not stored as it says.
    """
    row = reads("uint8" if dtype == "F8_E4M3" else dtype).row(values, dtype)
    mask = np.array([_NOT_FINITE[dtype], 0], row.dtype)
    start = int(_searcher(row.dtype.name)(row, mask))
    if start < 0:
        return start
    return start + int(np.argmax(row[start : start + _STRETCH] & mask[0] == mask[0]))
