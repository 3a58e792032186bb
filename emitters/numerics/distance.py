"""How far decoded values are from the true ones: sums that blocks add up to.

Lane k of the sums takes the values k, k + 16, …: 16 values are added side by side, and the
order of every addition is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from emitters.numerics.jit import device, factory, kernel, reads, writes
from emitters.numerics.value_types import Array, flat

_LANES = 16


class Distance(NamedTuple):
    """Sums over pairs of finite values: squares of true, decoded and difference; products.

    largest: of the absolute differences. values: all pairs; not_finite: those left out.
    """

    true: float
    decoded: float
    difference: float
    product: float
    largest: float
    values: int
    not_finite: int


@device
def _add_lanes(count: int, true: Array, decoded: Array, sums: Array) -> None:
    """Add `count` pairs, at most 16, to the sums [6, 16]."""
    true_squares, decoded_squares, squares = sums[0], sums[1], sums[2]
    products, largest, lost = sums[3], sums[4], sums[5]
    nothing = np.float64(0.0)
    for i in range(count):
        w, d = np.float64(true[i]), np.float64(decoded[i])
        difference = np.float64(abs(d - w))
        # Infinities and NaN fail this comparison, and then count as nothing but a loss.
        kept = 1.0 if difference < np.inf else 0.0
        w = w if kept else nothing
        d = d if kept else nothing
        difference = difference if kept else nothing
        true_squares[i] += w * w
        decoded_squares[i] += d * d
        squares[i] += difference * difference
        products[i] += w * d
        largest[i] = max(largest[i], difference)
        lost[i] += 1.0 - kept


@factory
def _adder() -> Callable[..., None]:
    """The kernel that adds flat arrays to flat sums [6 * 16]."""

    @kernel(reads("float32"), reads("float32"), writes("float64"))
    def add_up(true: Array, decoded: Array, sums: Array) -> None:
        lanes = sums.reshape(6, _LANES)
        whole = true.shape[0] // _LANES * _LANES
        for start in range(0, whole, _LANES):
            stop = start + _LANES
            _add_lanes(_LANES, true[start:stop], decoded[start:stop], lanes)
        _add_lanes(true.shape[0] - whole, true[whole:], decoded[whole:], lanes)

    return add_up


def distance(true: Array, decoded: Array) -> Distance:
    """The sums of two float32 arrays of one shape.

    Raises: ValueError if they are not float32 or have different sizes.
    """
    if true.size != decoded.size:
        raise ValueError(f"{true.size} true values and {decoded.size} decoded ones")
    sums = np.zeros(6 * _LANES)
    _adder()(flat(true, np.float32, "true"), flat(decoded, np.float32, "decoded"), sums)
    lanes = sums.reshape(6, _LANES)
    true_squares, decoded_squares, squares, products, _, lost = map(float, lanes.sum(axis=1))
    return Distance(
        true=true_squares,
        decoded=decoded_squares,
        difference=squares,
        product=products,
        largest=float(lanes[4].max()),
        values=true.size,
        not_finite=int(lost),
    )
