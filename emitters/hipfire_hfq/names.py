"""Names, families and order of an HFQ file: as published, one tensor for each expert.

Source: Kaden-Schutt/hipfire, crates/hipfire-quantize and crates/hipfire-arch-minimax, read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from policy_dsl.plan import Module, PlannedTensor
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.published_names import experts_path, published_name

# family -> the number by which loaders know it.
ARCH_IDS: Mapping[str, int] = {"llama": 0, "mistral": 0, "qwen3": 1, "qwen2": 7, "minimax_m2": 10}
_NO_RULES = "its tensor rules in HFQ files are not known"
# family -> None if it is taken, else why it is refused
FAMILIES: Mapping[str, str | None] = {
    **dict.fromkeys(ARCH_IDS),
    "mixtral": _NO_RULES,
    "qwen3_moe": _NO_RULES,
    "qwen3_next": _NO_RULES,
    "qwen3_5": _NO_RULES,
    "glm4_moe": _NO_RULES,
    "deepseek_v3": _NO_RULES,
    "kimi_k2": _NO_RULES,
    "gemma3": _NO_RULES,
    "gpt_oss": _NO_RULES,
}
_SCALED = re.compile(r"(.*\.block_sparse_moe)\.experts\.\d+\.(?:w1|w3)$")
_LEFT_OUT = {
    "vision": "hipfire's loaders of these families read the language model only",
    "audio": "hipfire's loaders of these families read the language model only",
    "mtp": "hipfire's loaders skip multi-token prediction",
}
SCALE = "awq_scale_gate_up"


def omission(tensor: ModelTensor, model: Model) -> str | None:
    """Why loaders have no place for a tensor, else None."""
    if tensor.role == "lm_head" and model.tied:
        return "tied: loaders use embed_tokens"
    return _LEFT_OUT.get(tensor.component or "")


def module_path(tensor: ModelTensor, model: Model) -> str:
    """The module of a tensor: its published name; that of a layer's experts has a `*`."""
    if tensor.expert is not None:
        return experts_path(tensor, model)
    return published_name(tensor, model).removesuffix(".weight")


def column_scale(module: str) -> str | None:
    """The module with the scale of an expert's columns, which gate and up of a layer share."""
    found = _SCALED.fullmatch(module)
    return f"{found[1]}.{SCALE}" if found else None


def file_order(modules: Sequence[Module]) -> list[PlannedTensor]:
    """All tensors by the bytes of their names; a layer's scale stands before its experts."""
    tensors = [tensor for module in modules for tensor in module.tensors]
    first = f".{SCALE}.weight"
    return sorted(tensors, key=lambda t: t.name.replace(first, ".experts").encode())
