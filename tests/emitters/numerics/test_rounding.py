"""Casts round to nearest even, and the search finds the first value that is not finite."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emitters.numerics.rounding import cast, first_nonfinite, to_float32

Array = NDArray[Any]

EVERY_16_BITS = np.arange(65536, dtype=np.uint16)
NONFINITE = {
    "F8_E4M3": np.array([0x7F, 0xFF], np.uint8),
    "BF16": np.array([0x7F80, 0xFF80, 0x7FC0, 0xFF81], np.uint16),
    "F16": np.array([np.inf, -np.inf, np.nan], np.float16),
    "F32": np.array([np.inf, -np.inf, np.nan], np.float32),
}


def bfloat16_by_distance(value: np.float32) -> np.float32:
    """The nearest bfloat16 of a finite float32, found by comparing both neighbours."""
    bits = int(value.view(np.uint32)) & 0xFFFF0000
    low, high = (np.uint32(b).view(np.float32) for b in (bits, bits + 0x10000))
    # Beyond the largest bfloat16, infinity counts as the next power of two.
    far = float(high) if np.isfinite(high) else math.copysign(2.0**128, high)
    below, above = abs(float(value) - float(low)), abs(far - float(value))
    if below == above:
        return low if bits & 0x10000 == 0 else high
    return low if below < above else high


def test_every_float16_widens_exactly() -> None:
    halves = EVERY_16_BITS.view(np.float16)
    np.testing.assert_array_equal(to_float32(halves, "F16"), halves.astype(np.float32))


def test_every_bfloat16_widens_exactly() -> None:
    widened = to_float32(EVERY_16_BITS, "BF16")
    assert (widened.view(np.uint32) == EVERY_16_BITS.astype(np.uint32) << 16).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_casting_there_and_back_changes_nothing(dtype: str) -> None:
    values = EVERY_16_BITS.view(np.float16) if dtype == "F16" else EVERY_16_BITS
    back = cast(to_float32(values, dtype), "F32", dtype)
    is_number = ~np.isnan(to_float32(values, dtype))
    assert (back.view(np.uint16) == values.view(np.uint16))[is_number].all()


@pytest.mark.filterwarnings("ignore:overflow")
def test_float16_rounds_as_numpy_does() -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    middle = np.random.default_rng(2).integers(0x33000000, 0x48000000, 1_000_000, dtype=np.uint32)
    edges = np.add.outer([-1, 0, 1], np.arange(0x33000000, 0x48000000, 0x1000))
    values = np.concatenate([bits, middle, edges.astype(np.uint32).reshape(-1)]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = values.astype(np.float16)
    assert (cast(values, "F32", "F16").view(np.uint16) == expected.view(np.uint16)).all()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bfloat16_rounds_to_nearest_even(number: float) -> None:
    value = np.float32(number)
    got = to_float32(cast(np.array([value]), "F32", "BF16"), "BF16")
    assert got[0] == bfloat16_by_distance(value)


def test_bfloat16_ties_go_to_even() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x00008000], np.uint32).view(np.float32)
    assert cast(ties, "F32", "BF16").tolist() == [0x3F80, 0x3F82, 0xBF80, 0x0000]


def test_nan_stays_nan_and_overflow_becomes_infinite() -> None:
    values = np.array([np.nan, 65520, -65520, 65519], np.float32)
    halves = cast(values, "F32", "F16")
    assert np.isnan(halves[0])
    assert halves[1:].tolist() == [np.inf, -np.inf, 65504]
    assert first_nonfinite(halves[1:], "F16") == 0
    assert first_nonfinite(cast(np.array([3.4e38], np.float32), "F32", "BF16"), "BF16") == 0


def test_a_cast_to_the_same_type_is_the_array_itself() -> None:
    assert cast(EVERY_16_BITS, "BF16", "BF16") is EVERY_16_BITS


@pytest.mark.parametrize("dtype", NONFINITE)
@pytest.mark.parametrize("position", [0, 1, 4095, 4096, 9999])
def test_the_first_nonfinite_is_found(dtype: str, position: int) -> None:
    bad = NONFINITE[dtype]
    values = np.random.default_rng(3).integers(0, 0x40, 10_000).astype(bad.dtype)
    assert first_nonfinite(values, dtype) == -1
    for value in bad:
        values[position:] = value
        assert first_nonfinite(values.reshape(100, 100), dtype) == position


def test_every_finite_code_is_finite() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert first_nonfinite(codes[codes & 0x7F != 0x7F], "F8_E4M3") == -1
    for dtype in ("BF16", "F16"):
        values = EVERY_16_BITS.view(NONFINITE[dtype].dtype)
        assert first_nonfinite(values[np.isfinite(to_float32(values, dtype))], dtype) == -1


def test_an_array_of_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="stored as uint16, not float32"):
        to_float32(np.zeros(3, np.float32), "BF16")
    with pytest.raises(ValueError, match="is none of"):
        to_float32(np.zeros(3, np.float64), "F64")
    with pytest.raises(ValueError, match="stored as uint8, not int8"):
        first_nonfinite(np.zeros(3, np.int8), "F8_E4M3")
