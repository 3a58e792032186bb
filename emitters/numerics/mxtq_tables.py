"""The two tables of MXTQ that are not stored with a tensor: signs and centroids.

numpy alone, so that planning can ask for them.
"""

import math
from functools import cache

import numpy as np

from emitters.numerics import Array

_GRID_POINTS = 10000
_MOST_ROUNDS = 200
_FEWEST_COLUMNS = 4


@cache
def signs(columns: int, seed: int = 42) -> Array:
    """The signs of the rotation for rows of this length: float32 [columns], read-only.

    Each is -1 or 1. The signs of shorter rows are the beginning of those of longer ones.
    Source: jang 2.5.50, `jang_tools.turboquant.rotation.generate_random_signs`.
    """
    # numpy promises the same bits of a bit generator for ever, but not the same choices from
    # them: two signs come from each word, by bit 31 and by bit 63.
    words = np.random.PCG64(seed).random_raw((columns + 1) // 2)
    bits = (words[:, None] >> np.array([31, 63], np.uint64)) & np.uint64(1)
    result = (bits.reshape(-1)[:columns].astype(np.float32) * 2) - 1
    result.flags.writeable = False
    return result


@cache
def codebook(columns: int, bits: int) -> Array:
    """The 2**bits centroids for rows of this length: float32, ascending, read-only.

    Lloyd's iteration on the density of one coordinate of a random unit vector, in float64.
    Raises: ValueError for other widths than 1 to 4 bits, and for rows of less than 4 values:
    their density is flat, and the last bit of a sum decides which centroids come out.
    Source: jang 2.5.50, `jang_tools.turboquant.codebook.compute_codebook`.
    """
    if bits not in (1, 2, 3, 4):
        raise ValueError(f"MXTQ codes have 1, 2, 3 or 4 bits, not {bits}")
    if columns < _FEWEST_COLUMNS:
        raise ValueError(f"rows of {columns} values are too short for MXTQ")
    grid = np.linspace(-1, 1, _GRID_POINTS)
    # The density is proportional to (1 - x*x)**((columns - 3) / 2).
    constant = math.lgamma(columns / 2) - math.lgamma((columns - 1) / 2) - math.log(math.pi) / 2
    logarithms = np.log(np.maximum(1 - grid**2, 1e-30))
    density = np.exp(constant + (columns - 3) / 2 * logarithms)
    density /= _integral(grid, density)[-1]
    mass, moment = _integral(grid, density), _integral(grid, grid * density)
    reach = 3 / math.sqrt(columns)
    centroids = np.linspace(-reach, reach, 2**bits)
    for _ in range(_MOST_ROUNDS):
        borders = np.searchsorted(grid, (centroids[:-1] + centroids[1:]) / 2)
        # Borders of rows of less than 9 values start beyond the grid.
        first = np.append(0, np.minimum(borders, _GRID_POINTS - 1))
        end = np.append(borders, _GRID_POINTS)
        # The integrals are over the points of a cell, not up to its borders.
        inside = np.maximum(mass[end - 1] - mass[first], 1e-10)
        means = (moment[end - 1] - moment[first]) / inside
        moved = np.where(end - first < 2, centroids, means)
        if np.allclose(centroids, moved, rtol=1e-5, atol=1e-10):
            break
        centroids = moved
    result = np.sort(centroids).astype(np.float32)
    result.flags.writeable = False
    return result


def _integral(grid: Array, values: Array) -> Array:
    """The integral from the first point to each of them, by trapezoids."""
    steps = np.diff(grid) * (values[1:] + values[:-1]) / 2
    return np.append(0, np.cumsum(steps))
