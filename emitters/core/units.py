"""A build as a list of independent units, each a block of rows of one source tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from emitters.core.stretches import LONGEST_ROW, in_stretches
from emitters.tensor_io.view_rows import view_nbytes
from policy_dsl.diagnostics import fail
from policy_dsl.plan import Module, Plan
from policy_dsl.quantities import both_units
from policy_dsl.treatments import Coded, describe
from policy_dsl.views import stacked

MIB = 2**20
# A unit reads at most 8 Mi values: 32 MiB of source, and blocks that caches still help with.
BLOCK_VALUES = 8 * 2**20
SMALLEST_BLOCK = LONGEST_ROW
# Source, values and encoded parts of one block, in the worst case.
_NBYTES_PER_VALUE = 12
# Interpreter, numpy, numba and its compiler.
_LIBRARIES_NBYTES = 256 * MIB

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """`count` rows from `first` of source `source` of module `module`, output rows from `at`.

    module, source: indices in the plan. Rows are those of a view, or single values where
    `in_stretches` splits rows. Plain data: any worker
    with the plan and both folders can run it.
    """

    module: int
    source: int
    first: int
    count: int
    at: int


def plan_units(
    plan: Plan, *, block_values: int, done: Mapping[int, Spans] | None = None
) -> Iterator[Unit]:
    """All units in the order of the plan, without the output rows in `done`.

    done: module -> sorted, separate spans [start, stop) of output rows that are finished.
    """
    finished = done or {}
    for index, module in enumerate(map(in_stretches, plan.modules)):
        spans = finished.get(index, ())
        for source, (view, first, rows) in enumerate(stacked(module.sources)):
            together = view.values_read(module.together)
            # Rows that are coded as one stay in one block.
            step = max(1, block_values // max(1, together)) * module.together
            for start, stop in _missing((first, first + rows), spans):
                for at in range(start, stop, step):
                    # No block spans two sources: the experts of a stack lie apart.
                    count = min(step, stop - at)
                    yield Unit(index, source, at - first, count, at)


def source_nbytes(plan: Plan, unit: Unit) -> int:
    """Bytes of weights that a unit reads."""
    return view_nbytes(in_stretches(plan.modules[unit.module]).sources[unit.source], unit.count)


def total_source_nbytes(plan: Plan) -> int:
    """Bytes of weights that all units together read."""
    views = (view for module in plan.modules for view in module.sources)
    return sum(view_nbytes(view, view.n_rows) for view in views)


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
    largest, whole = _largest_whole(plan) if plan else (None, 0)
    fewest = max(SMALLEST_BLOCK, whole) * _NBYTES_PER_VALUE
    if free < fewest:
        needed = both_units(_LIBRARIES_NBYTES + fewest)
        notes = [_why_whole(largest, whole)] if largest and whole > SMALLEST_BLOCK else []
        given = both_units(max_memory)
        raise fail("too-little-memory", notes=notes, given=given, needed=needed)
    # Fewer cores cost more time than smaller blocks do.
    workers = min(jobs, free // fewest)
    return workers, min(BLOCK_VALUES, free // workers // _NBYTES_PER_VALUE)


def _largest_whole(plan: Plan) -> tuple[Module | None, int]:
    """The module with the most values that must be in memory at once, and how many."""
    found: tuple[Module | None, int] = None, 0
    for module in map(in_stretches, plan.modules):
        for view in module.sources:
            values = view.values_read(module.together)
            if values > found[1]:
                found = module, values
    return found


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
