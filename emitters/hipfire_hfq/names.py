"""Names, families and order of an HFQ file: as published, one tensor for each expert.

Source: Kaden-Schutt/hipfire, crates/hipfire-quantize and crates/hipfire-arch-minimax, read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from policy_dsl.plan import Module, PlannedTensor
from policy_dsl.roles.classify import Model, ModelTensor

# family -> the number by which loaders know it.
ARCH_IDS: Mapping[str, int] = {
    "llama": 0,
    "mistral": 0,
    "qwen3": 1,
    "qwen2": 7,
    "minimax_m2": 10,
}
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
_SHORT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_EXPERT = re.compile(r"\.experts\.(?:\d+\.)?\w+(?:\.weight)?$")
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
    name = tensor.source.name
    if model.architecture.family == "minimax_m2":
        # transformers 5 saves the block as `mlp`; loaders know the published name.
        name = name.replace(".mlp.", ".block_sparse_moe.", 1)
    if tensor.expert is not None:
        return _EXPERT.sub(f".experts.*.{_SHORT[tensor.projection or '']}", name)
    return name.removesuffix(".weight")


def expert_path(path: str, expert: int) -> str:
    """The module of one expert."""
    return path.replace("*", str(expert), 1)


def column_scale(module: str) -> str | None:
    """The module with the scale of an expert's columns, which gate and up of a layer share."""
    found = _SCALED.fullmatch(module)
    return f"{found[1]}.{SCALE}" if found else None


def file_order(modules: Sequence[Module]) -> list[PlannedTensor]:
    """All tensors by the bytes of their names; a layer's scale stands before its experts."""
    tensors = [tensor for module in modules for tensor in module.tensors]
    first = f".{SCALE}.weight"
    return sorted(tensors, key=lambda t: t.name.replace(first, ".experts").encode())
