"""A build as a list of units: every row once, whatever was done before and in what blocks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
from small_checkpoints import llama_config, llama_tensors, write_folder

from emitters import FORMATS
from emitters.core.build import Threads, build
from emitters.core.run_unit import Work
from emitters.core.statistics import prepare
from emitters.core.work_units import Unit, fit, merge_spans, plan_units
from emitters.tensor_io.files import Source, file_facts
from emitters.tensor_io.view_rows import ViewReader
from policy_dsl.diagnostics import PolicyError
from policy_dsl.views import stacked

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
        for k in range(unit.n_rows)
    ]


@pytest.mark.parametrize("done", DONE.values(), ids=DONE)
def test_every_row_that_is_not_done_is_in_one_unit(write_llama, planned, demo, done):
    for source in (write_llama(), demo):
        plan, _ = planned(source)
        finished = dict.fromkeys(range(len(plan.modules)), done)
        units = list(plan_units(plan, None, BLOCK, finished))
        for index, module in enumerate(plan.modules):
            wanted = [
                (number, row, first + row)
                for number, (_, first, count) in enumerate(stacked(module.sources))
                for row in range(count)
                if not any(start <= first + row < stop for start, stop in done)
            ]
            assert rows(plan, units, index) == wanted


def test_no_unit_is_larger_than_its_block(write_llama, planned):
    plan, _ = planned(write_llama())
    units = list(plan_units(plan, None, BLOCK))
    widths = [plan.modules[unit.module].sources[0].tensor.shape[-1] for unit in units]
    assert len(units) > 2 * len(plan.modules)
    assert all(
        unit.n_rows == 1 or unit.n_rows * width <= BLOCK
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


@pytest.fixture
def large_source(tmp_path: Path) -> Path:
    """A Llama of gigabytes that takes no room on the disk: its weights are a hole."""
    large = {64: 4096, 128: 16384, 96: 131072}
    small = llama_tensors(layers=1, hidden=64, inner=128, vocabulary=96)
    header, at = {}, 0
    for name, (dtype, array) in small.items():
        shape = [large[size] for size in array.shape]
        offsets = [at, at + 2 * prod(shape)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        at = offsets[1]
    config = llama_config(layers=1, hidden=4096, inner=16384, vocabulary=131072)
    write_folder(tmp_path / "large", config, {})
    text = json.dumps(header).encode()
    with (tmp_path / "large" / "model.safetensors").open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(opened.tell() + at)
    return tmp_path / "large"


@pytest.mark.parametrize("policy", ["mlx_4bit", "w4a16"])
@pytest.mark.parametrize("jobs", [1, 16])
def test_a_unit_reads_at_most_64_mib(planned, large_source, policy, jobs):
    plan, _ = planned(large_source, policy)
    _, block_values = fit(jobs, None)
    read = [unit.source_nbytes for unit in plan_units(plan, None, block_values)]
    assert sum(read) > 2**30
    assert max(read) <= 64 * 2**20


@pytest.mark.parametrize("jobs", [1, 2, 4])
def test_two_units_a_worker_are_in_flight_and_no_more(write_llama, planned, tmp_path, jobs):
    given = planned(write_llama())
    report = build(*given, out=tmp_path / "out")
    plan, contexts = prepare(given[0], FORMATS["mlx_affine"])
    root = tmp_path / "source"
    source = Source(root, file_facts(root, ["model.safetensors"]))
    reader = ViewReader(source, plan.model.config)
    work = Work(FORMATS["mlx_affine"], reader, plan.fp8_rule, report.out)
    units, alive, most = list(plan_units(plan, contexts, BLOCK)), 0, 0

    def taken() -> Iterator[Unit]:
        nonlocal alive, most
        for unit in units:
            alive += 1
            most = max(most, alive)
            yield unit

    for _ in Threads(jobs).run(taken(), work):
        alive -= 1
    assert len(units) > 50
    assert (alive, most <= 2 * jobs) == (0, True)
