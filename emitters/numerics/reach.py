"""How far values may be from what they decode to, where codes are the nearest ones.

Each function takes the values and what is stored for them, and says which values no rounding
to nearest under these scales would have taken there: bool, of the values' shape. Beside half
a step, the bounds count what is rounded on the way: stored scales, products, quotients.
NaN is never within a bound. The bounds are those of `docs/verifying.md`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from emitters.numerics.affine import affine_decode
from emitters.numerics.fp_modes import fp_decode
from emitters.numerics.gptq_layout import GptqParts, gptq_decode, unpack_columns
from emitters.numerics.rounding import to_float32
from emitters.numerics.value_types import Array

Width = tuple[int, int]  # bits, and values in a group

# Largest relative error of rounding to nearest, and largest error of the smallest numbers.
UNITS = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
FLOORS = {"BF16": 2.0**-134, "F16": 2.0**-25, "F32": 2.0**-150}
# What float32 arithmetic adds: relative to a value, and in steps.
_SLOP, _STEP_SLOP = 2.0**-20, 2.0**-10
_HALF_REACH = 0.5 + _STEP_SLOP


class Slack(NamedTuple):
    """What was rounded before: relative error, and the smallest error, of the values coded.

    arithmetic: relative error of a tool's operations, if it computes in the source's type.
    """

    relative: float = 0.0
    floor: float = 0.0
    arithmetic: float = 0.0


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
