"""What columns weigh, by the inputs that meet them: in AutoRound's search, and for AWQ.

AutoRound: columns without any activity would weigh nothing. Where few of a group are idle, they get
the mean of the others; where many are, the magnitudes of the group's own values weigh instead.
Sums are in the order in which torch adds the last axis up on a CPU: lane k of 32 takes the
elements k, k + 32, …; lanes are folded to 8 and these are added one after the other. Runs of 16
additions to a lane go to a second level of sums, 16 of those to a third one, and so on.
Instruction sets and thread counts do not change it.
Source: torch 2.13.0 (CPU), `torch.sum`, x86-64, for lengths that 32 divides.
Source: auto-round 0.16.1 and 0.12.2 (torch 2.13.0, CPU), `auto_round/data_type/gguf.py`.

AWQ: weights are multiplied by a scale of each input column before they are quantized; a reader
divides the inputs by it. Gate and up of all experts of a layer share one.
Source: Kaden-Schutt/hipfire, `calibration` module (2026-05).
"""

import math
from functools import reduce
from operator import add
from typing import NamedTuple

import numpy as np

from emitters.numerics import F32, Array
from emitters.numerics.jit import device, kernel, reads, writes
from emitters.numerics.rounding import cast, rounded, to_float32

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
            lane = levels[:, start + k]
            folded += ((lane[0] + lane[1]) + lane[2]) + lane[3]
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


@kernel(reads("float32"), writes("float32"))
def torch_sums(rows: Array, sums: Array) -> None:
    """sums = the sum of each of the rows; both float32, rows [rows, n], n % 32 == 0."""
    size = rows.shape[0] // sums.shape[0]
    levels = np.empty((LEVELS, LANES), np.float32)
    for k in range(sums.shape[0]):
        sums[k] = sum_float32(rows[k * size : (k + 1) * size], levels)


GRIDS = ("0.16.1", "0.12.2")  # versions of AutoRound

_IDLE = np.float32(1e-30)
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
        torch_sums(groups, means := np.empty(len(groups), np.float32))
        means /= np.maximum(size - idle, 1).astype(np.float32)
        filled = (groups == 0) & ~many[:, None]
        groups[filled] = np.broadcast_to(means[:, None], groups.shape)[filled]
    return SearchWeights(columns, divisors)


@device
def weigh_by_magnitude(
    kind: int, bits: int, divisor: np.float32, values: Array, weights: Array
) -> None:
    """weights = what the values of a group weigh by themselves; both float32 [n].

    divisor: of the group, see `SearchWeights`.
    """
    levels, n = np.empty((LEVELS, LANES), np.float32), values.shape[0]
    for i in range(n):
        weights[i] = abs(values[i])
    if bits > 3:
        # The root of the group's squares over 32 is added, in the values' type.
        squares = np.empty(n, np.float32)
        for i in range(n):
            squares[i] = rounded(kind, values[i] * values[i])
        total = sum_float32(squares, levels) if kind == F32 else sum_of_half_width(squares, levels)
        root = rounded(kind, np.sqrt(rounded(kind, rounded(kind, total) / _SPREAD)))
        for i in range(n):
            weights[i] = rounded(kind, weights[i] + root)
    # Where all columns are idle it is infinite or NaN, and then no candidate wins.
    filler = sum_float32(weights, levels) / divisor
    for i in range(n):
        weights[i] = filler if weights[i] == _ZERO else weights[i]


class ColumnScale(NamedTuple):
    """applied: float32 [in], for the weights; stored: float16 [in], for the reader's inputs."""

    applied: Array
    stored: Array


def gate_up_sums(gate: Array, up: Array | None) -> Array:
    """float32 [in]: the sums of all experts and of both projections, added up.

    gate, up: float32 [experts, in]; gate alone counts if `up` is None or of another width.
    Source: Kaden-Schutt/hipfire, `calibration` module (2026-05), order of additions included.
    """
    shared = [gate] if up is None or up.shape[-1] != gate.shape[-1] else [gate, up]
    # One expert after the other: the order decides the last bits.
    totals = [reduce(np.add, sums, np.zeros(sums.shape[-1], np.float32)) for sums in shared]
    return reduce(np.add, totals)


def awq_scale(sums: Array, alpha: float) -> Array:
    """float32 [in]: root mean squares to the power alpha, their geometric mean made 1.

    sums: float32 [in], of squared inputs; any factor on all of them cancels. NaN counts as
    almost 0. The scale is held between 0.01 and 100. alpha: 0 … 1, taken as float32.
    Raises: ValueError for another alpha.
    Source: Kaden-Schutt/hipfire, `calibration` module (2026-05); equal up to the last bit,
    which depends on the logarithm of the machine.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, not from 0 to 1")
    half = float(np.float32(alpha)) * 0.5
    bounded = np.fmin(np.fmax(sums.astype(np.float64), 1e-12), 1e30)
    # Not numpy's logarithm, which differs by CPU, nor sum(), which compensates from 3.12 on.
    logs = [half * math.log(value) for value in bounded.tolist()]
    mean = reduce(add, logs) / len(logs)
    scale = np.array([math.exp(value - mean) for value in logs], np.float64)
    return np.clip(scale.astype(np.float32), np.float32(0.01), np.float32(100))


def forms_of_scale(scale: Array, *, exact: bool) -> ColumnScale:
    """The two forms of a scale; it is stored cut off toward zero.

    scale: float32 [in]. exact: weights are multiplied by the stored scale, so that it cancels;
    else by the scale itself, as hipfire does, and outputs come out 1 to 1.001 times too large.
    Source: Kaden-Schutt/hipfire 02786be, MiniMax branch of the quantizer.
    """
    stored = cast(scale, "F32", "F16", cuts_off=True)
    return ColumnScale(to_float32(stored, "F16") if exact else scale, stored)
