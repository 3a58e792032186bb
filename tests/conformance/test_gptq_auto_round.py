"""Packed checkpoints are what the installed auto-round writes, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bundles import tensors

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-minimax-m2"
# Treatment -> AutoRound's scheme.
SCHEMES = {
    "4bit int g128 sym": {"scheme": "W4A16"},
    "8bit int g128 sym": {"scheme": "W8A16"},
    "2bit int g128 sym": {"scheme": "W2A16"},
    "4bit int g32 sym": {"scheme": "W4A16", "group_size": 32},
    "4bit int-v2 g128 asym": {"scheme": "W4A16", "sym": False},
    "2bit int-v2 g32 asym": {"scheme": "W2A16G32", "sym": False},
}
# Biases, a tied head, other dtypes than bfloat16, experts of both names, FP8 in partial blocks.
KINDS = {
    "llama_tied": "4bit int g128 sym",
    "mistral": "8bit int g128 sym",
    "qwen2": "4bit int-v2 g128 asym",
    "qwen3": "2bit int g128 sym",
    "qwen3_moe": "4bit int g128 sym",
    "qwen3_moe_fp8": "4bit int g32 sym",
    "mixtral": "2bit int-v2 g32 asym",
    "minimax_m2": "4bit int g128 sym",
    "minimax_m2_fp8": "4bit int g32 sym",
}
# The flow without a model has none of these; the other one computes in the weights' dtype.
WITH_MODEL = {
    "3bit int g128 sym": {"scheme": "W3A16"},
    "3bit int g-1 sym": {"scheme": "W3A16", "group_size": -1},
    "8bit int g-1 sym": {"scheme": "W8A16", "group_size": -1},
}
# What was done and how is told in other words, or not at all.
TOLD = ("quant_method", "packing_format", "bits", "group_size", "sym", "data_type")
TOLD_WITHOUT_MODEL = (*TOLD, "iters", "model_free", "block_name_to_quantize", "extra_config")


def policy(treatment):
    """All linears like that, FP8 read as AutoRound reads it."""
    return f"fp8_dequant bf16_bf16\nall: {treatment}\nembed, lm_head: keep"


def told(bundle, keys):
    """What `config.json` and its copy both tell readers."""
    config = json.loads((bundle / "config.json").read_text())["quantization_config"]
    assert json.loads((bundle / "quantization_config.json").read_text()) == config
    # Where nothing is kept AutoRound has no map at all.
    config.setdefault("extra_config", {})
    return {key: config.get(key) for key in keys}


def assert_equal(ours, theirs, keys):
    """Same tensors byte for byte, and the same told of them."""
    built, expected = tensors(ours), tensors(theirs)
    assert built.keys() == expected.keys()
    assert [name for name in built if built[name] != expected[name]] == []
    assert told(ours, keys) == told(theirs, keys)


@pytest.mark.parametrize("treatment", [*SCHEMES][1:])
def test_the_embedded_model(treatment, gptq, auto_round, tmp_path):
    theirs = auto_round("convert", EXAMPLE, tmp_path / "out", SCHEMES[treatment])
    assert_equal(gptq(EXAMPLE, policy(treatment)), theirs, TOLD_WITHOUT_MODEL)


def test_the_bundled_policy(gptq, auto_round, tmp_path):
    theirs = auto_round("convert", EXAMPLE, tmp_path / "out", {"scheme": "W4A16"})
    assert_equal(gptq(EXAMPLE, "extends w4a16"), theirs, TOLD_WITHOUT_MODEL)


@pytest.mark.parametrize("kind", KINDS)
def test_other_models(kind, gptq, auto_round, checkpoint, tmp_path):
    treatment = KINDS[kind]
    source = checkpoint(kind).published
    theirs = auto_round("convert", source, tmp_path / "out", SCHEMES[treatment])
    assert_equal(gptq(kind, policy(treatment)), theirs, TOLD_WITHOUT_MODEL)


@pytest.mark.parametrize("treatment", WITH_MODEL)
def test_widths_and_groups_of_the_flow_with_a_model(
    treatment, gptq, auto_round, checkpoint, tmp_path
):
    source, scheme = checkpoint("llama").published, WITH_MODEL[treatment]
    theirs = auto_round("convert", source, tmp_path / "out", scheme, with_model=True)
    assert_equal(gptq("llama", policy(treatment)), theirs, TOLD)


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ({"scheme": "W3A16"}, "supports bits in (2, 4, 8)"),
        ({"scheme": "W8A16", "sym": False}, "8-bit asymmetric weight quantization is not"),
    ],
)
def test_what_the_flow_without_a_model_refuses(scheme, said, auto_round, tmp_path):
    assert said in auto_round("convert_error", EXAMPLE, tmp_path / "out", scheme)


def test_the_flow_without_a_model_packs_no_whole_rows(auto_round, tmp_path):
    scheme = {"scheme": "W4A16", "group_size": -1}
    theirs = auto_round("convert", EXAMPLE, tmp_path / "out", scheme)
    assert [name for name in tensors(theirs) if name.endswith(".qweight")] == []
