"""Packed checkpoints in the words of GPTQ: read by GPTQModel, alone and below transformers."""

from __future__ import annotations

import pytest
from gptq_bundles import assert_close, assert_likely, decoded, write_plain
from gptq_policies import mixed, uniform

pytestmark = pytest.mark.slow

PROMPT = (1, 5, 17, 200, 33, 3, 83, 255, 93, 23)
COUNT = 4
FOUR = uniform("4bit", dialect="gptq")
FOUR_NUMBERED = uniform("4bit int-gidx", dialect="gptq")
BELOW = {
    "llama": ("llama", FOUR_NUMBERED),
    "qwen3": ("qwen3", FOUR_NUMBERED),
    "8 bits": ("llama_tied", uniform("8bit int-gidx g32", dialect="gptq")),
    "asymmetric": ("qwen2", uniform("4bit int-gidx asym g64", dialect="gptq")),
    "3 bits": ("llama", uniform("3bit int-v2-gidx asym g-1", dialect="gptq")),
}
ALONE = {
    "llama": ("llama", FOUR),
    "qwen3": ("qwen3", FOUR_NUMBERED),
    "qwen3_moe": ("qwen3_moe", f"{FOUR}\nmlp: keep"),
    "mixed": ("llama", mixed("int sym", dialect="gptq")),
    "mixed, asymmetric": ("llama", mixed("int-v2 asym", dialect="gptq")),
}


@pytest.fixture
def assert_answers(gptq, gptqmodel, stock_transformers, tmp_path):
    """Asserts that a way to load a bundle leads to the answers of the decoded model."""

    def check(kind, policy, *, alone):
        bundle, prefix = gptq(kind, policy), "own_" if alone else ""
        plain = write_plain(bundle, tmp_path / "plain")
        expected = stock_transformers("logits", plain, PROMPT, "float16")
        found = gptqmodel(f"{prefix}logits", bundle, PROMPT, "float16", alone=alone)
        assert_close(found, expected)
        made = gptqmodel(f"{prefix}written", bundle, PROMPT, COUNT, "float16", alone=alone)
        assert len(made) == COUNT
        scores = stock_transformers("logits", plain, (*PROMPT, *made), "float16")
        assert_likely(made, scores[len(PROMPT) - 1 : -1])

    return check


@pytest.mark.parametrize(("kind", "policy"), BELOW.values(), ids=BELOW)
def test_it_answers_below_transformers(kind, policy, gptq_refusals, assert_answers):
    assert "transformers" not in gptq_refusals(kind, policy)
    assert_answers(kind, policy, alone=False)


@pytest.mark.parametrize(("kind", "policy"), ALONE.values(), ids=ALONE)
def test_it_answers_alone(kind, policy, gptq_refusals, assert_answers):
    assert "gptqmodel" not in gptq_refusals(kind, policy)
    assert_answers(kind, policy, alone=True)


def test_transformers_needs_the_numbers_of_groups(gptq, gptq_refusals, gptqmodel):
    assert "int-gidx" in gptq_refusals("llama", FOUR)["transformers"]
    bundle = gptq("llama", FOUR)
    # They are made and never filled: what is computed with them is chance.
    absent = gptqmodel("missing", bundle, "float16")
    assert absent == sorted(f"{name}.g_idx" for name in decoded(bundle))


def test_transformers_takes_one_width(gptq, gptq_refusals, gptqmodel):
    policy = mixed("int-gidx sym", dialect="gptq")
    assert "one width" in gptq_refusals("llama", policy)["transformers"]
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        gptqmodel("logits", gptq("llama", policy), PROMPT, "float16")


@pytest.mark.parametrize("kind", ["qwen3_moe", "minimax_m2"])
def test_transformers_leaves_experts_out(kind, gptq, gptq_refusals, gptqmodel):
    assert "random" in gptq_refusals(kind, FOUR_NUMBERED)["transformers"]
    absent = gptqmodel("missing", gptq(kind, FOUR_NUMBERED), "float16")
    assert absent != []
    assert [name for name in absent if ".mlp.experts." not in name] == []


def test_dense_blocks_beside_experts_stay_random(
    gptq, gptq_refusals, gptqmodel, stock_transformers, tmp_path
):
    assert "no dense blocks" in gptq_refusals("qwen3_moe", FOUR)["gptqmodel"]
    bundle = gptq("qwen3_moe", FOUR)
    plain = write_plain(bundle, tmp_path / "plain")
    expected = stock_transformers("logits", plain, PROMPT, "float16")
    found = gptqmodel("own_logits", bundle, PROMPT, "float16", alone=True)
    with pytest.raises(AssertionError):
        assert_close(found, expected)


def test_glm_fails_in_a_class_of_its_own(gptq, gptq_refusals, gptqmodel):
    assert "first token" in gptq_refusals("glm4_moe", FOUR)["gptqmodel"]
    with pytest.raises(AttributeError, match="sigmoid"):
        gptqmodel("own_logits", gptq("glm4_moe", FOUR), PROMPT, "float16", alone=True)


@pytest.mark.parametrize(
    ("kind", "policy", "said"),
    [
        ("llama", uniform("4bit asym", dialect="gptq"), "only supported if produced by"),
        ("mixtral", FOUR, "Missing required quantized weights"),
    ],
)
def test_what_it_refuses(kind, policy, said, gptq, gptq_refusals, gptqmodel):
    assert "gptqmodel" in gptq_refusals(kind, policy)
    with pytest.raises(ValueError, match=said):
        gptqmodel("own_logits", gptq(kind, policy), PROMPT, "float16", alone=True)
