"""Small checkpoints of every family in three forms of config, and what transformers answers.

published: as the family's publishers write it. saved: as transformers 5 saves it. bare: that,
without every key that has the class's default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from checkpoints import saved, write_folder
from model_kinds import SIZES, Kind, published_config
from numpy.typing import NDArray

FORMS = ("published", "saved", "bare")
PROMPT = (1, 5, 17, 200, 33, 3, 83, 255, 93, 23, 140, 61, 7, 7, 210, 99, 300, 2, 45, 180)
_SMALL = {
    **{key: SIZES[key] for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings")},
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
_BASE = {"rope_type": "default", "rope_theta": 5e5}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_TIED = {"tie_word_embeddings": True}
_GEMMA = {
    **_TIED,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
    "rope_parameters": {
        "full_attention": {**_LINEAR, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    },
}
_LATENT = {
    **_EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "num_nextn_predict_layers": 0,
    "rope_parameters": _BASE,
}
# These classes have none.
_NO_HEAD_DIM = {"head_dim": None}
_OLMO3 = {
    **_NO_HEAD_DIM,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "rope_parameters": {
        "full_attention": {**_YARN, "rope_theta": 5e5, "attention_factor": 1.2079441541679836},
        "sliding_attention": _BASE,
    },
}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "rope_parameters": {**_BASE, "partial_rotary_factor": 0.5},
}
_MROPE = {**_BASE, "mrope_section": [8, 4, 4]}
_INDEXER = {"index_n_heads": 2, "index_head_dim": 32, "index_topk": 64}
_GRANITE = {
    **_NO_HEAD_DIM,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.3,
    "logits_scaling": 6.0,
}
_GRANITE_4 = {
    **_GRANITE,
    "layer_types": ["mamba", "attention", "mamba"],
    "shared_intermediate_size": 96,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
}
# mlx-lm gives the chosen experts weights of 1 in sum. These are all, so that they have it anyway.
_JAMBA = {
    **_NO_HEAD_DIM,
    "num_experts_per_tok": 4,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "mamba_dt_rank": 32,
    "mamba_d_state": 16,
}
_CONV = {
    **_NO_HEAD_DIM,
    **_TIED,
    "layer_types": ["conv", "full_attention", "conv"],
    "conv_bias": True,
    "rope_parameters": _BASE,
}
_NEMOTRON = {
    **_EXPERTS,
    "num_hidden_layers": None,
    "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
    "n_routed_experts": 8,
    "moe_shared_expert_intermediate_size": 96,
    "routed_scaling_factor": 2.5,
    "mamba_num_heads": 32,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 16,
}
_GEMMA_4 = {
    **_GEMMA,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 64,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": _SMALL["vocab_size"],
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
_MISTRAL_4 = {
    **_YARN,
    "factor": 64.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "partial_rotary_factor": 1 / 3,
}
_LLAMA_4 = {
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 192,
    "num_hidden_layers": 4,
    "attention_chunk_size": 8,
    "rope_parameters": _BASE,
}
# Of these, LongCat's class has none, or by other names.
_NOT_LONGCAT = (
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "num_nextn_predict_layers",
    *_EXPERTS,
)
# Models of which transformers has no class; they are like those of another.
OF_OTHERS = ("kimi_k2", "joyai_llm_flash", "mimo")
# What a config says also where it is the default: publishers' code takes something else for
# silence about the last.
_ALWAYS = ("model_type", "architectures", "attention_value_scale")
_DENSE = re.compile(r"\.block_sparse_moe\.((?:gate|up|down)_proj\.)")


def _kind(family: str, config_class: str, **options: Any) -> Kind:
    # A null takes out what classes do not have, and is the value of other keys.
    sizes = {key: value for key, value in _SMALL.items() if options.get(key, value) is not None}
    given = {**sizes, **{key: options[key] for key in options if key in sizes or key not in _SMALL}}
    return Kind(family, config_class, given, dtype="float32", shards=1)


MODELS: Mapping[str, Kind] = {
    "llama": _kind("llama", "LlamaConfig", rope_parameters=_LLAMA3),
    "llama_base": _kind("llama", "LlamaConfig", rope_parameters=_BASE),
    "llama_linear": _kind("llama", "LlamaConfig", rope_parameters=_LINEAR, **_TIED),
    "mistral": _kind("mistral", "MistralConfig", rope_parameters=_BASE),
    "mixtral": _kind(
        "mixtral",
        "MixtralConfig",
        rope_parameters=_BASE,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen2": _kind("qwen2", "Qwen2Config", rope_parameters=_YARN),
    "qwen2_tied": _kind("qwen2", "Qwen2Config", rope_parameters=_BASE, **_TIED),
    "qwen3": _kind("qwen3", "Qwen3Config", rope_parameters=_YARN),
    "qwen3_moe": _kind(
        "qwen3_moe",
        "Qwen3MoeConfig",
        rope_parameters=_BASE,
        num_experts=4,
        mlp_only_layers=[1],
        **_EXPERTS,
    ),
    "minimax_m2": _kind(
        "minimax_m2",
        "MiniMaxM2Config",
        rope_parameters={**_BASE, "partial_rotary_factor": 0.5},
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "glm4_moe": _kind(
        "glm4_moe",
        "Glm4MoeConfig",
        rope_parameters={**_BASE, "partial_rotary_factor": 0.25},
        n_routed_experts=4,
        attention_bias=True,
        num_nextn_predict_layers=0,
        **_EXPERTS,
    ),
    "gemma3_text": _kind("gemma3", "Gemma3TextConfig", **_GEMMA),
    "gemma3": _kind("gemma3", "Gemma3Config", **_GEMMA),
    "olmo2": _kind("olmo3", "Olmo2Config", rope_parameters=_BASE, **_NO_HEAD_DIM),
    "olmo3": _kind("olmo3", "Olmo3Config", **_OLMO3),
    "olmoe": _kind(
        "olmoe",
        "OlmoeConfig",
        rope_parameters=_BASE,
        num_experts=4,
        num_experts_per_tok=2,
        **_NO_HEAD_DIM,
    ),
    "qwen2_moe": _kind(
        "qwen2_moe",
        "Qwen2MoeConfig",
        rope_parameters=_BASE,
        num_experts=4,
        shared_expert_intermediate_size=96,
        **_EXPERTS,
        **_NO_HEAD_DIM,
    ),
    "qwen3_next": _kind("qwen3_next", "Qwen3NextConfig", num_experts=4, **_EXPERTS, **_DELTA),
    "qwen3_5": _kind("qwen3_5", "Qwen3_5Config", **_DELTA),
    "qwen3_5_tied": _kind("qwen3_5", "Qwen3_5TextConfig", **_TIED, **_DELTA),
    "qwen3_5_text": _kind("qwen3_5", "Qwen3_5TextConfig", **_DELTA),
    "qwen3_5_moe": _kind("qwen3_5", "Qwen3_5MoeConfig", num_experts=4, **_EXPERTS, **_DELTA),
    "qwen3_vl": _kind("qwen3_vl", "Qwen3VLConfig", rope_parameters=_MROPE),
    "qwen3_vl_tied": _kind("qwen3_vl", "Qwen3VLConfig", rope_parameters=_MROPE, **_TIED),
    "qwen3_vl_moe": _kind(
        "qwen3_vl_moe",
        "Qwen3VLMoeConfig",
        rope_parameters=_MROPE,
        num_experts=4,
        mlp_only_layers=[1],
        **_EXPERTS,
    ),
    "deepseek_v3": _kind("deepseek_v3", "DeepseekV3Config", **_LATENT),
    "kimi_k2": _kind("kimi_k2", "DeepseekV3Config", **_LATENT),
    "joyai_llm_flash": _kind("deepseek_v3", "DeepseekV3Config", **_LATENT),
    "deepseek_v32": _kind("deepseek_v3", "DeepseekV32Config", **_LATENT, **_INDEXER),
    "glm_moe_dsa": _kind("glm_moe_dsa", "GlmMoeDsaConfig", **_LATENT, **_INDEXER),
    "glm4_moe_lite": _kind("glm4_moe_lite", "Glm4MoeLiteConfig", **_LATENT),
    "kimi_k25": _kind("kimi_k2", "Kimi_K25Config", **_LATENT),
    "longcat_flash": _kind(
        "longcat_flash",
        "LongcatFlashConfig",
        **{key: value for key, value in _LATENT.items() if key not in _NOT_LONGCAT},
        num_layers=2,
        ffn_hidden_size=128,
        moe_topk=3,
        zero_expert_num=4,
        expert_ffn_hidden_size=64,
    ),
    "dots1": _kind(
        "dots1",
        "Dots1Config",
        rope_parameters=_BASE,
        n_routed_experts=8,
        n_shared_experts=2,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        **_EXPERTS,
    ),
    "mimo_v2_flash": _kind(
        "mimo_v2_flash",
        "MiMoV2FlashConfig",
        **_EXPERTS,
        n_routed_experts=8,
        head_dim=48,
        v_head_dim=32,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        rope_parameters={
            "full_attention": {**_BASE, "partial_rotary_factor": 0.334},
            "sliding_attention": {**_BASE, "rope_theta": 3e4, "partial_rotary_factor": 0.334},
        },
    ),
    "bailing_hybrid": _kind(
        "bailing_moe_v3",
        "BailingHybridConfig",
        **_EXPERTS,
        layer_group_size=3,
        first_k_dense_replace=1,
        num_local_experts=8,
        n_group=2,
        topk_group=1,
        num_mtp_layers=0,
        num_key_value_heads=4,
        kv_lora_rank=64,
        q_lora_rank=64,
        # transformers saves it as the size of heads, which are of 32 in delta attention.
        qk_rope_head_dim=48,
        qk_nope_head_dim=64,
        v_head_dim=96,
        pad_token_id=0,
    ),
    "granitemoe": _kind("granitemoe", "GraniteMoeConfig", rope_parameters=_BASE, **_GRANITE),
    "granitemoehybrid": _kind("granitemoehybrid", "GraniteMoeHybridConfig", **_GRANITE_4),
    "granitemoehybrid_dense": _kind(
        "granitemoehybrid_dense",
        "GraniteMoeHybridConfig",
        **{**_GRANITE_4, "num_local_experts": 0, "layer_types": ["attention"] * 3},
        rope_parameters=_BASE,
        position_embedding_type="rope",
    ),
    "jamba": _kind("jamba", "JambaConfig", num_experts=4, **_JAMBA),
    "jamba_dense": _kind("jamba", "JambaConfig", num_experts=1, **_JAMBA),
    "kimi_linear": _kind(
        "kimi_linear",
        "KimiLinearConfig",
        **_EXPERTS,
        num_experts=8,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention", "full_attention", "linear_attention"],
        mlp_layer_types=["dense", "dense", "sparse", "sparse"],
        linear_head_dim=32,
        linear_num_heads=2,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=96,
        head_dim=None,
        pad_token_id=0,
    ),
    "lfm2": _kind("lfm2", "Lfm2Config", **_CONV, block_multiple_of=32, intermediate_size=144),
    "lfm2_moe": _kind(
        "lfm2_moe", "Lfm2MoeConfig", **_CONV, **_EXPERTS, num_experts=4, num_dense_layers=1
    ),
    "mellum": _kind(
        "mellum",
        "MellumConfig",
        **_EXPERTS,
        num_experts=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        rope_parameters={"full_attention": _YARN, "sliding_attention": _BASE},
    ),
    "afmoe": _kind(
        "afmoe",
        "AfmoeConfig",
        **_EXPERTS,
        num_experts=4,
        num_dense_layers=1,
        global_attn_every_n_layers=3,
        sliding_window=8,
        mup_enabled=True,
        rope_parameters=_BASE,
    ),
    "laguna": _kind(
        "laguna",
        "LagunaConfig",
        **_EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=96,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        num_attention_heads_per_layer=[4, 6, 4],
        sliding_window=8,
        moe_router_logit_softcapping=2.0,
        rope_parameters={
            "full_attention": {**_YARN, "partial_rotary_factor": 0.5},
            "sliding_attention": {**_BASE, "partial_rotary_factor": 1.0},
        },
    ),
    "nemotron_h": _kind("nemotron_h", "NemotronHConfig", **_NEMOTRON),
    "nemotron_h_latent": _kind("nemotron_h", "NemotronHConfig", **_NEMOTRON, moe_latent_size=64),
    "phimoe": _kind(
        "phimoe",
        "PhimoeConfig",
        rope_parameters=_BASE,
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
        **_NO_HEAD_DIM,
    ),
    # Built like Qwen2; transformers has no class for it.
    "mimo": _kind("mimo", "Qwen2Config", rope_parameters=_BASE),
    "seed_oss": _kind("seed_oss", "SeedOssConfig", rope_parameters=_BASE),
    "ministral3": _kind("ministral3", "Ministral3Config"),
    "exaone4": _kind(
        "exaone4",
        "Exaone4Config",
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=8,
        rope_parameters=_LLAMA3,
    ),
    "exaone4_full": _kind(
        "exaone4",
        "Exaone4Config",
        layer_types=["full_attention"] * 3,
        sliding_window=None,
        rope_parameters=_BASE,
        **_TIED,
    ),
    "exaone_moe": _kind(
        "exaone_moe",
        "ExaoneMoeConfig",
        **_EXPERTS,
        num_experts=8,
        num_shared_experts=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        sliding_window=8,
        rope_parameters=_BASE,
    ),
    "minimax_m3_vl": _kind(
        "minimax_m3_vl",
        "MiniMaxM3VLConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        intermediate_size=64,
        dense_intermediate_size=96,
        shared_intermediate_size=32,
        rotary_dim=16,
        rope_parameters={**_BASE, "partial_rotary_factor": 0.5},
        index_n_heads=2,
        index_head_dim=32,
        index_block_size=4,
        index_topk_blocks=2,
        layer_types=["full_attention", "minimax_m3_sparse", "full_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "gemma4_text": _kind("gemma4", "Gemma4TextConfig", **_GEMMA_4),
    "gemma4": _kind(
        "gemma4",
        "Gemma4Config",
        **{**_GEMMA_4, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
        final_logit_softcapping=30.0,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=64,
    ),
    "gemma4_unified": _kind(
        "gemma4",
        "Gemma4UnifiedConfig",
        **{key: value for key, value in _GEMMA_4.items() if "per_layer" not in key},
    ),
    "gpt_oss": _kind(
        "gpt_oss",
        "GptOssConfig",
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=8,
        rope_parameters=_YARN,
    ),
    "llama4": _kind("llama4", "Llama4Config", **_LLAMA_4, num_local_experts=4),
    "llama4_text": _kind(
        "llama4_text",
        "Llama4TextConfig",
        **{**_LLAMA_4, "attention_chunk_size": 512},
        no_rope_layers=[1] * 4,
        moe_layers=[],
    ),
    "mistral3": _kind("mistral3", "Mistral3Config", rope_parameters=_BASE),
    "mistral4": _kind(
        "mistral4", "Mistral4Config", **{**_LATENT, **_NO_HEAD_DIM, "rope_parameters": _MISTRAL_4}
    ),
    "muse_glimmer": _kind(
        "muse_glimmer",
        "MuseGlimmerConfig",
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=8,
        rope_parameters=_BASE,
    ),
    "solar_open": _kind(
        "solar_open",
        "SolarOpenConfig",
        rope_parameters=_BASE,
        n_routed_experts=4,
        n_shared_experts=1,
        **_EXPERTS,
    ),
    "hunyuan_v1_dense": _kind("hunyuan_v1_dense", "HunYuanDenseV1Config", rope_parameters=_BASE),
    "ernie4_5_moe": _kind(
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        rope_parameters=_BASE,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=64,
        moe_num_shared_experts=1,
        moe_layer_end_index=2,
    ),
}

_SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": _SMALL["hidden_size"],
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_KIMI_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
    "pos_emb_time": 2,
}
# Config class -> a small vision model above the language model.
VISION: Mapping[str, Mapping[str, Any]] = {
    "Gemma3Config": _SIGLIP,
    "Gemma4Config": {**_SIGLIP, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4},
    "Gemma4UnifiedConfig": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
    "Llama4Config": {
        **_SIGLIP,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
    },
    "Mistral3Config": _SIGLIP,
    "MuseGlimmerConfig": {**_KIMI_VISION, "layer_types": ["full_attention"]},
    "Kimi_K25Config": _KIMI_VISION,
    "MiniMaxM3VLConfig": _SIGLIP,
    "Qwen3_5Config": _QWEN_VISION,
    "Qwen3_5MoeConfig": _QWEN_VISION,
    "Qwen3VLConfig": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
    "Qwen3VLMoeConfig": {**_QWEN_VISION, "deepstack_visual_indexes": [0]},
}
# And what else is above them.
_BETWEEN = {"MuseGlimmerConfig": {"out_hidden_size": 128, "projector_hidden_size": 32}}


@dataclass(frozen=True)
class Forms:
    """A checkpoint in each form, by its name, and transformers' logits [tokens, vocabulary]."""

    folders: Mapping[str, Path]
    logits: NDArray[np.float32]


