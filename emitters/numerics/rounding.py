"""Rounding between value types: single numbers inside kernels, and whole arrays.

Widening to float32 and rounding to 16 bits are branch-free on integers: no table, no library call.
"""

import numpy as np

from emitters.numerics import BF16, F16, Array, new_values
from emitters.numerics.jit import device, kernel, reads, row_of, writes

_SIGN = np.uint32(0x80000000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ALL_BUT_SIGN = np.int32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_TWO_TO_MINUS_24 = np.float32(2.0**-24)
_ZERO, _HALF = np.float32(0), np.float32(0.5)
_WHOLE = np.float32(2.0**23)  # adding it leaves an integer in the low bits
_HALF_BITS = np.uint32(0x3F000000)
_HALF_OVERFLOW = np.uint32(0x477FF000)  # 65520, the first magnitude that rounds to infinity
_HALF_NORMAL = np.uint32(0x38800000)  # 2**-14
_STRETCH = 2**16  # values searched between two looks at the result
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
def _ordered(bits: np.int32) -> np.int32:
    """The bits of a float32 to an integer that compares as it does, and back; NaN is outermost."""
    return np.int32(bits ^ np.int32((bits >> np.int32(31)) & _ALL_BUT_SIGN))


@device
def extremes(values: Array, start: tuple[np.float32, np.float32]) -> tuple[np.float32, np.float32]:
    """The smallest and the largest of float32 [n] and of those to start with, NaN ignored."""
    least = _ordered(np.float32(start[0]).view(np.int32))
    most = _ordered(np.float32(start[1]).view(np.int32))
    low, high = least, most
    for i in range(values.shape[0]):
        order = _ordered(np.float32(values[i]).view(np.int32))
        is_number = values[i] == values[i]
        low = min(low, order if is_number else least)
        high = max(high, order if is_number else most)
    return np.int32(_ordered(low)).view(np.float32), np.int32(_ordered(high)).view(np.float32)


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
def nearest_code(value: np.float32, top: np.float32) -> np.uint8:
    """The integer 0 .. top nearest to the value, ties to even; NaN gives 0."""
    return np.uint8(bits_of(clamped(value, top) + _WHOLE))


@device
def widen(kind: int, raw: np.uint32) -> np.float32:
    """Exactly the float32 value of these bits, read as the value type `kind`."""
    bits = np.uint32(raw)
    if kind == BF16:
        bits = np.uint32(bits << np.uint32(16))
    if kind == F16:
        sign = np.uint32((bits & np.uint32(0x8000)) << np.uint32(16))
        magnitude = np.uint32(bits & np.uint32(0x7FFF))
        # The biases differ by 112; infinities and NaN need that twice to reach the last exponent.
        bits = np.uint32((magnitude << np.uint32(13)) + np.uint32(0x38000000))
        bits = np.uint32(bits + np.uint32(0x38000000)) if magnitude >= 0x7C00 else bits
        # Subnormals as an integer times 2**-24: no float32 subnormal is ever an operand.
        small = bits_of(np.float32(np.int32(magnitude)) * _TWO_TO_MINUS_24)
        bits = np.uint32((small if magnitude < 0x0400 else bits) | sign)
    return float_of(bits)


@device
def narrow(kind: int, value: np.float32) -> np.uint32:
    """The bits of the value type `kind` nearest to a float32, ties to even; overflow is infinite.

    NaN is 0x7FC0 in bfloat16, and sign | 0x7D00 in float16.
    Source: formats of mlx 0.32.4 (CPU).
    """
    bits = bits_of(value)
    magnitude = np.uint32(bits & _MAGNITUDE)
    if kind == BF16:
        odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
        bfloat = np.uint32(np.uint32(bits + odd + np.uint32(0x7FFF)) >> np.uint32(16))
        bits = np.uint32(0x7FC0) if magnitude > _INFINITY else bfloat
    if kind == F16:
        odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
        # 0xC8000000 takes the difference of the exponent biases, 112, off the exponent field.
        normal = np.uint32(np.uint32(magnitude + odd + np.uint32(0xC8000FFF)) >> np.uint32(13))
        small = np.uint32(bits_of(float_of(magnitude) + _HALF) - _HALF_BITS)
        half = small if magnitude < _HALF_NORMAL else normal
        half = np.uint32(0x7C00) if magnitude >= _HALF_OVERFLOW else half
        half = np.uint32(0x7D00) if magnitude > _INFINITY else half
        bits = np.uint32(half | np.uint32(np.uint32(bits & _SIGN) >> np.uint32(16)))
    return bits


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
def rounded(kind: int, value: np.float32) -> np.float32:
    """The value rounded to the value type `kind`, as float32."""
    return widen(kind, narrow(kind, value))


@kernel(reads("kind"), writes("to_kind"))
def _cast(values: Array, result: Array, kind: int, to_kind: int, cuts_off: bool) -> None:
    for i in range(values.shape[0]):
        wide = widen(kind, values[i])
        result[i] = half_toward_zero(bits_of(wide)) if cuts_off else narrow(to_kind, wide)


def cast(values: Array, from_dtype: str, to_dtype: str, *, cuts_off: bool = False) -> Array:
    """The values in another value type, rounded to nearest, ties to even.

    values: any shape, of value type `from_dtype` (BF16 as uint16); returned as they are when
    both types are the same. What overflows becomes infinite: see `first_nonfinite`. cuts_off:
    values that become F16 are rounded toward zero.
    Raises: ValueError for an unknown dtype, or if the array is not stored as it says.
    """
    if from_dtype == to_dtype:
        row_of(values, from_dtype)  # only checked
        return values
    result, cuts_off = new_values(values.shape, to_dtype), cuts_off and to_dtype == "F16"
    _cast(values, result, kind=from_dtype, to_kind=to_dtype, cuts_off=cuts_off)
    return result


def to_float32(values: Array, dtype: str) -> Array:
    """The values as float32, exactly; arguments as in `cast`."""
    return cast(values, dtype, "F32")


def first_nonfinite(values: Array, dtype: str) -> int:
    """The flat index of the first infinity or NaN, or -1.

    values: any shape, of value type `dtype`, or codes (uint8) of dtype "F8_E4M3".
    Raises: ValueError for an unknown dtype, or if the array is not stored as it says.
    """
    row = row_of(values, "uint8" if dtype == "F8_E4M3" else dtype, dtype)
    mask = row.dtype.type(_NOT_FINITE[dtype])
    for start in range(0, row.size, _STRETCH):
        bits = row[start : start + _STRETCH] & mask
        if bits.max() == mask:
            return start + int(bits.argmax())
    return -1
