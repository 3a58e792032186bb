"""Recorded checkpoints of AutoRound, built again: tensors, and all that readers are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import stored

from policyc.cli import main

GOLDEN = Path(__file__).parents[2] / "golden" / "gptq_e2e"
MIXED = """
target gptq
all: 4bit g32
attention in layers 1: 8bit g128
embed, lm_head: keep
"""
CASES = {
    "autoround_w4g128": ("source_bf16", "extends w4a16"),
    "autoround_w4g128_from_fp8": ("source_fp8", "extends w4a16"),
    "autoround_w4g32_mixed": ("source_bf16", MIXED),
}


@pytest.fixture(params=CASES)
def bundles(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A bundle of ours and the recorded one."""
    source, policy = CASES[request.param]
    (tmp_path / "policy.qpol").write_text(policy + "\n")
    words = ["build", str(tmp_path / "policy.qpol"), "--model", str(GOLDEN / source)]
    assert main([*words, "-o", str(tmp_path / "out"), "-q"]) == 0
    return tmp_path / "out", GOLDEN / request.param


def read(bundle: Path, name: str) -> Any:
    return json.loads((bundle / name).read_text())


def test_tensors_are_the_recorded_ones(bundles: tuple[Path, Path]) -> None:
    built, expected = (stored(bundle) for bundle in bundles)
    assert built.keys() == expected.keys()
    assert [name for name in expected if built[name] != expected[name]] == []


@pytest.mark.parametrize("name", ["config.json", "quantization_config.json"])
def test_readers_are_told_the_same(bundles: tuple[Path, Path], name: str) -> None:
    found, expected = (read(bundle, name) for bundle in bundles)
    assert found == expected
