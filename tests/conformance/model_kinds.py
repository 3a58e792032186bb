"""The kinds of checkpoints that conformance is shown on, and the configs publishers write.

What transformers 5 saves differs from what publishers publish: nested rope settings, renamed
or dropped keys. mlx-lm's own conversion takes the second only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

N_LAYERS = 6
# Columns are multiples of 128, so that every group size divides them.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}


@dataclass(frozen=True)
class Kind:
    """One checkpoint to make: its transformers config and how its publisher stores it.

    dtype: of the tensors; declared: what the config says, None for the same, "" for nothing.
    storage: `plain`, `fp8` (128 x 128 blocks) or `fused` (experts as 3-D tensors).
    shards: files of the tensors; one has no index.
    """

    family: str
    config_class: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    declared: str | None = None
    storage: str = "plain"
    shards: int = 3

    @property
    def n_layers(self) -> int:
        """Layers of the language model."""
        return int(self.options.get("num_hidden_layers", N_LAYERS))

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts."""
        return any("experts" in key for key in self.options)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as published, and the same weights in a form that mlx-lm can read."""

    published: Path
    readable: Path


_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MINIMAX = {**_MIXTRAL, "rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}}
_QWEN3_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "mlp_only_layers": [1],
}
_GLM = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "attention_bias": True,
    "use_qk_norm": True,
}
# Blocks of 128 do not divide 192: the last one of a row is partial.
_PARTIAL = {"intermediate_size": 192, "moe_intermediate_size": 192}
_TIED = {"tie_word_embeddings": True}
# These classes have none.
_NO_HEAD_DIM = {"head_dim": None}
_FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_QWEN_SHARED = {
    **_FOUR_EXPERTS,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}

KINDS: Mapping[str, Kind] = {
    "llama": Kind("llama", "LlamaConfig", {"num_hidden_layers": 9}),
    "llama_tied": Kind("llama", "LlamaConfig", {**_TIED, "attention_bias": True, "mlp_bias": True}),
    # mlx-lm casts to what the config declares before it quantizes.
    "llama_cast": Kind("llama", "LlamaConfig", dtype="float32", declared="bfloat16"),
    "mistral": Kind("mistral", "MistralConfig", dtype="float16"),
    "mistral_undeclared": Kind("mistral", "MistralConfig", dtype="float16", declared=""),
    "mixtral": Kind("mixtral", "MixtralConfig", _MIXTRAL),
    "mixtral_fused": Kind("mixtral", "MixtralConfig", _MIXTRAL, storage="fused"),
    "qwen2": Kind("qwen2", "Qwen2Config"),
    "qwen2_tied": Kind("qwen2", "Qwen2Config", _TIED),
    "qwen3": Kind("qwen3", "Qwen3Config", dtype="float32"),
    "qwen3_moe": Kind("qwen3_moe", "Qwen3MoeConfig", _QWEN3_MOE),
    "qwen3_moe_fp8": Kind("qwen3_moe", "Qwen3MoeConfig", {**_QWEN3_MOE, **_PARTIAL}, storage="fp8"),
    "qwen3_moe_fused": Kind("qwen3_moe", "Qwen3MoeConfig", _QWEN3_MOE, storage="fused"),
    "minimax_m2": Kind("minimax_m2", "MiniMaxM2Config", _MINIMAX),
    "minimax_m2_fp8": Kind(
        "minimax_m2", "MiniMaxM2Config", {**_MINIMAX, **_PARTIAL}, storage="fp8"
    ),
    "minimax_m2_fused": Kind("minimax_m2", "MiniMaxM2Config", _MINIMAX, storage="fused"),
    "glm4_moe": Kind("glm4_moe", "Glm4MoeConfig", _GLM),
    "glm4_moe_fused": Kind("glm4_moe", "Glm4MoeConfig", _GLM, storage="fused"),
    "olmo2": Kind("olmo3", "Olmo2Config", _NO_HEAD_DIM),
    "olmo3": Kind("olmo3", "Olmo3Config", _NO_HEAD_DIM),
    "olmoe": Kind("olmoe", "OlmoeConfig", {**_NO_HEAD_DIM, **_FOUR_EXPERTS}),
    "qwen2_moe": Kind("qwen2_moe", "Qwen2MoeConfig", {**_NO_HEAD_DIM, **_QWEN_SHARED}),
    "qwen3_next": Kind("qwen3_next", "Qwen3NextConfig", {**_QWEN_SHARED, **_DELTA}),
    "qwen3_next_fp8": Kind(
        "qwen3_next", "Qwen3NextConfig", {**_QWEN_SHARED, **_DELTA}, storage="fp8"
    ),
    "gemma3_text": Kind("gemma3", "Gemma3TextConfig", _TIED, shards=1),
    "gemma3": Kind("gemma3", "Gemma3Config", _TIED),
}

# Families and sizes that only jang's tools are asked about.
_ROPE = {"rope_parameters": {"rope_theta": 5e6, "partial_rotary_factor": 0.5}}
_WIDE = {
    **_ROPE,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
}
_LATENT = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
JANG_KINDS: Mapping[str, Kind] = {
    "minimax_m2_32": Kind("minimax_m2", "MiniMaxM2Config", _WIDE),
    "minimax_m2_32_fp8": Kind("minimax_m2", "MiniMaxM2Config", _WIDE, storage="fp8"),
    "deepseek_v3": Kind("deepseek_v3", "DeepseekV3Config", _LATENT),
    # Kimi-K2 is published as DeepSeek-V3 under its own name.
    "kimi_k2": Kind("kimi_k2", "DeepseekV3Config", _LATENT),
}


# Of these, publishers write what is theirs further below.
_NESTED_ROPE = (
    "Gemma4Config",
    "Gemma4TextConfig",
    "Gemma4UnifiedConfig",
    "GptOssConfig",
    "Kimi_K25Config",
    "LagunaConfig",
    "MellumConfig",
    "MiMoV2FlashConfig",
    "Mistral4Config",
)


def published_config(config: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    """The config that transformers 5 saved, as the family's publishers write it."""
    found = {key: value for key, value in config.items() if key != "dtype"}
    if kind.config_class == "Gemma3Config":
        text = _flat_rope(found.pop("text_config"))
        found |= {"text_config": text, "vocab_size": text.pop("vocab_size")}
        for key in ("dtype", "tie_word_embeddings"):
            text.pop(key)
        del found["tie_word_embeddings"]
    elif kind.family.startswith("qwen3_vl"):
        text = dict(found["text_config"])
        rope = dict(text.pop("rope_parameters"))
        found["text_config"] = {**text, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    elif kind.config_class not in _NESTED_ROPE and kind.family not in ("qwen3_5", "ministral3"):
        found = _flat_rope(found)
    if kind.family in ("qwen3_5", "qwen3_next"):
        text = found.get("text_config", found)
        text["full_attention_interval"] = 1 + text["layer_types"].index("full_attention")
    if kind.family == "qwen3_vl_moe":
        found["text_config"]["num_experts"] = found["text_config"].pop("num_local_experts")
    if kind.family == "minimax_m2":
        rotary = int(found["head_dim"] * found["partial_rotary_factor"])
        found |= {"rotary_dim": rotary, "shared_intermediate_size": 0, "use_qk_norm": True}
    if kind.family == "qwen3_moe":
        found["num_experts"] = found.pop("num_local_experts")
    if kind.family == "kimi_k2" and "text_config" not in found:
        found["model_type"] = kind.family
    found = _OF_PUBLISHERS.get(kind.config_class, dict)(found)
    declared = kind.dtype if kind.declared is None else kind.declared
    # MiniMax-M2.7 writes `dtype`, which mlx-lm does not look at: nothing is cast.
    key = "dtype" if kind.family == "minimax_m2" else "torch_dtype"
    return found | ({key: declared} if declared else {})


def _kimi_k25(config: dict[str, Any]) -> dict[str, Any]:
    text = _flat_rope(config["text_config"])
    return {**config, "text_config": {**text, "model_type": "kimi_k2"}}


def _glm_moe_dsa(config: dict[str, Any]) -> dict[str, Any]:
    """GLM-5 counts dense layers, and nests its settings of positions as transformers does."""
    listed = ("mlp_layer_types", "indexer_types", "layer_types", "rope_theta", "rope_scaling")
    found = {key: value for key, value in config.items() if key not in listed}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    return found | {"rope_parameters": rope, "moe_layer_freq": 1, **_ROUTING}


def _counted(config: dict[str, Any]) -> dict[str, Any]:
    """Dense layers by their count."""
    dense = config["mlp_layer_types"].count("dense")
    listed = ("mlp_layer_types", "layer_types")
    found = {key: value for key, value in config.items() if key not in listed}
    return found | {"first_k_dense_replace": dense, **_ROUTING}


def _longcat(config: dict[str, Any]) -> dict[str, Any]:
    scales = {"mla_scale_q_lora": True, "mla_scale_kv_lora": True}
    return config | {"attention_method": "MLA", "zero_expert_type": "identity", **scales}


def _mimo_v2_flash(config: dict[str, Any]) -> dict[str, Any]:
    """Kinds of layers in lists of 0 and 1, and all that windows have of their own."""
    found, rope = dict(config), config["rope_parameters"]
    kinds, blocks = found.pop("layer_types"), found.pop("mlp_layer_types")
    full, sliding = rope["full_attention"], rope["sliding_attention"]
    del found["rope_parameters"]
    return found | {
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in kinds],
        "moe_layer_freq": [int(block == "sparse") for block in blocks],
        "layernorm_epsilon": found.pop("rms_norm_eps"),
        "rope_theta": full["rope_theta"],
        "partial_rotary_factor": full["partial_rotary_factor"],
        "swa_rope_theta": sliding["rope_theta"],
        "swa_num_attention_heads": found["num_attention_heads"],
        "swa_num_key_value_heads": 2 * found["num_key_value_heads"],
        "swa_head_dim": found["head_dim"],
        "swa_v_head_dim": found["v_head_dim"],
        "sliding_window_size": found["sliding_window"],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "n_shared_experts": None,
        "routed_scaling_factor": None,
        **_ROUTING,
    }


