"""What is counted when a bundle's values are compared with those of a source."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from emitters.numerics.reach import distance
from emitters.numerics.value_types import Array

# Relative error from which next to nothing is left, where squares are so small a share.
_NOTHING, _FEW = 0.99, 0.05


@dataclass(frozen=True, slots=True)
class Sums:
    """What blocks add up to: squares of source, decoded and difference; products; maximum."""

    source: float = 0.0
    decoded: float = 0.0
    difference: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    values: int = 0
    not_finite: int = 0

    @classmethod
    def of(cls, wanted: Array, found: Array) -> Sums:
        """The sums of two float32 arrays of one shape: of the source, and as decoded."""
        apart = distance(wanted, found)
        return cls(
            source=apart.true,
            decoded=apart.decoded,
            difference=apart.difference,
            product=apart.product,
            largest=apart.largest,
            values=apart.values,
            not_finite=apart.not_finite,
        )

    def __add__(self, other: Sums) -> Sums:
        """The sums of both."""
        return Sums(
            self.source + other.source,
            self.decoded + other.decoded,
            self.difference + other.difference,
            self.product + other.product,
            max(self.largest, other.largest),
            self.values + other.values,
            self.not_finite + other.not_finite,
        )

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
        relative = self.relative
        few = self.decoded <= _FEW * self.source
        return relative is not None and relative >= _NOTHING and few


@dataclass(frozen=True, slots=True)
class Tally:
    """The comparison of some rows: their sums, and which values are not what they must be.

    wrong: how many; at: row and column of the first one; source: its place there, in words.
    rows: those compared; sound: those of them without a wrong value.
    """

    sums: Sums = Sums()
    wrong: int = 0
    at: tuple[int, int] | None = None
    rows: int = 0
    sound: int = 0
    source: str = ""

    def __add__(self, other: Tally) -> Tally:
        """The tally of both; `other` is about rows after these."""
        return Tally(
            self.sums + other.sums,
            self.wrong + other.wrong,
            other.at if self.at is None else self.at,
            self.rows + other.rows,
            self.sound + other.sound,
            other.source if self.at is None else self.source,
        )

    @classmethod
    def of(cls, sums: Sums, wrong: Array, first: int) -> Tally:
        """The tally of a block. wrong: bool [rows, columns]; first: the number of its row 0."""
        rows = wrong.any(axis=1)
        count, place = int(wrong.sum()), None
        if count:
            row = int(rows.argmax())
            place = first + row, int(wrong[row].argmax())
        return cls(sums, count, place, len(wrong), len(wrong) - int(rows.sum()))
