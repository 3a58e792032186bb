"""How far values may be from what they decode to, where codes are the nearest ones.

Each function takes the values and what is stored for them, and says which values no rounding
to nearest under these scales would have taken there: bool, of the values' shape. Beside half
a step, the bounds count what is rounded on the way: stored scales, products, quotients.
NaN is never within a bound. The bounds are those of `docs/verifying.md`.

What is rotated is compared as it was coded: after the rotation. Lloyd's levels are the means of
their values, and codes are nearest to the levels before their last move: hence larger bounds.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import numpy as np

from emitters.numerics.affine import affine_decode
from emitters.numerics.gptq_layout import GptqParts, gptq_decode, unpack_columns
from emitters.numerics.hfq import HfqBlocks, read_blocks, rotate_groups
from emitters.numerics.mxtq import mxtq_encode
from emitters.numerics.mxtq_tables import codebook, signs
from emitters.numerics.rounding import to_float32
from emitters.numerics.small_floats import fp_decode
from emitters.numerics.value_types import Array
from policy_dsl.formats import Slack

Width = tuple[int, int]  # bits, and values in a group

# Largest relative error of rounding to nearest, and largest error of the smallest numbers.
UNITS = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
FLOORS = {"BF16": 2.0**-134, "F16": 2.0**-25, "F32": 2.0**-150}
# What float32 arithmetic adds: relative to a value, and in steps.
_SLOP, _STEP_SLOP = 2.0**-20, 2.0**-10
_HALF_REACH = 0.5 + _STEP_SLOP


class Steps(NamedTuple):
    """A grid of equal steps. codes: [rows, in], from 0 to top; step: float32 [rows, groups]."""

    codes: Array
    step: Array
    top: int


def beyond_steps(
    values: Array, decoded: Array, grid: Steps, *, ends: tuple[float, float], added: Array
) -> Array:
    """Values farther from what they decode to than half a step and `added`.

    values, decoded, added: [rows, in]. ends: how many steps values may be beyond the first
    and the last code, instead of half a one.
    """
    low, high = ends
    reach = np.full(values.shape, _HALF_REACH, np.float32)
    reach[grid.codes == 0] = low + _STEP_SLOP
    reach[grid.codes == grid.top] = high + _STEP_SLOP
    allowed = reach * spread(np.abs(grid.step), values.shape) + added
    with np.errstate(invalid="ignore"):
        within: Array = np.abs(decoded - values) <= allowed
    return ~within


def spread(of_groups: Array, shape: tuple[int, ...]) -> Array:
    """[rows, in]: what is one number for each group, [rows, groups], for each value."""
    rows, groups = of_groups.shape
    size = -(-shape[1] // groups)
    repeated = np.broadcast_to(of_groups[:, :, None], (rows, groups, size))
    return repeated.reshape(rows, groups * size)[:, : shape[1]]


def slack_of(values: Array, slack: Slack) -> Array:
    """What was rounded before the values were coded, for each of them."""
    return np.abs(values) * np.float32(slack.relative + _SLOP) + np.float32(slack.floor)


def affine_beyond(
    values: Array, parts: tuple[Array, Array, Array], dtype: str, width: Width, slack: Slack
) -> Array:
    """Values that are too far from affine codes: float32 [rows, in].

    parts, dtype: as of `affine_decode`. mlx makes one extreme a whole number of steps, which
    takes the other up to a step beyond the last code.
    """
    bits, size = width
    packed, scales, biases = parts
    ones, zeros = np.ones(scales.shape, np.float32), np.zeros(scales.shape, np.float32)
    codes = affine_decode((packed, ones, zeros), "F32", bits=bits, group_size=size)
    decoded = affine_decode(parts, dtype, bits=bits, group_size=size)
    step, base = np.abs(to_float32(scales, dtype)), to_float32(biases, dtype)
    unit, floor = np.float32(UNITS[dtype]), np.float32(FLOORS[dtype])
    # The stored scale, the product; the stored bias, the sum.
    rounded = (codes + 1) * (2 * unit * spread(step, values.shape) + floor)
    rounded += unit * (spread(np.abs(base), values.shape) + np.abs(decoded)) + 2 * floor
    grid = Steps(codes, step, (1 << bits) - 1)
    added = rounded + slack_of(values, slack)
    return beyond_steps(values, decoded, grid, ends=(0.5, 1.0), added=added)


def gptq_beyond(
    values: Array, parts: GptqParts, width: Width, slack: Slack, *, symmetric: bool
) -> Array:
    """Values that are too far from GPTQ codes: float32 [rows, in].

    parts: zero points not packed. Symmetric scales may be searched for: AutoRound's go down to
    1 / 1.75 of the one that reaches the largest value.
    """
    bits, size = width
    codes = unpack_columns(parts.qweight, bits=bits).astype(np.float32)
    decoded = gptq_decode(parts, bits=bits, group_size=size)
    step = np.abs(parts.scales.astype(np.float32)).T
    zeros = spread(parts.zeros.astype(np.float32).T, values.shape)
    unit, floor = np.float32(UNITS["F16"]), np.float32(FLOORS["F16"])
    # The stored scale and the product; scale, quotient and product in the tool's arithmetic.
    each = spread(step, values.shape) * np.float32(2 * unit + 3 * slack.arithmetic) + floor
    added = (np.abs(codes - zeros) + 1) * each + floor + slack_of(values, slack)
    end = 1 + 0.75 * 2 ** (bits - 1) if symmetric else 1.0
    grid = Steps(codes, step, (1 << bits) - 1)
    return beyond_steps(values, decoded, grid, ends=(end, end), added=added)


def fp_beyond(
    values: Array, parts: tuple[Array, Array], mode: str, dtype: str, slack: Slack
) -> Array:
    """Values that are too far from codes of small floats: float32 [rows, in].

    parts: as of `fp_decode`. dtype: of the arithmetic in which codes were chosen.
    """
    packed, scales = parts
    # Scales of one: what comes out are the codes' own values.
    one = np.full(scales.shape, 0x38 if mode == "nvfp4" else 127, np.uint8)
    codes = fp_decode(packed, one, mode=mode)
    grid = _E4M3 if mode == "mxfp8" else _E2M1
    at = np.searchsorted(grid, codes)
    below = (grid[np.maximum(at - 1, 0)] + codes) / 2
    above = (grid[np.minimum(at + 1, len(grid) - 1)] + codes) / 2
    # The last code is reached by rounding; an E4M3 scale may be a 16th too small.
    more = 2.0**-4 * 1.1 if mode == "nvfp4" else 0.0
    below[at == 0] *= np.float32(1 + more)
    above[at == len(grid) - 1] *= np.float32(1 + more)
    scale = spread(_fp_scales(scales, mode), values.shape)
    edges = np.sort(np.stack([below * scale, above * scale]), axis=0)
    added = slack_of(values, slack) + 2 * np.float32(UNITS[dtype]) * np.abs(values)
    added += np.abs(codes) * np.float32(FLOORS[dtype])
    if mode == "nvfp4":
        # So far are scales from numbers smaller than an E4M3 has.
        added += np.abs(codes) * np.float32(2.0**-10) + 6 * np.float32(2.0**-10) * (scale == 0)
    with np.errstate(invalid="ignore"):
        within: Array = (values >= edges[0] - added) & (values <= edges[1] + added)
    return ~within


def _fp_scales(scales: Array, mode: str) -> Array:
    """float32: the values of scale bytes."""
    if mode == "nvfp4":
        return _E4M3_VALUES[scales]
    return np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)


def _e4m3_values() -> Array:
    """float32 [256]: the values of all E4M3 bytes."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    size = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    size[codes & 127 == 127] = np.nan
    return np.where(codes & 128, -size, size).astype(np.float32)