def _bailing_moe_v3(config: dict[str, Any]) -> dict[str, Any]:
    """Other names of sizes, and how often attention is full."""
    names = {
        "num_expert_group": "n_group",
        "num_experts_per_token": "num_experts_per_tok",
        "moe_renormalize": "norm_topk_prob",
        "model_max_length": "max_position_embeddings",
        "linear_head_dim": "head_dim",
    }
    listed = ("layer_types", "mlp_layer_types", "linear_num_heads", "linear_conv_kernel_dim")
    found = {key: value for key, value in config.items() if key not in (*listed, *names)}
    found |= {name: config[key] for key, name in names.items()}
    size = config["moe_intermediate_size"]
    classes = ["BailingMoeV3ForCausalLM"]
    return found | {"architectures": classes, "moe_shared_expert_intermediate_size": size}


def _granite_4(config: dict[str, Any]) -> dict[str, Any]:
    """Kinds of layers in other words, and no limits of time steps."""
    found = {key: value for key, value in config.items() if key != "time_step_limit"}
    words = {"linear_attention": "mamba", "full_attention": "attention"}
    found["layer_types"] = [words[kind] for kind in config["layer_types"]]
    return found | {"position_embedding_type": config["position_embedding_type"] or "nope"}


def _kimi_linear(config: dict[str, Any]) -> dict[str, Any]:
    """Layers listed by their kind, counted from 1, and dense ones by their count."""
    listed = ("layer_types", "mlp_layer_types")
    found = {key: value for key, value in config.items() if key not in listed}
    kinds = list(enumerate(config["layer_types"], 1))
    words = {"kda_layers": "linear_attention", "full_attn_layers": "full_attention"}
    found["linear_attn_config"] = {
        **{key: [at for at, kind in kinds if kind == word] for key, word in words.items()},
        "num_heads": found.pop("linear_num_heads"),
        "head_dim": found.pop("linear_head_dim"),
        "short_conv_kernel_size": found.pop("linear_conv_kernel_dim"),
    }
    dense = config["mlp_layer_types"].count("dense")
    return found | {"first_k_dense_replace": dense, "rope_theta": 10000.0, "moe_layer_freq": 1}


