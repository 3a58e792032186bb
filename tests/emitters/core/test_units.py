"""A build as a list of units: every row once, whatever was done before and in what blocks."""

from __future__ import annotations

import pytest

from emitters.core.units import fit, merge_spans, plan_units
from policy_dsl.diagnostics import PolicyError

# Rows of width 64: blocks of 24 rows, which divide none of the heights.
BLOCK = 24 * 64
DONE = {
    "nothing": (),
    "the middle": ((5, 9), (40, 70)),
    "both ends": ((0, 7), (60, 96)),
    "between sources": ((96, 130),),
    "everything": ((0, 1000),),
}


def rows(plan, units, module):
    """(source, source row, output row) of every row that the units of a module cover."""
    return [
        (unit.source, unit.first + k, unit.at + k)
        for unit in units
        if unit.module == module
        for k in range(unit.count)
    ]


@pytest.mark.parametrize("done", DONE.values(), ids=DONE)
def test_every_row_that_is_not_done_is_in_one_unit(write_llama, planned, demo, done):
    for source in (write_llama(), demo):
        plan, _ = planned(source)
        finished = dict.fromkeys(range(len(plan.modules)), done)
        units = list(plan_units(plan, block_values=BLOCK, done=finished))
        for index, module in enumerate(plan.modules):
            wanted = [
                (at, each.first + k, each.at + k)
                for at, each in enumerate(module.sources)
                for k in range(each.count)
                if not any(start <= each.at + k < stop for start, stop in done)
            ]
            assert rows(plan, units, index) == wanted


def test_no_unit_is_larger_than_its_block(write_llama, planned):
    plan, _ = planned(write_llama())
    units = list(plan_units(plan, block_values=BLOCK))
    widths = [plan.modules[unit.module].sources[0].tensor.shape[-1] for unit in units]
    assert len(units) > 2 * len(plan.modules)
    assert all(
        unit.count == 1 or unit.count * width <= BLOCK
        for unit, width in zip(units, widths, strict=True)
    )


def test_spans_that_touch_or_overlap_are_one():
    assert merge_spans([(6, 8), (0, 4), (1, 2), (4, 5)]) == ((0, 5), (6, 8))
    assert merge_spans([]) == ()


def test_less_memory_means_smaller_blocks_then_fewer_workers():
    jobs, block = fit(4, None)
    assert jobs == 4
    few, small = fit(4, 264 * 2**20)
    assert (few, small < block) == (4, True)
    assert fit(4, 258 * 2**20)[0] < 4
    with pytest.raises(PolicyError, match="too-little-memory"):
        fit(4, 2**20)
