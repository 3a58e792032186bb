"""The value types of weights, by safetensors name, and the integer views kernels work on.

numpy has no bfloat16: a BF16 array is a uint16 array of bit patterns. Kernels see every
value type as unsigned integers and widen to float32 themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# Plain numbers: kernels close over them, and numba's cache must be able to key on them.
BF16, F16, F32 = 0, 1, 2


class ValueType(NamedTuple):
    """One value type: its number inside kernels, its numpy dtype and its bits' dtype."""

    kind: int
    storage: type[np.generic]
    raw: type[np.unsignedinteger[Any]]


VALUE_TYPES = {
    "BF16": ValueType(BF16, np.uint16, np.uint16),
    "F16": ValueType(F16, np.float16, np.uint16),
    "F32": ValueType(F32, np.float32, np.uint32),
}


def value_type(dtype: str) -> ValueType:
    """The value type of this name. Raises: ValueError for any other name."""
    if dtype not in VALUE_TYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(VALUE_TYPES)}")
    return VALUE_TYPES[dtype]


def raw_bits(values: Array, dtype: str) -> Array:
    """The bit patterns of the values, as a flat array; a view where memory layout allows.

    Raises: ValueError if the array is not stored as its value type is.
    """
    storage, raw = value_type(dtype).storage, value_type(dtype).raw
    return flat(values, storage, dtype).view(raw)


def flat(values: Array, storage: type[np.generic], what: str) -> Array:
    """The elements in one row, aligned as kernels need them; a view where possible.

    Raises: ValueError, naming `what`, if the elements are not of this numpy type.
    """
    if values.dtype != storage:
        raise ValueError(f"{what} is stored as {storage.__name__}, not {values.dtype}")
    return np.require(values, requirements=["C", "ALIGNED"]).reshape(-1)


def new_values(shape: tuple[int, ...], dtype: str) -> Array:
    """An uninitialized array of this value type."""
    return np.empty(shape, value_type(dtype).storage)
