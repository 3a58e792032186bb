"""The recorded tiny FP8 MiniMax-M2 and its Config-I conversion by mlx-lm 0.32.2.

Source: tests/golden/mlx/README.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import tensors, widths

GOLDEN = Path(__file__).parents[1] / "golden" / "mlx" / "tiny_minimax_fp8"


@pytest.fixture
def bundle(build):
    """The recorded source, built with policies/config_i.yaml."""
    return build("config_i", GOLDEN / "source")


def test_tensors_are_the_recorded_ones(bundle):
    built, expected = tensors(bundle), tensors(GOLDEN / "expected")
    assert built.keys() == expected.keys()
    assert [name for name in built if built[name] != expected[name]] == []


def test_widths_are_the_recorded_ones(bundle):
    assert widths(bundle) == widths(GOLDEN / "expected")
    found, expected = (
        json.loads((place / "config.json").read_text())["quantization"]
        for place in (bundle, GOLDEN / "expected")
    )
    # Stock writes nothing about the router; an explicit `false` says the same to every reader.
    entries = {path: entry for path, entry in found.items() if entry is not False}
    for path in expected.keys() - {"bits", "group_size", "mode"}:
        assert entries[path] == expected[path]


def test_the_index_is_the_recorded_one(bundle):
    name = "model.safetensors.index.json"
    found, expected = (
        json.loads((place / name).read_text()) for place in (bundle, GOLDEN / "expected")
    )
    assert found == expected


@pytest.mark.slow
def test_stock_computes_and_writes_what_the_oracle_recorded(bundle, stock):
    oracle = json.loads((GOLDEN / "oracle.json").read_text())
    prompt, greedy = oracle["prompt"], oracle["greedy"]
    logits = stock.logits(bundle, prompt)
    last = oracle["logits_last"]
    # bfloat16 arithmetic differs between CPU families.
    assert logits[-1, : len(last)].tolist() == pytest.approx(last, abs=0.05)
    assert logits.argmax(-1).tolist() == oracle["argmax"]
    assert stock.greedy_tokens(bundle, prompt, len(greedy)) == greedy
    quantized = {path: width for path, width in widths(bundle).items() if width is not None}
    assert quantized == {path: tuple(w) for path, w in oracle["quantized_modules"].items()}
