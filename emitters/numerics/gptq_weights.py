"""What errors in each column weigh in AutoRound's search, from an importance matrix.

Columns without any activity would weigh nothing. Where few of a group are idle, they get the
mean of the others; where many are, the magnitudes of the group's own values weigh instead.
Source: auto-round 0.16.1 and 0.12.2 (torch 2.13.0, CPU), `auto_round/data_type/gguf.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from emitters.numerics.jit import device
from emitters.numerics.scalars import rounded
from emitters.numerics.torch_sums import LANES, LEVELS, sum_float32, sum_of_half_width, torch_sums
from emitters.numerics.value_types import F32, Array

GRIDS = ("0.16.1", "0.12.2")  # versions of AutoRound

_IDLE = np.float32(1e-30)
_ZERO = np.float32(0)
_SPREAD = np.float32(32)  # whatever the size of a group


class SearchWeights(NamedTuple):
    """columns: float32 [in]. divisors: float32 [groups], NaN where the columns' weights count.

    Elsewhere magnitudes do; those that weigh nothing get their sum over the divisor.
    """

    columns: Array
    divisors: Array


def check_grid(grid: str) -> None:
    """Raises: ValueError unless the grid is one of `GRIDS`."""
    if grid not in GRIDS:
        raise ValueError(f"grid {grid!r} is none of {', '.join(GRIDS)}")


def even_weights(columns: int, size: int) -> SearchWeights:
    """The same weight for all columns, in groups of `size`."""
    divisors = np.full(columns // size, np.nan, np.float32)
    return SearchWeights(np.ones(columns, np.float32), divisors)


def search_weights(
    imatrix: Array, *, bits: int, group_size: int, grid: str = "0.16.1"
) -> SearchWeights:
    """The weights of a matrix's columns.

    imatrix: float32 [in], mean squares of what meets each column; bits, group_size, grid: as
    for `gptq_search`. One group a row always falls back if any column is exactly zero.
    Raises: ValueError for other versions, if groups do not divide the columns, for numbers
    that are negative or not finite, and where version 0.12.2 fails: at 3 or 8 bits, if a group
    has more than 16 idle columns.
    Source: auto-round 0.16.1 and 0.12.2, `_imatrix_handle_zero`. When a group is a row, 0.12.2
    weighs all rows with the magnitudes of one of them; here each row has its own.
    """
    check_grid(grid)
    size = len(imatrix) if group_size == -1 else group_size
    if size <= 0 or size % 32 or len(imatrix) % size:
        raise ValueError(f"groups of {group_size} do not divide {len(imatrix)} columns")
    columns, divisors = even_weights(len(imatrix), size)
    columns[:] = imatrix
    if not (np.isfinite(columns) & (columns >= 0)).all():
        raise ValueError("weights of columns are negative or not finite")
    if columns.min() > 0:
        return SearchWeights(columns, divisors)
    groups = columns.reshape(-1, size)
    idle = np.count_nonzero(groups <= _IDLE, axis=1)
    # -1 halved is -1 again: then every group falls back, whatever its columns.
    limit = group_size // 2 if grid == "0.16.1" else 8 if bits == 2 else 16
    many, few = idle > limit, (idle > 0) & (idle <= limit)
    if grid == "0.12.2" and bits in (3, 8) and many.any():
        raise ValueError(f"AutoRound 0.12.2 fails on idle columns at {bits} bits")
    divisors[many] = np.inf
    if few.any():
        divisors[many] = (size - idle)[many]
        means = torch_sums(groups) / np.maximum(size - idle, 1).astype(np.float32)
        filled = (groups == 0) & ~many[:, None]
        groups[filled] = np.broadcast_to(means[:, None], groups.shape)[filled]
    return SearchWeights(columns, divisors)


@device
def _add_spread(kind: int, values: Array, weights: Array, levels: Array) -> None:
    """Add the root of the group's squares over 32 to each weight, in the values' type.

    values, weights: float32 [n]; levels: scratch of `torch_sums`.
    """
    squares = np.empty(values.shape[0], np.float32)
    for i in range(values.shape[0]):
        squares[i] = rounded(kind, values[i] * values[i])
    total = sum_float32(squares, levels) if kind == F32 else sum_of_half_width(squares, levels)
    mean = rounded(kind, rounded(kind, total) / _SPREAD)
    root = rounded(kind, np.sqrt(mean))
    for i in range(values.shape[0]):
        weights[i] = rounded(kind, weights[i] + root)


@device
def weigh_by_magnitude(
    kind: int, bits: int, divisor: np.float32, values: Array, weights: Array
) -> None:
    """weights = what the values of a group weigh by themselves; both float32 [n].

    divisor: of the group, see `SearchWeights`.
    """
    levels = np.empty((LEVELS, LANES), np.float32)
    for i in range(values.shape[0]):
        weights[i] = abs(values[i])
    if bits > 3:
        _add_spread(kind, values, weights, levels)
    # Where all columns are idle it is infinite or NaN, and then no candidate wins.
    filler = sum_float32(weights, levels) / divisor
    for i in range(values.shape[0]):
        weights[i] = filler if weights[i] == _ZERO else weights[i]
