"""Sums in the order in which torch adds the last axis up on a CPU, for use inside kernels.

Lane k of 32 takes the elements k, k + 32, … Lanes are folded to 8 and these are added one
after the other. Runs of 16 additions to a lane go to a second level of sums, 16 of those to a
third one, and so on. Instruction sets and thread counts do not change it.
Source: torch 2.13.0 (CPU), `torch.sum`, x86-64, for lengths that 32 divides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emitters.numerics.jit import device, factory, kernel, reads, writes
from emitters.numerics.value_types import Array, flat

LANES = 32
FOLDED = 8  # lanes after folding: the floats of one register
RUN = 16  # additions to one sum before it goes to the next level
LEVELS = 4

_ZERO = np.float32(0)


@device
def carry(levels: Array, added: int) -> None:
    """Sums of full runs go one level up; levels: float32 [4, lanes]; added: so far."""
    for level in range(1, LEVELS):
        lower, upper = levels[level - 1], levels[level]
        for k in range(lower.shape[0]):
            upper[k] += lower[k]
            lower[k] = _ZERO
        if added & ((RUN - 1) << (4 * level)):
            return


@device
def _fold(levels: Array) -> np.float32:
    """The sum of all lanes; levels: float32 [4, 32]."""
    total = _ZERO
    for k in range(FOLDED):
        folded = _ZERO
        for start in range(0, LANES, FOLDED):
            lane = levels[0, start + k]
            for level in range(1, LEVELS):
                lane += levels[level, start + k]
            folded += lane
        total += folded
    return total


@device
def sum_float32(values: Array, levels: Array) -> np.float32:
    """The sum of float32 [n], n % 32 == 0; levels: float32 [4, 32], scratch."""
    levels[:] = _ZERO
    for start in range(0, values.shape[0], LANES):
        part, lanes = values[start : start + LANES], levels[0]
        for k in range(LANES):
            lanes[k] += part[k]
        added = start // LANES + 1
        if added % RUN == 0:
            carry(levels, added)
    return _fold(levels)


@device
def sum_of_half_width(values: Array, levels: Array) -> np.float32:
    """The sum of values that torch holds in 16 bits, here as float32, before it is rounded.

    A register holds 16 of them: two neighbouring runs of 8 are added first. n % 32 == 0.
    """
    levels[:] = _ZERO
    whole = values.shape[0] // (2 * LANES) * (2 * LANES)
    for start in range(0, whole, 2 * LANES):
        lanes = levels[0]
        for k in range(LANES):
            first = start + 2 * k - k % FOLDED
            lanes[k] += values[first] + values[first + FOLDED]
        added = start // (2 * LANES) + 1
        if added % RUN == 0:
            carry(levels, added)
    # What fills no 64 goes to the first 8 lanes, after all levels have been added up.
    for k in range(LANES):
        for level in range(1, LEVELS):
            levels[0, k] += levels[level, k]
            levels[level, k] = _ZERO
    for start in range(whole, values.shape[0], 2 * FOLDED):
        for k in range(FOLDED):
            levels[0, k] += values[start + k] + values[start + k + FOLDED]
    return _fold(levels)


@factory
def _adder() -> Callable[..., None]:
    """The kernel that adds up rows of equal length."""

    @kernel(reads("float32"), writes("float32"))
    def add_rows(values: Array, sums: Array) -> None:
        size = values.shape[0] // sums.shape[0]
        levels = np.empty((LEVELS, LANES), np.float32)
        for k in range(sums.shape[0]):
            sums[k] = sum_float32(values[k * size : (k + 1) * size], levels)

    return add_rows


def torch_sums(rows: Array) -> Array:
    """The sum of each row: float32 [rows]; rows: float32 [rows, n], n % 32 == 0.

    Raises: ValueError if they are not float32.
    """
    sums = np.empty(len(rows), np.float32)
    _adder()(flat(rows, np.float32, "rows"), sums)
    return sums
