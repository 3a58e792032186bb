"""Casts between value types, and the search for values that are not finite."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emitters.numerics.jit import device, factory, int64, kernel, reads, writes
from emitters.numerics.scalars import bits_of, half_toward_zero, narrow, widen
from emitters.numerics.value_types import Array, flat, new_values, raw_bits, value_type

_STRETCH = 4096  # values searched between two looks at the result

# Exponent bits all set; for E4M3 the mantissa too, as it has no infinity.
_NOT_FINITE = {"F8_E4M3": 0x7F, "BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


@factory
def _caster(from_dtype: str, to_dtype: str, cuts_off: bool) -> Callable[..., None]:
    source, target = value_type(from_dtype), value_type(to_dtype)
    from_kind, to_kind = source.kind, target.kind

    @kernel(reads(source.raw.__name__), writes(target.raw.__name__))
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
    raw = raw_bits(values, from_dtype)
    if from_dtype == to_dtype:
        return values
    result = new_values(values.shape, to_dtype)
    cut = cuts_off and to_dtype == "F16"
    _caster(from_dtype, to_dtype, cut)(raw, raw_bits(result, to_dtype))
    return result


def to_float32(values: Array, dtype: str) -> Array:
    """The values as float32, exactly; arguments as in `cast`."""
    return cast(values, dtype, "F32")


@device
def _reaches(values: Array, mask: Array) -> bool:
    """Whether some value has all bits of the mask; mask: (mask, 0) in the values' type."""
    largest = mask[1]
    for i in range(values.shape[0]):
        largest = max(largest, values[i] & mask[0])
    return bool(largest == mask[0])


@device
def _first(values: Array, mask: Array) -> int:
    """The index of the first value with all bits of the mask; one is known to exist."""
    i = 0
    while values[i] & mask[0] != mask[0]:
        i += 1
    return i


@factory
def _searcher(raw: str) -> Callable[..., int]:
    @kernel(reads(raw), reads(raw), returns=int64)
    def find(values: Array, mask: Array) -> int:
        for start in range(0, values.shape[0], _STRETCH):
            part = values[start : start + _STRETCH]
            if _reaches(part, mask):
                return start + _first(part, mask)
        return -1

    return find


def first_nonfinite(values: Array, dtype: str) -> int:
    """The flat index of the first infinity or NaN, or -1.

    values: any shape, of value type `dtype`, or codes (uint8) of dtype "F8_E4M3".
    Raises: ValueError for an unknown dtype, or if the array is not stored as it says.
    """
    is_codes = dtype == "F8_E4M3"
    raw = flat(values, np.uint8, dtype) if is_codes else raw_bits(values, dtype)
    mask = np.array([_NOT_FINITE[dtype], 0], raw.dtype)
    return int(_searcher(raw.dtype.name)(raw, mask))
