"""Values of a config that no reader can compute with, and those that publishers write."""

from __future__ import annotations

import pytest

from policy_dsl.roles.classify import classify

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
LONG = {"type": "longrope", "short_factor": [1, 1.5], "long_factor": [2.0, 3]}
OTHER = {"rope_type": "default", "mrope_section": [24, 20, 20], "finetuned": True, "factor": None}


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("rope_type", value) for value in (["a"], {}, 3, 2.5, False)),
        *(("type", value) for value in (["a"], {}, 0)),
        *(("factor", value) for value in ("8", [0], 0, -4.0, True, float("nan"))),
        *(("high_freq_factor", value) for value in ([], 0)),
        ("low_freq_factor", [1]),
        ("original_max_position_embeddings", "8192"),
        ("beta_fast", 0),
        ("attention_factor", {}),
        ("mscale", "1"),
        ("short_factor", 1.0),
        ("long_factor", [1.0, "2"]),
    ],
)
def test_what_scales_positions_is_of_its_kind(place, entry, value, changed, message):
    said = message(changed("llama", config={place: {**LLAMA3, entry: value}}))
    assert f"gives {place}.{entry} as {value!r}" in said
    assert "it must be a" in said


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN, LONG, OTHER, {"type": None}])
def test_what_publishers_write_about_positions_is_taken(scaling, changed):
    classify(changed("llama", config={"rope_scaling": scaling}))


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1, 0.0, -1e-6, "1", [1], True])
def test_what_readers_divide_by_is_above_0(key, value, changed, message):
    said = message(changed("llama", config={key: value}))
    assert f"gives {key} as {value!r}" in said
    assert "it must be a number above 0" in said


def test_whole_numbers_are_numbers(changed):
    classify(changed("llama", config={"rope_theta": 500000, "rms_norm_eps": 1}))


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "minimax_m2", "glm4_moe"])
def test_a_token_goes_to_no_more_experts_than_there_are(case, changed, message):
    said = message(changed(case, config={"num_experts_per_tok": 1000}))
    assert "gives num_experts_per_tok as 1000" in said
    assert "it must be at most " in said
    classify(changed(case, config={"num_experts_per_tok": 1}))


def test_no_more_groups_of_experts_are_taken_than_there_are(changed, message):
    said = message(changed("glm4_moe", config={"n_group": 2, "topk_group": 3}))
    assert "gives topk_group as 3" in said
    assert "it must be at most 2" in said


@pytest.mark.parametrize("value", [1, "x", [1], 0, [], False])
def test_the_part_of_the_language_model_is_an_object(value, changed, message):
    said = message(changed("llama", config={"text_config": value}))
    assert f"gives text_config as {value!r}" in said


@pytest.mark.parametrize("value", [3, "LlamaForCausalLM", {}, [1], [None]])
def test_the_classes_of_a_model_are_a_list_of_texts(value, changed, message):
    said = message(changed("llama", config={"architectures": value}))
    assert f"gives architectures as {value!r}" in said


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "6", [6], {}])
def test_a_pattern_of_windows_is_a_whole_number(value, changed, message):
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        said = message(changed("gemma3_text", config={key: value}))
        assert f"gives {key} as {value!r}" in said


@pytest.mark.parametrize("value", [None, 1, 6, 100])
def test_a_pattern_may_be_longer_than_the_model_or_null(value, changed):
    classify(changed("gemma3_text", config={"sliding_window_pattern": value}))


def test_a_null_beside_a_value_does_not_hide_it(changed, message):
    said = message(changed("llama", config={"rope_theta": None, "text_config": {"rope_theta": 0}}))
    assert "gives rope_theta as 0" in said
