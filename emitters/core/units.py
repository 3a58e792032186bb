"""A build as a list of independent units, each a block of rows of one source tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from emitters.tensor_io.read import columns, row_nbytes
from policy_dsl.diagnostics import fail
from policy_dsl.plan import Plan, SourceRows
from policy_dsl.units import both_units

MIB = 2**20
# A unit reads at most 8 Mi values: 32 MiB of source, and blocks that caches still help with.
BLOCK_VALUES = 8 * 2**20
SMALLEST_BLOCK = 64 * 2**10
# Source, values and encoded parts of one block, in the worst case.
_NBYTES_PER_VALUE = 12
# Interpreter, numpy, numba and its compiler.
_LIBRARIES_NBYTES = 256 * MIB

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """`count` rows from `first` of source `source` of module `module`, output rows from `at`.

    module, source: indices in the plan. Rows are those of a tensor viewed as
    [rows, last axis]. Plain data: any worker with the plan and both folders can run it.
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
    for index, module in enumerate(plan.modules):
        spans = finished.get(index, ())
        for source, rows in enumerate(module.sources):
            step = max(1, block_values // max(1, columns(rows.tensor.shape)))
            # Rows that are coded as one stay in one block.
            step = -(-step // module.together) * module.together
            for start, stop in _missing(rows, spans):
                for at in range(start, stop, step):
                    # No block spans two sources: the experts of a stack lie apart.
                    count = min(step, stop - at)
                    yield Unit(index, source, rows.first + at - rows.at, count, at)


def source_nbytes(plan: Plan, unit: Unit) -> int:
    """Bytes of weights that a unit reads."""
    tensor = plan.modules[unit.module].sources[unit.source].tensor
    return row_nbytes(tensor) * unit.count


def total_source_nbytes(plan: Plan) -> int:
    """Bytes of weights that all units together read."""
    sources = (rows for module in plan.modules for rows in module.sources)
    return sum(row_nbytes(rows.tensor) * rows.count for rows in sources)


def merge_spans(spans: Iterable[tuple[int, int]]) -> Spans:
    """The spans sorted, those that touch or overlap joined."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def fit(jobs: int, max_memory: int | None) -> tuple[int, int]:
    """How many workers with blocks of how many values keep to `max_memory` bytes.

    Blocks shrink first, then workers become fewer.
    Raises: PolicyError if not even one worker with small blocks fits.
    """
    if max_memory is None:
        return jobs, BLOCK_VALUES
    free = max_memory - _LIBRARIES_NBYTES
    fewest = SMALLEST_BLOCK * _NBYTES_PER_VALUE
    if free < fewest:
        needed = both_units(_LIBRARIES_NBYTES + fewest)
        raise fail("too-little-memory", given=both_units(max_memory), needed=needed)
    # Fewer cores cost more time than smaller blocks do.
    workers = min(jobs, free // fewest)
    return workers, min(BLOCK_VALUES, free // workers // _NBYTES_PER_VALUE)


def _missing(rows: SourceRows, done: Spans) -> Iterator[tuple[int, int]]:
    """The spans of these rows' output that `done` leaves open."""
    at, stop = rows.at, rows.at + rows.count
    # An earlier run may have used other blocks, so spans need not end where blocks do.
    for start, end in done:
        if end > at and start < stop:
            if start > at:
                yield at, start
            at = end
    if at < stop:
        yield at, stop
