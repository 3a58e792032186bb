"""Sums over pairs of values, against plain float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from emitters.numerics.reach import distance


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096, 5001])
def test_sums_are_those_of_the_definition(size: int) -> None:
    random = np.random.default_rng(size)
    true = random.standard_normal(size).astype(np.float32)
    decoded = (true + 0.01 * random.standard_normal(size)).astype(np.float32)
    found = distance(true, decoded)
    w, d = true.astype(np.float64), decoded.astype(np.float64)
    assert found.source == pytest.approx(w @ w, rel=1e-13)
    assert found.decoded == pytest.approx(d @ d, rel=1e-13)
    assert found.product == pytest.approx(w @ d, rel=1e-13)
    assert found.difference == pytest.approx((d - w) @ (d - w), rel=1e-13)
    assert found.largest == np.abs(d - w).max(initial=0.0)
    assert (found.values, found.not_finite) == (size, 0)


def test_pairs_that_are_not_finite_are_left_out_and_counted() -> None:
    true = np.ones(40, np.float32)
    decoded = np.full(40, 2, np.float32)
    decoded[[3, 17]] = np.nan, np.inf
    true[39] = -np.inf
    found = distance(true, decoded)
    assert (found.values, found.not_finite) == (40, 3)
    assert (found.source, found.decoded, found.difference) == (37.0, 148.0, 37.0)
    assert found.largest == 1.0


def test_large_values_do_not_overflow() -> None:
    values = np.full(100, np.finfo(np.float32).max)
    assert distance(values, -values).largest == 2 * float(values[0])


def test_shape_does_not_matter_size_does() -> None:
    values = np.arange(64, dtype=np.float32)
    assert distance(values.reshape(8, 8), values) == distance(values, values.reshape(4, 16))
    with pytest.raises(ValueError, match="64 true values and 63"):
        distance(values, values[1:])
    with pytest.raises(ValueError, match="float32"):
        distance(values.astype(np.float64), values)