_E4M3_VALUES = _e4m3_values()
_E4M3 = np.unique(_E4M3_VALUES[~np.isnan(_E4M3_VALUES)])
_E2M1 = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


# Of the root mean square of what is rotated: errors of float32 additions, in any order.
_ROTATED = 2.0**-16


def mxtq_beyond(values: Array, parts: tuple[Array, Array], *, bits: int, slack: Slack) -> Array:
    """Values of MXTQ rows with another code than the nearest: float32 [rows, in].

    parts: packed codes and norms. All of a row is wrong if its norm is not that of the values.
    """
    packed, norms = parts
    columns = values.shape[1]
    wanted_packed, wanted_norms = mxtq_encode(values, "F32", bits=bits)
    wrong: Array = _codes(packed, columns, bits) != _codes(wanted_packed, columns, bits)
    norm, wanted = norms.astype(np.float32), wanted_norms.astype(np.float32)
    # One unit in the last place: tools add up the squares in several orders.
    apart = wanted * (2 * UNITS["F16"] + slack.relative) + 2 * FLOORS["F16"]
    lost = ~(np.abs(norm - wanted) <= apart)
    for row in np.flatnonzero(wrong.any(axis=1)):
        wrong[row] &= _far_from_limits(values[row], packed[row : row + 1], bits, slack)
    wrong[lost] = True
    return wrong