def make_forms(name: str, folder: Path) -> Forms:
    """The checkpoint of a model of MODELS, written below `folder`."""
    kind = MODELS[name]
    model = _model(kind)
    # The whole model of Llama 4 raises where there are no images.
    decoder = model.language_model if name == "llama4" else model
    with torch.inference_mode():
        logits = np.asarray(decoder(input_ids=torch.tensor([PROMPT])).logits[0].float())
    tensors, config = saved(model, folder / "transformers", per_expert=True)
    own = {"model_type": name} if name in OF_OTHERS else {}
    configs = {"published": published_config(config, kind) | own, "saved": config | own}
    configs["bare"] = _bare(configs["saved"], kind.config_class)
    held = dict.fromkeys(FORMS, tensors)
    if name == "kimi_k25":
        # Nobody publishes it with this name for its layers.
        renamed = {key.replace(".model.blocks.", ".model.layers."): key for key in tensors}
        held["published"] = {key: tensors[saved_as] for key, saved_as in renamed.items()}
    if kind.family == "bailing_moe_v3":
        # Its publisher calls the last projection of delta attention otherwise.
        name = "model.layers.{}.attention.{}.weight".format
        renamed = {name(layer, "dense"): name(layer, "o_proj") for layer in (0, 1)}
        held["published"] = {renamed.get(name, name): one for name, one in tensors.items()}
    if kind.family == "kimi_linear":
        # Its publisher's dense layers have a name of their own.
        held["published"] = {_DENSE.sub(r".mlp.\1", name): one for name, one in tensors.items()}
    folders = {form: write_folder(folder / form, held[form], configs[form], 1) for form in FORMS}
    return Forms(folders, logits)


