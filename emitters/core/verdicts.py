"""What a comparison with a source means: which matrices are right, and what is wrong.

Of what rounding to nearest made, every value has a bound. A bundle without a record does not
say what chose its codes: if the codes of most of its rows are all nearest ones, rounding did.
Else a solver may have, and each matrix as a whole must be near its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from types import MappingProxyType

from emitters.core.record import BundleModule
from emitters.numerics.reach import distance
from emitters.numerics.value_types import Array
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.quantities import counted
from policy_dsl.treatments import coded, describe

# How a module is judged.
EQUAL, AGAIN, NEAREST = "equal", "coded again", "nearest codes"
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


# How a matrix is judged whose codes a solver chose.
WHOLE = "as a whole"
# Bits -> largest relative error and smallest cosine of a matrix that a solver coded: half again
# as much as GPTQ was seen to lose of heavy-tailed weights with correlated inputs.
SOLVED: Mapping[int, tuple[float, float]] = MappingProxyType(
    {
        8: (0.1, 0.99),
        6: (0.25, 0.97),
        5: (0.4, 0.92),
        4: (0.7, 0.8),
        3: (1.2, 0.5),
        2: (2.0, 0.25),
        1: (2.0, 0.2),
    }
)
# Nothing is coded so badly; values of another matrix come to less in all but tiny ones.
LEAST_COSINE = 0.1
_EXACT: Mapping[str, str] = MappingProxyType({EQUAL: "values-differ", AGAIN: "codes-differ"})
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Compared:
    """A matrix of a module, or a plain tensor, after its comparison.

    way: how it is judged. is_added: whether it is an expert's that the source does not have.
    """

    name: str
    module: BundleModule
    way: str
    tally: Tally
    is_added: bool = False


def judged(compared: Sequence[Compared]) -> tuple[tuple[Compared, ...], tuple[Diagnostic, ...]]:
    """The same with how each is judged in the end, and a finding for each kind of defect."""
    solved = _is_solved(compared)
    settled = tuple(
        replace(one, way=WHOLE) if solved and one.way == NEAREST else one for one in compared
    )
    return settled, tuple(_findings(settled))


def _is_solved(compared: Sequence[Compared]) -> bool:
    """Whether a solver chose codes: not even half of the rows have only nearest ones."""
    rows = [(one.tally.rows, one.tally.sound) for one in compared if one.way == NEAREST]
    return 2 * sum(sound for _, sound in rows) < sum(count for count, _ in rows)


def _findings(compared: Sequence[Compared]) -> Iterator[Diagnostic]:
    kinds: dict[str, list[Compared]] = {}
    for one in compared:
        code = _defect(one)
        if code is not None:
            kinds.setdefault(code, []).append(one)
    for code, found in kinds.items():
        shown = [_EXAMPLES[code](one) for one in found[:_SHOWN]]
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        yield diagnostic(
            code,
            notes=[*shown, *more],
            values=counted(sum(one.tally.wrong for one in found), "value"),
            modules=counted(len(found), "tensor or matrix", "tensors or matrices"),
        )
    bad = [one for one in compared if one.tally.sums.not_finite]
    if bad:
        names = ", ".join(one.name for one in bad[:_SHOWN])
        more_names = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        values = counted(sum(one.tally.sums.not_finite for one in bad), "value")
        yield diagnostic("non-finite-decoded", tensor=names + more_names, values=values)


def _defect(one: Compared) -> str | None:
    """The code of what is wrong with a matrix, or None."""
    sums = one.tally.sums
    if sums.nothing_left:
        return "nothing-left"
    exact = "added-not-zero" if one.is_added else _EXACT.get(one.way)
    if exact is not None:
        return exact if one.tally.wrong else None
    cosine, relative = sums.cosine, sums.relative
    if cosine is None or relative is None:
        # A source of zeros, and something decoded, or neither.
        return "unlike-source" if sums.decoded else None
    if cosine < LEAST_COSINE:
        return "unlike-source"
    if one.way == NEAREST:
        return "codes-not-nearest" if one.tally.wrong else None
    largest, least = _bounds(one)
    return "unlike-source" if relative > largest or cosine < least else None


def _bounds(one: Compared) -> tuple[float, float]:
    bits = coded(one.module.treatment).bits
    return SOLVED[max(width for width in SOLVED if width <= bits)]


def _place(one: Compared) -> str:
    """The first wrong value of a matrix, and how many there are."""
    row, column = one.tally.at or (0, 0)
    # The name has the number of the matrix; rows are counted through all of the module.
    row %= max(1, prod(one.module.shape[-2:-1]))
    values = counted(one.tally.wrong, "value")
    source = f", of {one.tally.source}" if one.tally.source else ""
    return f"{one.name}: {values}, the first at row {row}, column {column}{source}"


def _added(one: Compared) -> str:
    return f"{_place(one)}; this expert was added and must decode to zeros"


def _likeness(one: Compared) -> str:
    sums = one.tally.sums
    known = sums.relative, sums.cosine
    figures = ["-" if figure is None else f"{figure:.4f}" for figure in known]
    text = f"{one.name}: relative error {figures[0]}, cosine {figures[1]}"
    if one.way != WHOLE or sums.nothing_left:
        return text
    largest, least = _bounds(one)
    treatment = describe(one.module.treatment)
    return f"{text}; {treatment} has at most {largest}, and at least {least}"


_EXAMPLES: Mapping[str, Callable[[Compared], str]] = MappingProxyType(
    {
        "added-not-zero": _added,
        "nothing-left": _likeness,
        "values-differ": _place,
        "codes-differ": _place,
        "codes-not-nearest": _place,
        "unlike-source": _likeness,
    }
)
