"""Whoever runs the units of a build, in whatever order: the same bytes, or an error in words."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from small_checkpoints import digests

from emitters import FORMATS
from emitters.core import journal as journals
from emitters.core.build import Receipts, build
from emitters.core.run_unit import Work
from emitters.core.work_units import Unit
from emitters.tensor_io.files import flush
from policy_dsl.diagnostics import PermanentError, PolicyError

INT = "name: int\ntarget: gptq\nrules: 'attention: 8bit g32; mlp: 4bit g32'\n"
PLAIN = "name: plain\ntarget: mlx_affine\nrules: 'all: f16'\n"
POLICIES = ["mlx_4bit", INT, PLAIN]
_SPAWN = multiprocessing.get_context("spawn")


class Processes:
    """Two programs that know nothing but the units and the work that were sent to them."""

    def run(self, units: Iterable[Unit], work: Work) -> Receipts:
        with ProcessPoolExecutor(2, _SPAWN) as pool:
            running = [(unit, pool.submit(work, unit)) for unit in units]
            for unit, future in running:
                yield unit, future.result()


class Backwards:
    """The last unit first, and every receipt twice."""

    def run(self, units: Iterable[Unit], work: Work) -> Receipts:
        for unit in reversed(list(units)):
            receipt = work(unit)
            yield unit, receipt
            yield unit, receipt


class Losing:
    """Runs so many units and loses the others; then it takes no more of them."""

    def __init__(self, most: int, *, takes_all: bool) -> None:
        self.most, self.takes_all = most, takes_all
        self.rounds: list[int] = []

    def run(self, units: Iterable[Unit], work: Work) -> Receipts:
        self.rounds.append(0)
        for unit in units:
            if self.rounds[-1] < self.most:
                self.rounds[-1] += 1
                yield unit, work(unit)
            elif not self.takes_all:
                return


class Durable:
    """Flushes what it writes, and says so."""

    def run(self, units: Iterable[Unit], work: Work) -> Receipts:
        for unit in units:
            receipt = work(unit)
            for tensor in unit.output.tensors:
                flush(work.folder / tensor.file)
            yield unit, receipt._replace(is_durable=True)


@pytest.fixture
def given(write_llama, planned, tmp_path):
    """A plan of a Llama by a policy, what it was made of, and the digests of its bundle."""

    def make(policy: str = POLICIES[0]):
        found = planned(write_llama(), policy)
        build(*found, out=tmp_path / "expected")
        return found, digests(tmp_path / "expected")

    return make


@pytest.mark.parametrize("policy", POLICIES, ids=["affine", "int", "plain"])
def test_units_need_no_plan_and_run_in_other_processes(given, tmp_path, policy):
    found, expected = given(policy)
    report = build(*found, out=tmp_path / "out", runner=Processes())
    assert digests(tmp_path / "out") == expected
    assert report.resumed_nbytes == 0


@pytest.mark.parametrize("target", FORMATS)
def test_units_of_every_format_can_be_sent(target):
    assert pickle.loads(pickle.dumps(FORMATS[target])).name == target


def test_the_order_of_receipts_does_not_matter_and_twice_is_once(given, tmp_path):
    found, expected = given()
    build(*found, out=tmp_path / "out", runner=Backwards())
    assert digests(tmp_path / "out") == expected


@pytest.mark.parametrize("takes_all", [True, False])
def test_units_that_a_runner_loses_are_given_to_it_again(given, tmp_path, takes_all):
    found, expected = given()
    runner = Losing(5, takes_all=takes_all)
    build(*found, out=tmp_path / "out", runner=runner)
    assert digests(tmp_path / "out") == expected
    assert len(runner.rounds) > 3
    assert set(runner.rounds[:-1]) == {5}


def test_a_runner_that_brings_nothing_back_stops_the_build(given, tmp_path):
    found, expected = given()
    out = tmp_path / "out"

    class Dying(Losing):
        def run(self, units: Iterable[Unit], work: Work) -> Receipts:
            yield from super().run(units, work)
            self.most = 0

    with pytest.raises(PolicyError, match="units-lost"):
        build(*found, out=out, runner=Dying(7, takes_all=True))
    assert not out.exists()
    # What it had done is resumed by threads.
    assert build(*found, out=out).resumed_nbytes > 0
    assert digests(out) == expected


def test_what_is_durable_is_not_flushed_again(given, tmp_path, monkeypatch):
    found, expected = given()
    flushed: list[Path] = []
    monkeypatch.setattr(journals, "flush", lambda path: (flushed.append(path), flush(path)))
    build(*found, out=tmp_path / "out", runner=Durable())
    assert digests(tmp_path / "out") == expected
    # Only when it was made.
    assert len([path for path in flushed if path.suffix == ".safetensors"]) == 1
    flushed.clear()
    build(*found, out=tmp_path / "again", runner=Backwards())
    assert len([path for path in flushed if path.suffix == ".safetensors"]) > 1


@pytest.mark.parametrize(("value", "code"), [(np.inf, "non-finite-source"), (1e38, "overflow")])
def test_errors_of_units_come_back_from_other_processes(
    write_llama, planned, tmp_path, value, code
):
    """With the rule that decided, which only the build knows."""

    def change(tensors):
        _, array = tensors["model.norm.weight"]
        wide = np.zeros(array.shape, np.float32)
        wide[3] = value
        tensors["model.norm.weight"] = "F32", wide

    policy = "name: a\ntarget: mlx_affine\nrules: 'all: keep; norm: f16'\n"
    found = planned(write_llama(change), policy)
    with pytest.raises(PermanentError, match=code) as error:
        build(*found, out=tmp_path / "out", runner=Processes())
    (finding,) = error.value.diagnostics
    assert "[3]" in finding.message
    if code == "overflow":
        assert finding.span is not None
        assert finding.suggestion is not None
        assert "would hold it" in finding.suggestion
    assert not (tmp_path / "out.partial").exists()
