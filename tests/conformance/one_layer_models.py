"""Recorded headers of models of one layer, with the tensors that make a family what it is."""

from __future__ import annotations

import json

from policy_dsl.roles.architecture import architecture

MLA = {"self_attn.kv_b_proj.weight": ("BF16", [512, 64])}
GATED_DELTA = {
    "linear_attn.A_log": ("F32", [4]),
    "linear_attn.conv1d.weight": ("BF16", [256, 1, 4]),
}
MXFP4 = {
    "mlp.experts.down_proj_blocks": ("U8", [2, 128, 4, 16]),
    "mlp.experts.down_proj_scales": ("U8", [2, 128, 4]),
}
# Family -> what stands before `.layers`, tensors of the layer, more of its config.
MODELS = {
    "deepseek_v3": ("model", MLA, {"n_routed_experts": 2}),
    "kimi_k2": ("model", MLA, {"n_routed_experts": 2}),
    "qwen3_next": ("model", GATED_DELTA, {"num_experts": 2}),
    "qwen3_5": ("model.language_model", GATED_DELTA, {}),
    "gpt_oss": (
        "model",
        MXFP4,
        {"num_local_experts": 2, "quantization_config": {"quant_method": "mxfp4"}},
    ),
    "gemma3": ("model", {}, {}),
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3"), ("model", {}, {})),
}


def recorded(family: str) -> str:
    """Recorded headers of a model of one layer."""
    table = architecture(family)
    prefix, block, counts = MODELS.get(family, (table.models[0], {}, {"num_local_experts": 2}))
    tensors = {
        "lm_head.weight": ("BF16", [256, 128]),
        f"{prefix}.embed_tokens.weight": ("BF16", [256, 128]),
        f"{prefix}.layers.0.input_layernorm.weight": ("BF16", [128]),
    }
    tensors |= {f"{prefix}.layers.0.{name}": entry for name, entry in block.items()}
    sizes = {"U8": 1, "BF16": 2, "F32": 4}
    nbytes = 0
    for dtype, shape in tensors.values():
        size = sizes[dtype]
        for length in shape:
            size *= length
        nbytes += size
    config = {"model_type": table.model_types[0], "num_hidden_layers": 1}
    config |= {"tie_word_embeddings": False, "architectures": [*table.architectures]}
    if table.text_model_types:
        config["text_config"] = {"model_type": table.text_model_types[0]}
    config |= {key: values[0] for key, values in table.only_where.items()}
    config |= {"hidden_size": 128, "vocab_size": 256}
    groups = [
        {"dtype": dtype, "shape": shape, "names": [name]}
        for name, (dtype, shape) in tensors.items()
    ]
    document = {
        "policyc_headers": 1,
        "id": f"a small {family}",
        "config": counts | config,
        "side_files": None,
        "totals": {"tensors": len(tensors), "nbytes": nbytes},
        "files": [{"file": None, "nbytes": None, "tensors": groups}],
    }
    return json.dumps(document)
