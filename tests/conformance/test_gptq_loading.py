"""Packed checkpoints that auto-round reads below transformers, and those that it cannot."""

from __future__ import annotations

import pytest
from gptq_bundles import assert_close, assert_likely, decoded, write_plain
from gptq_policies import mixed, uniform

pytestmark = pytest.mark.slow

PROMPT = (1, 5, 17, 200, 33, 3, 83, 255, 93, 23)
COUNT = 4
# Biases, a tied head, experts, every width and group size.
LOADED = {
    "llama": ("llama", uniform("4bit")),
    "llama_tied": ("llama_tied", uniform("4bit g32")),
    "qwen2": ("qwen2", uniform("8bit")),
    "qwen3": ("qwen3", uniform("4bit")),
    "qwen3_moe": ("qwen3_moe", uniform("4bit")),
    "glm4_moe": ("glm4_moe", uniform("4bit")),
    "mixed": ("llama", mixed("int sym")),
    "mixed, version 2": ("llama", mixed("int-v2 sym")),
    "mixed, asymmetric": ("llama", mixed("int-v2 asym")),
}


@pytest.mark.parametrize(("kind", "policy"), LOADED.values(), ids=LOADED)
def test_it_answers_as_the_decoded_model(
    kind, policy, gptq, gptq_refusals, auto_round, stock_transformers, tmp_path
):
    assert "auto-round" not in gptq_refusals(kind, policy)
    bundle = gptq(kind, policy)
    assert auto_round("missing", bundle, "float16") == []
    plain = write_plain(bundle, tmp_path / "plain")
    expected = stock_transformers("logits", plain, PROMPT, "float16")
    assert_close(auto_round("logits", bundle, PROMPT, "float16"), expected)
    made = auto_round("written", bundle, PROMPT, COUNT, "float16")
    assert len(made) == COUNT
    scores = stock_transformers("logits", plain, (*PROMPT, *made), "float16")
    assert_likely(made, scores[len(PROMPT) - 1 : -1])


def test_version_1_is_read_for_symmetric_groups_only(gptq, gptq_refusals, auto_round):
    policy = uniform("4bit int asym")
    assert {"auto-round", "transformers"} <= gptq_refusals("llama", policy).keys()
    bundle = gptq("llama", policy)
    absent = auto_round("missing", bundle, "float16")
    assert {name.removesuffix(".weight") for name in absent} == decoded(bundle).keys()
    with pytest.raises(TypeError):
        auto_round("logits", bundle, PROMPT, "float16")


@pytest.mark.parametrize("kind", ["minimax_m2", "mixtral"])
def test_experts_of_other_names_are_left_out(kind, gptq, gptq_refusals, auto_round):
    policy = uniform("4bit")
    told = gptq_refusals(kind, policy)
    assert {"auto-round", "gptqmodel", "transformers"} <= told.keys()
    assert "experts stay random" in told["auto-round"]
    absent = auto_round("missing", gptq(kind, policy), "float16")
    assert absent != []
    assert [name for name in absent if ".mlp.experts." not in name] == []
