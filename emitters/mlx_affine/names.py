"""Tensor names of an MLX bundle: what mlx-lm calls a source tensor after its own renaming.

Source: mlx-lm 0.32.2, `sanitize` of each model module; checked against its converted bundles.
"""

from __future__ import annotations

from collections.abc import Mapping

from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.published_names import published_name, stack_path
from policy_dsl.treatments import Plain, Stored

_MLA = "its latent attention is stored split by heads and transposed"
_GATED_DELTA = "its norms are stored shifted by one and its convolutions transposed"
_INTERLEAVED = "its experts are stored as interleaved rows or already quantized to MXFP4"

# family -> None if names and stacks are all that differ, else why it is refused
FAMILIES: Mapping[str, str | None] = {
    "llama": None,
    "mistral": None,
    "mixtral": None,
    "qwen2": None,
    "qwen3": None,
    "qwen3_moe": None,
    "minimax_m2": None,
    "glm4_moe": None,
    "gemma3": None,
    "deepseek_v3": _MLA,
    "kimi_k2": _MLA,
    "qwen3_next": _GATED_DELTA,
    "qwen3_5": _GATED_DELTA,
    "gpt_oss": _INTERLEAVED,
}
# Routers that mlx-lm holds as a bare parameter: no quantized form exists.
BARE_ROUTERS = frozenset({"glm4_moe"})

_LEFT_OUT = {
    "vision": "mlx-lm builds the language model only",
    "audio": "mlx-lm builds the language model only",
    "mtp": "mlx-lm has no multi-token prediction",
}


def omission(tensor: ModelTensor, model: Model) -> str | None:
    """Why mlx-lm has no place for a tensor, else None."""
    if tensor.role == "lm_head" and model.tied:
        return "tied: mlx-lm uses embed_tokens"
    return _LEFT_OUT.get(tensor.component or "")


def module_path(tensor: ModelTensor, model: Model) -> str:
    """The module of a tensor on disk: experts stacked under `switch_mlp`, the rest as it was.

    A tensor that is no module's `.weight` keeps its full name.
    """
    name, family = published_name(tensor, model), model.architecture.family
    if tensor.expert is not None:
        return stack_path(name, f"switch_mlp.{tensor.projection}")
    if family == "gemma3":
        name = name.replace("model.language_model.", "language_model.model.", 1)
    return name.removesuffix(".weight")


def unsupported(tensor: ModelTensor, model: Model, treatment: Stored) -> str | None:
    """Why mlx-lm can hold a matrix only plain, else None."""
    if isinstance(treatment, Plain):
        return None
    if tensor.namesake == "router" and model.architecture.family in BARE_ROUTERS:
        return f"mlx-lm holds the router of {model.architecture.family} as a bare parameter"
    return None


def plain_dtype(tensor: ModelTensor, model: Model) -> str:
    """The dtype of a tensor's values in the bundle, as `mlx_lm.convert` chooses it.

    The config's `torch_dtype` (or its text model's `dtype`) where it is given, else the
    source's own; FP8 becomes bfloat16. A router's bias is never cast.
    """
    text = model.config.get("text_config") or {}
    wanted = _DTYPES.get(str(model.config.get("torch_dtype") or text.get("dtype")))
    source = tensor.source.dtype
    if tensor.namesake == "router_bias" or (wanted is None and source in _DTYPES.values()):
        return source
    return wanted or "BF16"


_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