def _lfm2(config: dict[str, Any]) -> dict[str, Any]:
    """Layers that attend by their numbers, and the older names of sizes."""
    found = dict(config)
    kinds = enumerate(found.pop("layer_types"))
    return found | {
        "full_attn_idxs": [at for at, kind in kinds if kind == "full_attention"],
        "block_ff_dim": found.pop("intermediate_size"),
        "block_dim": found["hidden_size"],
        "tie_embedding": found.pop("tie_word_embeddings"),
    }


def _mellum(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "num_experts": config["num_local_experts"]}


def _nemotron_h(config: dict[str, Any]) -> dict[str, Any]:
    """Kinds of layers by letters, and no limits of time steps."""
    found = {key: value for key, value in config.items() if key != "time_step_limit"}
    letters = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}
    kinds = found.pop("layers_block_type")
    pattern = "".join(letters[kind] for kind in kinds)
    return found | {"hybrid_override_pattern": pattern, "num_hidden_layers": len(kinds)}


def _exaone4(config: dict[str, Any]) -> dict[str, Any]:
    """Windows by letters that are repeated."""
    is_mixed = config["sliding_window"] is not None
    return config | {"sliding_window_pattern": "LG" if is_mixed else None}


def _exaone_moe(config: dict[str, Any]) -> dict[str, Any]:
    """Layers with experts by a list of true and false."""
    found = dict(config)
    sparse = [kind == "sparse" for kind in found.pop("mlp_layer_types")]
    return found | {"is_moe_layer": sparse, "sliding_window_pattern": "LG", **_ROUTING}


