"""Tensors of a model as views of stored tensors: a short list of operations on rows.

An operation maps coordinates only: shape(before) -> the shape after it, and rows(map, shape
before) -> its map. A block of rows needs a bounded part of the source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from policy_dsl.inventory import TensorInfo

Shape = tuple[int, ...]


class RowMap(NamedTuple):
    """Where the rows of a view are in its source, which is seen as [rows, last axis].

    outer: the source's row (column, if `transposed`) of each row of the view, or of each group
    of its rows where `shape` says so. inner: the columns (rows) of its values.
    """

    outer: Sequence[int]
    inner: Sequence[int]
    transposed: bool = False


class Rectangle(NamedTuple):
    """A part of a source, seen as [rows, last axis], that holds whole values of a view.

    In the order of the view: row by row, or column by column if `transposed`.
    """

    rows: Sequence[int]
    columns: Sequence[int]
    transposed: bool


@dataclass(frozen=True, slots=True)
class Expert:
    """Entry `number` along the first axis."""

    number: int

    def shape(self, shape: Shape) -> Shape:
        return shape[1:]

    def rows(self, before: RowMap, shape: Shape) -> RowMap:
        return Slice(self.number, 1).rows(before, shape)


@dataclass(frozen=True, slots=True)
class Slice:
    """`count` entries along the first axis, from `first`."""

    first: int
    count: int

    def shape(self, shape: Shape) -> Shape:
        return self.count, *shape[1:]

    def rows(self, before: RowMap, shape: Shape) -> RowMap:
        size = len(before.outer) // shape[0]
        return before._replace(outer=before.outer[self.first * size :][: self.count * size])


@dataclass(frozen=True, slots=True)
class Alternate:
    """Every `step`-th row of a matrix, from `first`: rows of several matrices take turns."""

    first: int
    step: int

    def shape(self, shape: Shape) -> Shape:
        return len(range(self.first, shape[0], self.step)), *shape[1:]

    def rows(self, before: RowMap, _shape: Shape) -> RowMap:
        return before._replace(outer=before.outer[self.first :: self.step])


@dataclass(frozen=True, slots=True)
class Transposed:
    """The columns of a matrix as rows."""

    def shape(self, shape: Shape) -> Shape:
        return shape[1], shape[0]

    def rows(self, before: RowMap, _shape: Shape) -> RowMap:
        return RowMap(before.inner, before.outer, not before.transposed)


@dataclass(frozen=True, slots=True)
class Picked:
    """These entries alone, ascending: of the first axis, or of a single row its values."""

    entries: tuple[int, ...]

    def shape(self, shape: Shape) -> Shape:
        if prod(shape[:-1]) == 1:
            return *shape[:-1], len(self.entries)
        return len(self.entries), *shape[1:]

    def rows(self, before: RowMap, shape: Shape) -> RowMap:
        if prod(shape[:-1]) == 1:
            return before._replace(inner=tuple(before.inner[at] for at in self.entries))
        size = len(before.outer) // shape[0]
        kept = (before.outer[at * size :][:size] for at in self.entries)
        return before._replace(outer=tuple(row for rows in kept for row in rows))


@dataclass(frozen=True, slots=True)
class Columns:
    """Every `step`-th entry of the last axis, from `first`, up to `stop`."""

    first: int
    stop: int
    step: int = 1

    def shape(self, shape: Shape) -> Shape:
        return *shape[:-1], len(range(self.first, self.stop, self.step))

    def rows(self, before: RowMap, _shape: Shape) -> RowMap:
        return before._replace(inner=before.inner[self.first : self.stop : self.step])


@dataclass(frozen=True, slots=True)
class Reshaped:
    """The first values, in their order, in rows of another length; no other operation follows.

    As [values, 1] every value is a row of its own: a vector is one row, however long it is, and
    what is not coded needs no row whole.
    """

    sizes: Shape

    def shape(self, _shape: Shape) -> Shape:
        return self.sizes

    def rows(self, before: RowMap, _shape: Shape) -> RowMap:
        return before  # `View.rectangles` counts the values in the same rows.


Operation = Expert | Slice | Alternate | Transposed | Picked | Columns | Reshaped


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of the model as operations on a stored one; without any it is the stored one.

    scale: the FP8 block scales of `tensor`, in its coordinates. added: to every value, in the
    dtype of `tensor`.
    """

    tensor: TensorInfo
    scale: TensorInfo | None = None
    operations: tuple[Operation, ...] = ()
    added: float = 0.0

    @property
    def shape(self) -> Shape:
        """Its shape, logical."""
        shape = self.tensor.shape
        for one in self.operations:
            shape = one.shape(shape)
        return shape

    @property
    def n_rows(self) -> int:
        """Its rows, seen as [rows, last axis]."""
        return prod(self.shape[:-1])

    @property
    def width(self) -> int:
        """Values of one of its rows; 1 for a scalar."""
        return prod(self.shape[-1:])

    def then(self, *operations: Operation) -> View:
        """The view with more operations, after its own."""
        return replace(self, operations=(*self.operations, *operations))

    def as_values(self) -> View:
        """The view with every value as a row of its own."""
        return self.then(Reshaped((prod(self.shape), 1)))

    def rectangles(self, first: int, count: int) -> Iterator[Rectangle]:
        """The parts of the source that hold `count` rows from `first`, in their order."""
        shape = self.tensor.shape
        rows = RowMap(range(prod(shape[:-1])), range(prod(shape[-1:])))
        for operation in self.operations:
            rows, shape = operation.rows(rows, shape), operation.shape(shape)
        for part in self._cuts(rows, first, count):
            for run in _runs(part.outer):
                sides = (part.inner, run) if rows.transposed else (run, part.inner)
                yield Rectangle(*sides, rows.transposed)

    def values_read(self, count: int) -> int:
        """Values of the source that are read, at most, for `count` rows that follow each other."""
        steps = (one.step for one in self.operations if isinstance(one, Alternate | Columns))
        return count * self.width * prod(steps)

    def place(self, row: int, column: int) -> Shape:
        """Where in the source a value is: the index along each axis of the stored tensor."""
        for rows, columns, transposed in self.rectangles(row, 1):
            at, number = divmod(column, len(rows if transposed else columns))
            if at < len(columns if transposed else rows):
                row, column = (number, at) if transposed else (at, number)
                return index_of(self.tensor.shape, rows[row], columns[column])
            column -= len(rows) * len(columns)
        raise IndexError(f"{self.shape} has no such value")

    def _cuts(self, rows: RowMap, at: int, count: int) -> Iterator[RowMap]:
        """Whole rows; if reshaped, the end of a row, whole rows, the beginning of one."""
        stop, width = at + count, len(rows.inner)
        if not self.operations or not isinstance(self.operations[-1], Reshaped):
            yield rows._replace(outer=rows.outer[at:stop])
            return
        at, stop = at * self.width, stop * self.width
        while at < stop:
            row, column = divmod(at, width)
            whole = (stop - at) // width if column == 0 else 0
            end = column + min(width - column, stop - at)
            inner = rows.inner if whole else rows.inner[column:end]
            yield RowMap(rows.outer[row : row + max(1, whole)], inner, rows.transposed)
            at += whole * width or end - column


class Cut(NamedTuple):
    """`size` rows from `first` of each of `n_pieces` stretches of `period`, or their columns."""

    first: int
    size: int
    period: int
    n_pieces: int
    transposed: bool = False

    def views(self, view: View) -> Iterator[View]:
        """Each piece of a view."""
        turned = (Transposed(),) if self.transposed else ()
        for at in range(self.n_pieces):
            yield view.then(Slice(at * self.period + self.first, self.size), *turned)


def stacked(views: Iterable[View]) -> Iterator[tuple[View, int, int]]:
    """Each of several views, one below the other: it, its first row among all, how many it has."""
    first = 0
    for view in views:
        count = view.n_rows
        yield view, first, count
        first += count


def index_of(shape: Shape, row: int, column: int) -> Shape:
    """The index of a value along each axis, from its row and column in [rows, last axis]."""
    found = [column] if shape else []
    for size in reversed(shape[:-1]):
        row, at = divmod(row, size)
        found.append(at)
    return tuple(reversed(found))


def _runs(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    """The numbers, cut where one does not follow another: neighbours are read at once."""
    if isinstance(numbers, range):
        yield numbers
        return
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield range(numbers[start], numbers[at - 1] + 1)
            start = at
