"""Arrays to arrays, byte for byte; here the value types of weights, by safetensors name.

numpy has no bfloat16: a BF16 array is a uint16 array of bit patterns. Kernels see every
value type as unsigned integers and widen to float32 themselves.
"""

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


def new_values(shape: tuple[int, ...], dtype: str) -> Array:
    """An uninitialized array of this value type."""
    return np.empty(shape, value_type(dtype).storage)