def _minimax_m3(config: dict[str, Any]) -> dict[str, Any]:
    """Kinds of layers in lists of 0 and 1, and settings of the indexer in a mapping."""
    text = _flat_rope(config["text_config"])
    sparse = [int(kind != "full_attention") for kind in text.pop("layer_types")]
    text["moe_layer_freq"] = [int(kind == "sparse") for kind in text.pop("mlp_layer_types")]
    names = {
        "sparse_num_index_heads": "index_n_heads",
        "sparse_index_dim": "index_head_dim",
        "sparse_block_size": "index_block_size",
        "sparse_topk_blocks": "index_topk_blocks",
        "sparse_local_block": "index_local_blocks",
    }
    indexer = {key: text.pop(name) for key, name in names.items()}
    text["sparse_attention_config"] = {**indexer, "sparse_attention_freq": sparse}
    own = {"hidden_act": "swigluoai", "use_qk_norm": True, "use_gemma_norm": True}
    return {**config, "text_config": {**text, **own}}


def _gemma4(config: dict[str, Any]) -> dict[str, Any]:
    """What layers with full attention have of their own under keys for all of them."""
    if "text_config" in config:
        text = _gemma4(config["text_config"])
        return {**config, "text_config": text, "vocab_size": text["vocab_size"]}
    found = dict(config)
    own = next(iter(found.pop("per_layer_config").values()))
    heads = own.get("num_key_value_heads")
    return found | {"global_head_dim": own["head_dim"], "num_global_key_value_heads": heads}


def _flat_text(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "text_config": _flat_rope(config["text_config"])}


_ROUTING = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
# Class of a config -> what publishers write otherwise, positions apart.
_OF_PUBLISHERS: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "BailingHybridConfig": _bailing_moe_v3,
    "Kimi_K25Config": _kimi_k25,
    "Gemma4Config": _gemma4,
    "Gemma4TextConfig": _gemma4,
    "Gemma4UnifiedConfig": _gemma4,
    "GlmMoeDsaConfig": _glm_moe_dsa,
    "DeepseekV32Config": _counted,
    "Glm4MoeLiteConfig": _counted,
    "Exaone4Config": _exaone4,
    "ExaoneMoeConfig": _exaone_moe,
    "Llama4Config": _flat_text,
    "LongcatFlashConfig": _longcat,
    "MiniMaxM3VLConfig": _minimax_m3,
    "MiMoV2FlashConfig": _mimo_v2_flash,
    "GraniteMoeHybridConfig": _granite_4,
    "KimiLinearConfig": _kimi_linear,
    "Lfm2Config": _lfm2,
    "MellumConfig": _mellum,
    "Mistral3Config": _flat_text,
    "NemotronHConfig": _nemotron_h,
}


def _flat_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(config)
    # Some have no positions.
    if (given := found.pop("rope_parameters", None)) is None:
        return found
    rope = dict(given)
    if "full_attention" not in rope:
        return found | _split_rope(rope)
    if "_sliding_window_pattern" not in found:
        return found | _split_rope(rope["full_attention"])
    words = found.pop("layer_types")
    pattern = found.pop("_sliding_window_pattern")
    return found | {
        **_split_rope(rope["full_attention"]),
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "sliding_window_pattern": words.index("full_attention") + 1
        if "full_attention" in words
        else pattern,
    }


def _split_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `rope_parameters` at the top, those of scaled positions below."""
    own = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in own}
    return {**own, "rope_scaling": scaling if rope["rope_type"] != "default" else None}
