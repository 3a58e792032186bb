"""The defaults in the families' tables are those of transformers' config classes."""

from __future__ import annotations

import pytest

from policy_dsl.roles.architecture import architecture
from policy_dsl.roles.config_facts import TIED, ConfigFacts, written_value

pytestmark = pytest.mark.slow
TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl_moe",
    "qwen2_moe": "qwen2_moe",
    "olmoe": "olmoe",
    "olmo2": "olmo3",
    "olmo3": "olmo3",
    "qwen3_5": "qwen3_5",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5",
    "minimax_m2": "minimax_m2",
    "glm4_moe": "glm4_moe",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt_oss",
    "deepseek_v3": "deepseek_v3",
    "deepseek_v32": "deepseek_v3",
    "kimi_k25": "kimi_k2",
    "glm4_moe_lite": "glm4_moe_lite",
    "glm_moe_dsa": "glm_moe_dsa",
    "longcat_flash": "longcat_flash",
    "dots1": "dots1",
    "mimo_v2_flash": "mimo_v2_flash",
    "solar_open": "solar_open",
    "seed_oss": "seed_oss",
    "exaone4": "exaone4",
    "exaone_moe": "exaone_moe",
    "ministral3": "ministral3",
    "mistral3": "mistral3",
    "mistral4": "mistral4",
    "muse_glimmer": "muse_glimmer",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitemoehybrid",
    "jamba": "jamba",
    "kimi_linear": "kimi_linear",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2_moe",
    "mellum": "mellum",
    "nemotron_h": "nemotron_h",
    "phimoe": "phimoe",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "afmoe": "afmoe",
    "laguna": "laguna",
}
# Keys of publishers' own code and of other readers; transformers has no attribute for them.
ELSEWHERE = {
    "minimax_m2": {
        "partial_rotary_factor",
        "use_qk_norm",
        "use_routing_bias",
        "scoring_func",
        "shared_intermediate_size",
        "rotary_dim",
    },
    "deepseek_v3": {"moe_layer_freq", "index_n_heads", "index_head_dim", "index_topk"},
    "kimi_k2": {"moe_layer_freq"},
    "glm4_moe": {"moe_layer_freq"},
    "glm4_moe_lite": {"moe_layer_freq", "first_k_dense_replace"},
    "glm_moe_dsa": {"moe_layer_freq", "index_topk_freq", "topk_method", "scoring_func"},
    "longcat_flash": {
        "attention_method",
        "zero_expert_type",
        "mla_scale_q_lora",
        "mla_scale_kv_lora",
        "router_bias",
        "norm_topk_prob",
        "num_hidden_layers",
    },
    "dots1": {"moe_layer_freq"},
    "mimo_v2_flash": {
        "flat_rope_theta",
        "written_window",
        "window",
        "flat_swa_rope_theta",
        "flat_partial_rotary_factor",
        "moe_layer_freq",
        "hybrid_layer_pattern",
        "layernorm_epsilon",
        "sliding_window_size",
        "swa_num_attention_heads",
        "swa_num_key_value_heads",
        "swa_head_dim",
        "swa_v_head_dim",
        "add_swa_attention_sink_bias",
        "add_full_attention_sink_bias",
        "n_shared_experts",
        "topk_method",
        "scoring_func",
    },
    "exaone4": {"sliding_window_pattern"},
    "gpt_oss": {"truncate", "written_scaling"},
    "exaone_moe": {"moe_layer_freq", "is_moe_layer", "n_routed_experts", "n_shared_experts"},
    "solar_open": {"moe_layer_freq", "first_k_dense_replace", "intermediate_size"},
    "qwen3_next": {"full_attention_interval"},
    "afmoe": {"route_norm", "score_func", "n_group", "topk_group", "n_shared_experts"},
    "laguna": {"qkv_bias", "moe_router_score_func"},
    "qwen3_vl_moe": {"norm_topk_prob"},
    # Its second type has no windows.
    "olmo3": {"sliding_window", "layer_types", "rope_local_base_freq", "local_rope_type"},
    "qwen3_5": {"full_attention_interval"},
    "gemma3": {"sliding_window_pattern"},
    "granitemoehybrid": {"layer_types"},
    "kimi_linear": {
        *("rope_theta", "rope_scaling", "moe_layer_freq", "first_k_dense_replace"),
        *("dense_layers", "written_kinds", "kda_layers", "full_attn_layers"),
        *("linear_attn_config", "model_max_length", "num_expert_group"),
        *("num_experts_per_token", "num_shared_experts"),
    },
    "jamba": {
        "rope_theta",
        "rope_scaling",
        "layers_block_type",
        "feed_forward_type",
        "norm_topk_prob",
    },
    "nemotron_h": {
        *("rope_theta", "rope_scaling", "num_hidden_layers", "hybrid_override_pattern"),
        *("block_kinds", "expert_size"),
    },
    "lfm2": {"mlp_size", "block_dim", "rms_norm_eps"},
    "lfm2_moe": {"full_attn_idxs", "rms_norm_eps"},
    "phimoe": {"original_max_position_embeddings"},
    "gemma4": {"sliding_window_pattern", "global_head_dim", "num_global_key_value_heads"},
}
# transformers builds a prediction block only when it is told to; silence means none here.
OTHERWISE = {"num_nextn_predict_layers"}
# It always writes these. Configs without them are for code that takes no scale, and has lists of
# its own.
WRITTEN = {
    "mimo_v2_flash": {"attention_value_scale", "layer_types"},
    "laguna": {"num_attention_heads_per_layer"},
}
# Its text config has another default, which the model does not look at.
TIED_AT_THE_TOP = {"qwen3_vl_moe"}
# Keys that some of its models look for and whose classes do not declare them.
UNSAID = {"head_dim", "partial_rotary_factor"}