def _codes(packed: Array, columns: int, bits: int) -> Array:
    """uint8 [rows, columns]: the codes in words of 32 // bits each."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (packed[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    rows: Array = codes.astype(np.uint8).reshape(len(packed), -1)
    return rows[:, :columns]


def _far_from_limits(values: Array, packed: Array, bits: int, slack: Slack) -> Array:
    """Which values of a row are not even almost in the cells of their codes: bool [in]."""
    columns = len(values)
    rotated = _rotated(values.astype(np.float64) * signs(columns))
    norm = max(float(np.sqrt((rotated**2).sum())), 1e-10)
    centroids = codebook(columns, bits).astype(np.float64)
    limits = np.concatenate([[-np.inf], (centroids[1:] + centroids[:-1]) / 2, [np.inf]])
    codes = _codes(packed, columns, bits)[0]
    near = (_ROTATED + 8 * slack.relative) / sqrt(columns)
    line = rotated / norm
    far: Array = (line < limits[codes] - near) | (line > limits[codes + 1] + near)
    return far


def _rotated(line: Array) -> Array:
    """The Hadamard transform of a row, by the powers of two of its length: float64 [in]."""
    parts, start = [], 0
    size = 1 << (len(line).bit_length() - 1)
    while size:
        if len(line) - start >= size:
            block = line[start : start + size].reshape(-1, 1)
            while len(block) > 1:
                pairs = block.reshape(-1, 2, block.shape[1])
                added, taken = pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]
                block = np.concatenate([added, taken], axis=1)
            parts.append(block.reshape(-1) / sqrt(size))
            start += size
        size //= 2
    return np.concatenate(parts)


def hfq_beyond(values: Array, blocks: Array, code: int, slack: Slack) -> Array:
    """Values that are too far from the codes of HFQ blocks: float32 [n], n up to all of them.

    blocks: uint8 [blocks, bytes]. Of rotated groups, the values after the rotation count.
    """
    held = read_blocks(blocks, code)
    groups = np.zeros(held.codes.shape, np.float32)
    groups.reshape(-1)[: values.size] = values
    size = np.sqrt((groups.astype(np.float64) ** 2).mean(axis=1, keepdims=True))
    if held.rotated:
        groups = rotate_groups(groups)
    # Additions of a rotation, and what was rounded before it, are spread over the group.
    added = slack_of(groups, slack)
    if held.rotated:
        added = added + (size * (_ROTATED + 4 * slack.relative)).astype(np.float32)
    wrong = _beyond_levels if held.has_levels else _beyond_lines
    return wrong(groups, held, added).reshape(-1)[: values.size]


def _beyond_lines(groups: Array, held: HfqBlocks, added: Array) -> Array:
    """Of blocks with a scale and a lowest value: both stored whole; or a cut-off scale."""
    scale, low = held.numbers[:, :1], held.numbers[:, 1:2]
    with np.errstate(invalid="ignore", over="ignore"):
        decoded = held.codes * scale + (low if low.size else 0)
    step = np.abs(scale)
    if low.size:
        # A group of equal values has no step, and 1 stands for it.
        step = np.where((step == 1) & (held.codes.max(axis=1, keepdims=True) == 0), 0, step)
    else:
        # Cut off, not rounded: twice the unit.
        cut = step * np.float32(2 * UNITS["F16"]) + np.float32(2 * FLOORS["F16"])
        added = added + (np.abs(held.codes.astype(np.float32)) + 1) * cut
    with np.errstate(invalid="ignore"):
        return ~(np.abs(groups - decoded) <= step * np.float32(0.5 + _STEP_SLOP) + added)


def _beyond_levels(groups: Array, held: HfqBlocks, added: Array) -> Array:
    """Of blocks with levels: up to a quarter of a gap beyond the middle between two levels.

    All values of a level are wrong if it is farther from their mean than half-way to the next.
    """
    levels, codes = held.numbers, held.codes.astype(np.intp)
    own = np.take_along_axis(levels, codes, axis=1)
    added = added + 2 * UNITS["F16"] * np.abs(own) + 2 * FLOORS["F16"]
    wrong: Array = ~np.isfinite(own)
    lost, best = np.abs(groups - own), np.full(groups.shape, np.inf, np.float32)
    nearest = own
    for level in levels.T[:, :, None]:
        distance = np.abs(groups - level)
        nearest = np.where(distance < best, level, nearest)
        best = np.fmin(best, distance)
    with np.errstate(invalid="ignore"):
        wrong |= ~(lost - best <= np.abs(own - nearest) / 2 + added)
    wrong |= np.take_along_axis(_moved(groups, codes, levels), codes, axis=1) > added
    return wrong


def _moved(groups: Array, codes: Array, levels: Array) -> Array:
    """How far each level is from the mean of its values, beyond half-way to the next level."""
    n = levels.shape[1]
    apart = np.zeros(levels.shape)
    for k in range(n):
        mine = codes == k
        counts = mine.sum(axis=1)
        means = (groups * mine).sum(axis=1, dtype=np.float64) / np.maximum(counts, 1)
        others = np.delete(levels, k, axis=1)
        with np.errstate(invalid="ignore"):
            gap = np.fmin.reduce(np.abs(others - levels[:, k : k + 1]), axis=1)
            apart[:, k] = np.where(counts, np.abs(levels[:, k] - means) - gap / 2, 0)
    return apart
