"""How far values may be from what they decode to, in codes of rotated rows and HFQ blocks.

What is rotated is compared as it was coded: after the rotation. See `reach`.
Lloyd's levels are the means of their values, and codes are nearest to the levels before their
last move: hence the larger bounds.
"""

from __future__ import annotations

from math import sqrt

import numpy as np

from emitters.numerics.hfq import HfqBlocks, read_blocks, rotate_groups
from emitters.numerics.mxtq import mxtq_encode
from emitters.numerics.mxtq_tables import codebook, signs
from emitters.numerics.reach import FLOORS, UNITS, Slack, slack_of
from emitters.numerics.value_types import Array

# Of the root mean square of what is rotated: errors of float32 additions, in any order.
_ROTATED = 2.0**-16
_STEP_SLOP = 2.0**-10


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