@pytest.mark.parametrize("model_type", TYPES)
def test_absent_keys_mean_what_transformers_assumes(model_type):
    transformers = pytest.importorskip("transformers")
    table = architecture(TYPES[model_type])
    whole = transformers.CONFIG_MAPPING[model_type]()
    saved = whole.get_text_config().to_dict()
    if model_type in TIED_AT_THE_TOP:
        saved[TIED] = whole.tie_word_embeddings
    sizes = {key: value for key, value in saved.items() if _must_be_there(table, key)}
    config = {"model_type": model_type, **sizes}
    for key in table.config:
        wanted = ConfigFacts(saved, table).value(key)
        if key in OTHERWISE | WRITTEN.get(model_type, set()) or (
            key not in config and written_value(saved, key) is None
        ):
            continue
        assert ConfigFacts(config, table).value(key) == wanted, key


@pytest.mark.parametrize("model_type", TYPES)
def test_every_key_is_one_of_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    family = TYPES[model_type]
    made = transformers.CONFIG_MAPPING[model_type]()
    whole = made.to_dict() | made.get_text_config().to_dict()
    flat = {**whole, **_flat(whole.get("rope_parameters") or {})}
    for key, entry in architecture(family).config.items():
        known = key in {*ELSEWHERE.get(family, ()), *UNSAID, *OTHERWISE} or not entry.paths
        of_other_types = family == "qwen3_5" or key == "mlp_layer_types"
        assert known or of_other_types or any(path[-1] in flat for path in entry.paths), key


@pytest.mark.parametrize("model_type", TYPES)
def test_what_transformers_saves_means_what_it_was_made_of(model_type, tmp_path):
    """Values that no default has, written by transformers, found by the table."""
    transformers = pytest.importorskip("transformers")
    table = architecture(TYPES[model_type])
    own = transformers.CONFIG_MAPPING[model_type]().get_text_config().to_dict()
    given = {
        key: value + 2
        for key, value in own.items()
        if key in table.config and table.config[key].paths and type(value) is int
        if key != "num_hidden_layers"
    }
    given["hidden_size"] = given["num_attention_heads"] * 8
    if "per_layer_config" in own:
        # It may be said for all layers or for each, and not for both.
        del given["head_dim"]
    if "mamba_n_heads" in given:
        given |= {"mamba_n_heads": given["mamba_expand"], "mamba_d_head": given["hidden_size"]}
    if "n_routed_experts" in given:
        given["n_routed_experts"] = given.get("n_group", 1) * 4
    nested = hasattr(transformers.CONFIG_MAPPING[model_type](), "text_config")
    made = transformers.CONFIG_MAPPING[model_type](**({"text_config": given} if nested else given))
    made.save_pretrained(tmp_path)
    saved, _ = transformers.PreTrainedConfig.get_config_dict(tmp_path)
    text = made.get_text_config()
    for key in given:
        assert ConfigFacts(saved, table).value(key) == getattr(text, key), key


def _must_be_there(table, key):
    entry = table.config.get(key)
    return entry is not None and not entry.defaults


def _flat(mapping):
    inner = [one for one in mapping.values() if isinstance(one, dict)]
    return {key: value for one in [mapping, *inner] for key, value in one.items()}
