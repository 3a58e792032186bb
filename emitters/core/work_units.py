"""A build as a list of independent units, each a block of rows of one view of the source."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import NamedTuple

from emitters.tensor_io.view_rows import LONGEST_ROW, view_nbytes
from policy_dsl.diagnostics import fail
from policy_dsl.formats import Context
from policy_dsl.plan import Module, Plan, PlannedTensor
from policy_dsl.quantities import both_units
from policy_dsl.treatments import Coded, Stored, describe
from policy_dsl.views import View, stacked

# A unit reads at most 8 Mi values: 32 MiB of source, and blocks that caches still help with.
BLOCK_VALUES = 8 * 2**20
# Source, values and encoded parts of one block, in the worst case.
_NBYTES_PER_VALUE = 12
# Interpreter, numpy, numba and its compiler.
_LIBRARIES_NBYTES = 256 * 2**20

Spans = tuple[tuple[int, int], ...]
# A module and one of its sources, both by their indices -> what its method computes once.
Contexts = Callable[[int, int], Context | None]


class Output(NamedTuple):
    """What the `n_rows` rows of a module become, and the tensors that they are written into.

    dtype: of the values that are encoded or written. together: rows that are coded as one.
    """

    treatment: Stored
    dtype: str
    together: int
    n_rows: int
    tensors: tuple[PlannedTensor, ...]


class Unit(NamedTuple):
    """Rows of a view that become rows of a module: plain data, all that a worker needs of a plan.

    module, source: indices of the module, and of the view among its sources. first, n_rows: of the
    view; single values where it is split into these. at: the first row of the module. context:
    what its method computed for the view from statistics.
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

    contexts: asked for each view when its first unit comes, and not kept, so that few are alive.
    done: module -> sorted, separate spans [start, stop) of output rows that are finished.
    """
    for index, module in enumerate(plan.modules):
        spans = done.get(index, ())
        views = _worked_on(module)
        shape = module.shape if views is not module.sources else module.shape[:-1]
        # Constants are written with the header: rows have no part in them.
        tensors = tuple(tensor for tensor in module.tensors if not tensor.is_constant)
        output = Output(module.treatment, module.dtype, module.together, prod(shape), tensors)
        # No block spans two sources: the experts of a stack are apart.
        for source, (view, above, n_rows) in enumerate(stacked(views)):
            together = view.values_read(module.together)
            # Rows that are coded as one stay in one block.
            step = max(1, block_values // max(1, together)) * module.together
            missing = list(_missing(above, above + n_rows, spans))
            context = contexts(index, source) if contexts and missing else None
            for start, stop in missing:
                for at in range(start, stop, step):
                    count = min(step, stop - at)
                    yield Unit(index, source, view, at - above, count, at, output, context)


def total_source_nbytes(plan: Plan) -> int:
    """Bytes of weights that all units together read."""
    return sum(view_nbytes(view, view.n_rows) for module in plan.modules for view in module.sources)


def merge_spans(spans: Iterable[tuple[int, int]]) -> Spans:
    """The spans sorted, those that touch or overlap joined."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def fit(jobs: int, max_memory: int | None, modules: Sequence[Module] = ()) -> tuple[int, int]:
    """How many workers with blocks of how many values keep to `max_memory` bytes.

    modules: whose longest row that is coded as one is the smallest block. Blocks shrink first.
    Raises: PolicyError if not even one worker with the smallest blocks fits.
    """
    if max_memory is None:
        return jobs, BLOCK_VALUES
    largest, notes = LONGEST_ROW, []
    for module in modules:
        values = max((view.values_read(module.together) for view in _worked_on(module)), default=0)
        if values > largest:
            what = describe(module.treatment) if isinstance(module.treatment, Coded) else "FP8"
            rows = "a row" if module.together == 1 else f"{module.together} rows"
            notes = [f"{module.name}: {what} takes {rows}, {values} values, at once"]
            largest = values
    free, fewest = max_memory - _LIBRARIES_NBYTES, largest * _NBYTES_PER_VALUE
    if free < fewest:
        needed = both_units(_LIBRARIES_NBYTES + fewest)
        raise fail("too-little-memory", notes=notes, given=both_units(max_memory), needed=needed)
    # Fewer cores cost more time than smaller blocks do.
    workers = min(jobs, free // fewest)
    return workers, min(BLOCK_VALUES, free // workers // _NBYTES_PER_VALUE)


def _worked_on(module: Module) -> tuple[View, ...]:
    """The views of a module; of plain values in long rows, with single values as rows."""
    # The plan alone decides, so that the journal of a build with other blocks can be resumed.
    # In a bias the experts that were added make the row longer than the source's.
    is_padded_row = module.added > 0 and len(module.shape) == 1
    is_short = not module.shape or module.shape[-1] <= LONGEST_ROW
    # A scale belongs to a block of a row.
    is_scaled = any(view.scale is not None for view in module.sources)
    if is_short or is_padded_row or is_scaled or isinstance(module.treatment, Coded):
        return module.sources
    return tuple(view.as_values() for view in module.sources)


def _missing(at: int, stop: int, done: Spans) -> Iterator[tuple[int, int]]:
    """The spans of the output rows from `at` to `stop` that `done` leaves open."""
    # An earlier run may have used other blocks, so spans need not end where blocks do.
    for start, end in done:
        if end > at and start < stop:
            if start > at:
                yield at, start
            at = end
    if at < stop:
        yield at, stop
