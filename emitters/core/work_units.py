"""A build as a list of independent units, each a block of rows of one view of the source."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from emitters.core.statistics import Contexts
from emitters.tensor_io.view_rows import LONGEST_ROW, view_nbytes
from policy_dsl.diagnostics import fail
from policy_dsl.formats import Context
from policy_dsl.plan import Module, Plan, PlannedTensor
from policy_dsl.quantities import both_units
from policy_dsl.treatments import Coded, Stored, describe
from policy_dsl.views import View, stacked

MIB = 2**20
# A unit reads at most 8 Mi values: 32 MiB of source, and blocks that caches still help with.
BLOCK_VALUES = 8 * 2**20
SMALLEST_BLOCK = LONGEST_ROW
# Source, values and encoded parts of one block, in the worst case.
_NBYTES_PER_VALUE = 12
# Interpreter, numpy, numba and its compiler.
_LIBRARIES_NBYTES = 256 * MIB

Spans = tuple[tuple[int, int], ...]


class Output(NamedTuple):
    """What the rows of a module become, and the tensors that they are written into.

    dtype: of the values that are encoded or written. together: rows that are coded as one.
    n_rows: of the module.
    """

    name: str
    treatment: Stored
    dtype: str
    together: int
    n_rows: int
    tensors: tuple[PlannedTensor, ...]


class Unit(NamedTuple):
    """Rows of a view that become rows of a module: plain data, all that a worker needs of a plan.

    module, source: its place in the plan, and that of the view among the module's. first,
    n_rows: of the view; single values where `is_split` says so. at: the first row of the
    module. context: what its method computed for the view, None of plain values.
    """

    module: int
    source: int
    view: View
    first: int
    n_rows: int
    at: int
    output: Output
    context: Context | None

    @property
    def span(self) -> tuple[int, int]:
        """The rows of the module, [start, stop)."""
        return self.at, self.at + self.n_rows

    @property
    def source_nbytes(self) -> int:
        """Bytes of weights that it reads."""
        return view_nbytes(self.view, self.n_rows)


def plan_units(
    plan: Plan,
    contexts: Contexts | None,
    block_values: int,
    done: Mapping[int, Spans] = MappingProxyType({}),
) -> Iterator[Unit]:
    """All units in the order of the plan, without the output rows in `done`.

    contexts: asked for each view when its first unit comes, and not kept: as many are alive as
    views have units in flight. None: the units are only counted. done: module -> sorted,
    separate spans [start, stop) of output rows that are finished.
    """
    for index, module in enumerate(plan.modules):
        spans = done.get(index, ())
        output = _output(module)
        # No block spans two sources: the experts of a stack are apart.
        for source, (view, above, n_rows) in enumerate(stacked(_worked_on(module))):
            together = view.values_read(module.together)
            # Rows that are coded as one stay in one block.
            step = max(1, block_values // max(1, together)) * module.together
            missing = list(_missing((above, above + n_rows), spans))
            context = contexts.of(index, source) if contexts and missing else None
            for start, stop in missing:
                for at in range(start, stop, step):
                    count = min(step, stop - at)
                    yield Unit(index, source, view, at - above, count, at, output, context)


def total_source_nbytes(plan: Plan) -> int:
    """Bytes of weights that all units together read."""
    return sum(view_nbytes(view, view.n_rows) for module in plan.modules for view in module.sources)


def is_split(module: Module) -> bool:
    """Whether a block of a module may end within a row: plain values in rows that are long.

    The plan alone decides, so that the journal of a build with other blocks can be resumed.
    """
    width = module.shape[-1] if module.shape else 1
    # In a bias the experts that were added make the row longer than the source's.
    is_padded_row = module.added > 0 and len(module.shape) == 1
    if width <= LONGEST_ROW or is_padded_row or isinstance(module.treatment, Coded):
        return False
    # A scale belongs to a block of a row.
    return all(view.scale is None for view in module.sources)


def merge_spans(spans: Iterable[tuple[int, int]]) -> Spans:
    """The spans sorted, those that touch or overlap joined."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def fit(jobs: int, max_memory: int | None, plan: Plan | None = None) -> tuple[int, int]:
    """How many workers with blocks of how many values keep to `max_memory` bytes.

    plan: what is built; its longest row that is coded as one is the smallest block. Blocks
    shrink first, then workers become fewer.
    Raises: PolicyError if not even one worker with the smallest blocks fits.
    """
    if max_memory is None:
        return jobs, BLOCK_VALUES
    free = max_memory - _LIBRARIES_NBYTES
    sizes = ((_values_together(module), module) for module in plan.modules) if plan else ()
    whole, largest = max(sizes, key=lambda pair: pair[0], default=(0, None))
    fewest = max(SMALLEST_BLOCK, whole) * _NBYTES_PER_VALUE
    if free < fewest:
        needed = both_units(_LIBRARIES_NBYTES + fewest)
        notes = [_why_whole(largest, whole)] if largest and whole > SMALLEST_BLOCK else []
        given = both_units(max_memory)
        raise fail("too-little-memory", notes=notes, given=given, needed=needed)
    # Fewer cores cost more time than smaller blocks do.
    workers = min(jobs, free // fewest)
    return workers, min(BLOCK_VALUES, free // workers // _NBYTES_PER_VALUE)


def _output(module: Module) -> Output:
    values = is_split(module)
    return Output(
        module.name,
        module.treatment,
        module.dtype,
        module.together,
        prod(module.shape if values else module.shape[:-1]),
        # Constants are written with the header: rows have no part in them.
        tuple(tensor for tensor in module.tensors if not tensor.is_constant),
    )


def _worked_on(module: Module) -> Iterable[View]:
    """The views of a module as blocks of their rows are read."""
    if is_split(module):
        return [view.as_values() for view in module.sources]
    return module.sources


def _values_together(module: Module) -> int:
    """Values of a module that must be in memory at once."""
    views = _worked_on(module)
    return max((view.values_read(module.together) for view in views), default=0)


def _why_whole(module: Module, values: int) -> str:
    """Why a module has no smaller blocks."""
    what = describe(module.treatment) if isinstance(module.treatment, Coded) else "FP8"
    rows = "a row" if module.together == 1 else f"{module.together} rows"
    return f"{module.name}: {what} takes {rows}, {values} values, at once"


def _missing(rows: tuple[int, int], done: Spans) -> Iterator[tuple[int, int]]:
    """The spans of these output rows, [start, stop), that `done` leaves open."""
    at, stop = rows
    # An earlier run may have used other blocks, so spans need not end where blocks do.
    for start, end in done:
        if end > at and start < stop:
            if start > at:
                yield at, start
            at = end
    if at < stop:
        yield at, stop
