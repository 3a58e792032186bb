"""What configs mean, in the forms that publishers and transformers 4 and 5 save them."""

from __future__ import annotations

import pytest

from policy_dsl.roles.architecture import architecture, families
from policy_dsl.roles.config_facts import ConfigFacts

YARN = {"rope_type": "yarn", "factor": 4.0}


def _value(family, key, **config):
    return ConfigFacts(config, architecture(family)).value(key)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"text_config": {"rope_theta": 5e5}},
        {"text_config": {"rope_parameters": {"rope_theta": 5e5}}},
    ],
)
def test_a_key_is_found_where_publishers_and_transformers_write_it(config):
    assert _value("llama", "rope_theta", **config) == 5e5


def test_a_key_that_is_absent_or_null_has_the_default_of_its_family():
    assert _value("llama", "rope_theta") == 10000.0
    assert _value("llama", "rope_theta", rope_theta=None) == 10000.0
    assert _value("mixtral", "rope_theta", rope_parameters={"rope_type": "default"}) == 1e6
    assert _value("gemma3", "tie_word_embeddings") is True
    assert _value("glm4_moe", "use_qk_norm") is False
    assert _value("minimax_m2", "use_qk_norm") is True


def test_false_zero_and_empty_lists_are_values():
    assert _value("gemma3", "tie_word_embeddings", tie_word_embeddings=False) is False
    assert _value("glm4_moe", "first_k_dense_replace", first_k_dense_replace=0) == 0
    assert _value("qwen3_moe", "mlp_only_layers", mlp_only_layers=[]) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "minimax_m2", "gpt_oss"])
@pytest.mark.parametrize("written", ["num_experts", "num_local_experts"])
def test_counts_of_experts_have_two_names(family, written):
    key = architecture(family).experts_key
    assert _value(family, key, **{written: 12}) == 12


def test_defaults_that_other_keys_decide():
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    assert _value("llama", "head_dim") == 128
    assert _value("llama", "head_dim", **sizes) == 16
    assert _value("llama", "head_dim", **sizes, head_dim=32) == 32
    assert _value("llama", "num_key_value_heads", **sizes) == 4
    assert _value("qwen3", "head_dim", **sizes) == 128
    assert _value("deepseek_v3", "head_dim", qk_rope_head_dim=8) == 8


def test_a_null_may_mean_something_else_than_absence():
    assert _value("mistral", "num_key_value_heads") == 8
    null = {"num_attention_heads": 4, "num_key_value_heads": None}
    assert _value("mistral", "num_key_value_heads", **null) == 4
    assert _value("deepseek_v3", "q_lora_rank") == 1536
    assert _value("deepseek_v3", "q_lora_rank", q_lora_rank=None) is None
    assert _value("deepseek_v3", "n_shared_experts", n_shared_experts=None) == 0


def test_a_default_that_nothing_tells_is_none():
    assert _value("llama", "num_hidden_layers") is None
    assert _value("qwen3_moe", "num_experts") is None
    assert _value("llama", "head_dim", hidden_size=64, num_attention_heads=0) is None
    assert _value("llama", "head_dim", hidden_size="64", num_attention_heads=4) is None
    assert _value("llama", "a_key_of_nobody") is None
    assert _value("llama", "a_key_of_nobody", text_config={"a_key_of_nobody": 3}) == 3


def test_rotated_dimensions_of_minimax_in_both_forms():
    assert _value("minimax_m2", "rotary_dim", rotary_dim=64) == 64
    assert _value("minimax_m2", "partial_rotary_factor", rotary_dim=64, head_dim=128) == 0.5
    saved = {"head_dim": 128, "rope_parameters": {"partial_rotary_factor": 0.5}}
    assert _value("minimax_m2", "rotary_dim", **saved) == 64
    assert _value("minimax_m2", "rotary_dim") == 128
    assert _value("minimax_m2", "partial_rotary_factor") == 1.0


def test_rope_scaling_in_both_forms():
    assert _value("qwen3", "rope_scaling", rope_scaling=YARN) == YARN
    saved = {"rope_parameters": {**YARN, "rope_theta": 1e6}}
    assert _value("qwen3", "rope_scaling", **saved) == YARN
    assert _value("qwen3", "rope_theta", **saved) == 1e6
    default = {"rope_theta": 1e6, "rope_type": "default"}
    assert _value("qwen3", "rope_scaling", rope_parameters=default) is None
    assert _value("qwen3", "rope_scaling", rope_scaling=None) is None
    assert _value("gpt_oss", "rope_scaling")["factor"] == 32.0


def test_gemma_3_has_positions_of_two_kinds():
    linear = {"rope_type": "linear", "factor": 8.0}
    published = {"text_config": {"rope_scaling": linear}}
    saved = {
        "rope_parameters": {
            "full_attention": {**linear, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        }
    }
    assert _value("gemma3", "rope_scaling", **published) == linear
    assert _value("gemma3", "rope_theta", **published) == 1e6
    assert _value("gemma3", "rope_local_base_freq", **published) == 10000.0
    assert _value("gemma3", "rope_scaling", **saved) == linear
    assert _value("gemma3", "rope_theta", **saved) == 2e6
    assert _value("gemma3", "rope_local_base_freq", **saved) == 3e4


def test_kinds_of_layers_and_their_period_tell_each_other():
    three = ["linear_attention", "linear_attention", "full_attention"]
    assert _value("qwen3_next", "full_attention_interval", layer_types=three * 2) == 3
    assert _value("qwen3_next", "full_attention_interval", layer_types=three[::-1]) == 4
    assert _value("qwen3_next", "full_attention_interval") == 4
    assert (
        _value("qwen3_next", "layer_types", num_hidden_layers=3, full_attention_interval=3) == three
    )
    two = _value("gemma3", "layer_types", num_hidden_layers=2, sliding_window_pattern=2)
    assert two == ["sliding_attention", "full_attention"]


def test_dense_layers_of_deepseek_in_both_forms():
    published = {"num_hidden_layers": 3, "first_k_dense_replace": 1}
    kinds = ["dense", "sparse", "sparse"]
    assert _value("deepseek_v3", "mlp_layer_types", **published) == kinds
    assert _value("deepseek_v3", "mlp_layer_types", mlp_layer_types=kinds[1:]) == kinds[1:]


def test_model_types_of_one_family_may_have_other_defaults():
    assert _value("qwen3_5", "num_key_value_heads", model_type="qwen3_5_moe") == 2
    assert _value("qwen3_5", "num_key_value_heads", model_type="qwen3_5_text") == 4


@pytest.mark.parametrize("value", [[1], "x", True, {}, -1, 10**400, float("nan")])
def test_values_of_any_kind_and_size_are_read(value):
    for family in families():
        table = architecture(family)
        config = dict.fromkeys([*table.config, "text_config", "rope_parameters"], value)
        for key in table.config:
            ConfigFacts(config, table).value(key)
