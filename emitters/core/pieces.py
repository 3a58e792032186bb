"""The work of a comparison: runs of rows, none of which leaves a matrix of the source."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import TypeVar

from emitters.core.record import BundleModule
from emitters.tensor_io.read import columns
from emitters.tensor_io.view_rows import LONGEST_ROW
from policy_dsl.roles.classify import ModelTensor
from policy_dsl.treatments import Coded
from policy_dsl.views import Values, stacked

# As many values as a build's unit: few pieces, and small ones where a matrix is small.
_PIECE_VALUES = 8 * 2**20
_Given = TypeVar("_Given")
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` rows of a source's tensor from `first`, and of a module from `at`.

    whole: the module as the bundle has it; module, tensor: as their rows are compared, None of
    rows that no source has, those of experts that were added. matrix: the number of the
    module's matrix in which they are.
    """

    whole: BundleModule
    module: BundleModule
    tensor: ModelTensor | None
    matrix: int
    first: int
    count: int
    at: int

    @property
    def name(self) -> str:
        """The module's name, with the number of the matrix if it has several."""
        shape = self.whole.shape
        stacked = len(shape) > 2 and shape[0] > 1
        return f"{self.whole.name}[{self.matrix}]" if stacked else self.whole.name

    def place(self, at: tuple[int, int]) -> tuple[int, int]:
        """Row and column, in the whole module, of the value at a row and column of `module`."""
        row, column = at
        return divmod(row * columns(self.module.shape) + column, columns(self.whole.shape))

    def source_place(self, at: tuple[int, int]) -> str:
        """Where in the source the value at a row and column of `module` is: `name[3, 17]`."""
        row, column = at[0] - self.at + self.first, at[1]
        # A row of the module is longer where experts were added.
        if self.tensor is None or column >= self.tensor.view.width:
            return ""
        place = self.tensor.view.place(row, column)
        return f"{self.tensor.source.name}{list(place)}"


def pieces_of(
    whole: BundleModule, stack: tuple[ModelTensor, ...], block_rows: Callable[[BundleModule], int]
) -> Iterator[Piece]:
    """All rows of a module that fits its stack.

    block_rows(module): how many of them are decoded together.
    """
    module, tensors = _in_stretches(whole, stack)
    step = block_rows(module)
    height = max(1, prod(whole.shape[-2:-1]) * columns(whole.shape) // columns(module.shape))
    several = max(1, _PIECE_VALUES // columns(module.shape) // step) * step
    placed = zip(tensors, stacked(tensor.view for tensor in tensors), strict=True)
    for tensor, (_, at, rows) in placed:
        for start in range(0, rows, height):
            stop = min(rows, start + height)
            for first in range(start, stop, several):
                row, count = at + first, min(several, stop - first)
                yield Piece(whole, module, tensor, row // height, first, count, row)
    total = max(1, prod(module.shape[:-1]))
    if module.added and len(module.shape) > 1:
        first = total // module.shape[0] * (module.shape[0] - module.added)
        for start in range(first, total, height):
            stop = min(total, start + height)
            for at in range(start, stop, several):
                count = min(several, stop - at)
                yield Piece(whole, module, None, at // height, 0, count, at)


def tensors_in_stretches(*tensors: ModelTensor) -> tuple[ModelTensor, ...]:
    """Tensors of a source as their rows are read side by side.

    In stretches of values where all rows are long ones; scales belong to blocks of a row.
    """
    if any(tensor.scale is not None or columns(tensor.shape) <= LONGEST_ROW for tensor in tensors):
        return tensors
    return tuple(
        replace(tensor, shape=(prod(tensor.shape), 1), operations=(*tensor.operations, Values()))
        for tensor in tensors
    )


def _in_stretches(
    module: BundleModule, stack: tuple[ModelTensor, ...]
) -> tuple[BundleModule, tuple[ModelTensor, ...]]:
    """The module of a bundle and what it stands for, as their rows are compared."""
    # In a bias the experts that were added make the row longer than the source's.
    is_padded_row = module.added > 0 and len(module.shape) == 1
    is_short = columns(module.shape) <= LONGEST_ROW or is_padded_row
    if isinstance(module.treatment, Coded) or is_short:
        return module, stack
    split = tensors_in_stretches(*stack)
    if stack and split == stack:
        return module, stack
    tensors = {
        part: held._replace(shape=(prod(held.shape), 1)) for part, held in module.tensors.items()
    }
    added = module.added * prod(module.shape[1:])
    return replace(module, shape=(prod(module.shape), 1), tensors=tensors, added=added), split


def in_order(
    make: Callable[[_Given], _Made], given: Iterable[_Given], *, jobs: int
) -> Iterator[_Made]:
    """What `make` makes of everything, in order; by `jobs` threads, few results ahead."""
    rest = iter(given)
    with ThreadPoolExecutor(jobs, "compare") as workers:
        running: deque[Future[_Made]] = deque()
        while True:
            for one in islice(rest, 4 * jobs - len(running)):
                running.append(workers.submit(make, one))
            if not running:
                return
            yield running.popleft().result()
