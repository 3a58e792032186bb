"""How far values are from what they decode to: sums of differences, and bounds of rounding.

Sums: lane k takes the values k, k + 16, …: 16 values are added side by side, and the order of
every addition is fixed.
Bounds: each `…_beyond` takes float32 values and what is stored for them, and says which values no
rounding to nearest under these scales would have taken there: bool, of the values' shape. Beside
half a step, they count what is rounded on the way: stored scales, products, quotients. NaN is
never within a bound. What is rotated is compared after the rotation. See `docs/verifying.md`.
"""

from dataclasses import astuple, dataclass, replace
from math import sqrt
from operator import add

import numpy as np

from emitters.numerics import Array
from emitters.numerics.jit import device, kernel, reads, writes
from policy_dsl.formats import Slack

_LANES = 16
# Largest relative error of rounding to nearest, and largest error of the smallest numbers.
UNITS = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
FLOORS = {"BF16": 2.0**-134, "F16": 2.0**-25, "F32": 2.0**-150}
# What float32 arithmetic adds: relative to a value, and in steps.
_SLOP, STEP_SLOP = 2.0**-20, 2.0**-10
# Relative error from which next to nothing is left, where squares are so small a share.
_NOTHING, _FEW = 0.99, 0.05

Width = tuple[int, int]  # bits, and values in a group


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over pairs of finite values: squares of source, decoded and difference; products.

    largest: of the absolute differences. values: all pairs; not_finite: those left out.
    """

    source: float = 0.0
    decoded: float = 0.0
    difference: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    values: int = 0
    not_finite: int = 0

    def __add__(self, other: "Sums") -> "Sums":
        """The sums of both."""
        added = Sums(*map(add, astuple(self), astuple(other)))
        return replace(added, largest=max(self.largest, other.largest))

    @property
    def relative(self) -> float | None:
        """Relative Frobenius error |W - D| / |W|; None where the source is all zeros."""
        return sqrt(self.difference / self.source) if self.source else None

    @property
    def cosine(self) -> float | None:
        """Cosine of source and decoded values; None where one is all zeros."""
        # Two roots, because the product of the squares may overflow.
        norm = sqrt(self.source) * sqrt(self.decoded)
        return self.product / norm if norm else None

    @property
    def nothing_left(self) -> bool:
        """Whether decoded values are zero, or next to all are, and those of the source not."""
        few = self.decoded <= _FEW * self.source
        return self.relative is not None and self.relative >= _NOTHING and few


@device
def _add_lanes(count: int, true: Array, decoded: Array, sums: Array) -> None:
    """Add `count` pairs, at most 16, to the sums [6, 16], in the order of `Sums`."""
    nothing = np.float64(0)
    for i in range(count):
        w, d = np.float64(true[i]), np.float64(decoded[i])
        difference = np.float64(abs(d - w))
        # Infinities and NaN fail this comparison, and then count as nothing but a loss.
        kept = difference < np.inf
        w, d = (w, d) if kept else (nothing, nothing)
        difference = difference if kept else nothing
        sums[0, i] += w * w
        sums[1, i] += d * d
        sums[2, i] += difference * difference
        sums[3, i] += w * d
        sums[4, i] = max(sums[4, i], difference)
        sums[5, i] += 0.0 if kept else 1.0


@kernel(reads("float32"), reads("float32"), writes("float64"))
def _add_up(true: Array, decoded: Array, sums: Array) -> None:
    lanes = sums.reshape(6, _LANES)
    whole = true.shape[0] // _LANES * _LANES
    for start in range(0, whole, _LANES):
        stop = start + _LANES
        _add_lanes(_LANES, true[start:stop], decoded[start:stop], lanes)
    _add_lanes(true.shape[0] - whole, true[whole:], decoded[whole:], lanes)


def distance(true: Array, decoded: Array) -> Sums:
    """The sums of two float32 arrays. Raises: ValueError if they are not, or differ in size."""
    if true.size != decoded.size:
        raise ValueError(f"{true.size} true values and {decoded.size} decoded ones")
    sums = np.zeros((6, _LANES))
    _add_up(true, decoded, sums)
    source, squares, difference, product, _, lost = map(float, sums.sum(axis=1))
    largest = float(sums[4].max())
    return Sums(source, squares, difference, product, largest, true.size, int(lost))


def reach_of(codes: Array, bits: int, ends: tuple[float, float]) -> Array:
    """Steps from each code, 0 .. 2**bits - 1, to the farthest value that rounds to it: float32.

    ends: how far values may be from the first and from the last code, instead of half a step.
    """
    reach = np.full(codes.shape, 0.5 + STEP_SLOP, np.float32)
    for end, code in zip(ends, (0, (1 << bits) - 1), strict=True):
        reach[codes == code] = end + STEP_SLOP
    return reach


def outside(values: Array, decoded: Array, allowed: Array) -> Array:
    """Where values are farther than is allowed from what they decode to, or not finite."""
    with np.errstate(invalid="ignore"):
        within: Array = np.abs(decoded - values) <= allowed
    return ~within


def spread(of_groups: Array, values: Array) -> Array:
    """[rows, in]: what is one number for each group, [rows, groups], for each of the values."""
    columns = values.shape[1]
    return np.repeat(of_groups, -(-columns // of_groups.shape[1]), axis=1)[:, :columns]


def slack_of(values: Array, slack: Slack) -> Array:
    """What was rounded before the values were coded, for each of them."""
    return np.abs(values) * np.float32(slack.relative + _SLOP) + np.float32(slack.floor)