def read_config(bundle: Path) -> dict[str, Any]:
    """The config of a folder."""
    return dict(json.loads((bundle / "config.json").read_text()))


def cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """How far two sets of logits point into the same direction."""
    found, expected = found.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    return float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected))


def _model(kind: Kind) -> Any:
    torch.manual_seed(11)
    sizes = dict(kind.options)
    auto = transformers.AutoModelForCausalLM
    if kind.config_class in VISION:
        inner = {"text_config": sizes, "vision_config": VISION[kind.config_class]}
        sizes = {**inner, "tie_word_embeddings": sizes["tie_word_embeddings"]}
        sizes |= _BETWEEN.get(kind.config_class, {})
    if kind.config_class in (*VISION, "Mistral4Config"):
        auto = transformers.AutoModelForImageTextToText
    config = getattr(transformers, kind.config_class)(**sizes)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, tensor in model.state_dict().items():
            _make_it_matter(path.split("."), tensor)
            if kind.family == "gemma4" and path.endswith("q_norm.weight"):
                # Nothing else keeps its scores small.
                tensor.mul_(0.1)
            elif kind.family == "gemma4" and path.endswith("router.proj.weight"):
                # Close calls between experts would turn at the loss of 8 bits.
                tensor.mul_(200)
    return model


def _make_it_matter(path: Sequence[str], tensor: torch.Tensor) -> None:
    """Attention that looks at positions, so that a wrong base or scale shows in the logits."""
    if tensor.ndim == 1 and tensor.is_floating_point():
        tensor.add_(0.1 * torch.randn_like(tensor))
    if path[-2] in ("q_norm", "k_norm"):
        # Added, not multiplied: the norms of Gemma are stored as distances from 1.
        tensor.add_(0.5)
    elif path[-2] in ("q_proj", "k_proj", "q_b_proj", "kv_a_proj_with_mqa"):
        tensor.mul_(8)
    elif path[-2] in ("v_proj", "o_proj"):
        tensor.mul_(4)


def _bare(config: Mapping[str, Any], config_class: str) -> dict[str, Any]:
    """The config without what its class assumes."""
    default = json.loads(getattr(transformers, config_class)().to_json_string(use_diff=False))
    kept = {}
    for key, value in config.items():
        own = default.get(key, ...)
        if key in ("text_config", "vision_config") and own:
            kept[key] = {name: one for name, one in value.items() if own.get(name, ...) != one}
            kept[key]["model_type"] = own["model_type"]
        elif key in _ALWAYS or own != value:
            kept[key] = value
    return kept
