"""Names of a GPTQ checkpoint: as published, one module for each expert.

Source: auto-round 0.16.1 (model-free flow) and vLLM 0.33.0, MiniMax-M2's weight loader.
"""

from __future__ import annotations

from collections.abc import Mapping

from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.published_names import experts_path, published_name

_LATENT = "vLLM wants its latent attention in another form than it is packed"
_STATE_SPACE = "its convolutions and gates have no packed form that readers know"
# family -> None if it is taken, else why it is refused
FAMILIES: Mapping[str, str | None] = {
    "llama": None,
    "mistral": None,
    "mixtral": None,
    "qwen2": None,
    "qwen3": None,
    "qwen3_moe": None,
    "minimax_m2": None,
    "glm4_moe": None,
    "gemma3": "its linears lie below names that readers of GPTQ do not agree on",
    "deepseek_v3": _LATENT,
    "kimi_k2": _LATENT,
    "qwen3_next": _STATE_SPACE,
    "qwen3_5": _STATE_SPACE,
    "gpt_oss": "its experts are stored as interleaved rows or already quantized to MXFP4",
}
_LEFT_OUT = {
    "vision": "readers of packed checkpoints of these families want the language model only",
    "audio": "readers of packed checkpoints of these families want the language model only",
}


def omission(tensor: ModelTensor, model: Model) -> str | None:
    """Why a checkpoint does not carry a tensor, else None."""
    if tensor.role == "lm_head" and model.tied:
        return "tied: readers use embed_tokens"
    return _LEFT_OUT.get(tensor.component or "")


def module_path(tensor: ModelTensor, model: Model) -> str:
    """The module of a tensor: its published name; that of a layer's experts has a `*`."""
    if tensor.expert is not None:
        return experts_path(tensor, model)
    return published_name(tensor, model).removesuffix(".weight")


def plain_dtype(tensor: ModelTensor, model: Model) -> str:
    """The source's own dtype; FP8 becomes bfloat16."""
    # The codes of FP8 may be stored under the names of integers.
    return tensor.source.dtype if tensor.scale is None else "BF16"
