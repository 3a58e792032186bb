"""Tensor names of a JANGTQ bundle: as published, experts stacked under `switch_mlp` or apart.

Source: jang 2.5.50, `load_jangtq` and `rebundle_jangtq_stacked`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.published_names import SHORT_NAMES, published_name, stack_path

MXTQ = "mxtq"
# Of the rotation; the same in every bundle that was ever shipped.
SEED = 42
# Of fewer values, jang's codebooks differ from machine to machine.
SHORTEST_ROW = 4

_NO_EXPERTS = "it has no experts, and MXTQ codes are for experts only"
_NOT_KNOWN = "JANG has no profile for it, or stores it in another way"

# family -> None if names and stacks are all that differ, else why it is refused
FAMILIES: Mapping[str, str | None] = {
    "minimax_m2": None,
    "qwen3_moe": None,
    "glm4_moe": None,
    "deepseek_v3": None,
    "kimi_k2": None,
    "mixtral": _NOT_KNOWN,
    "qwen3_next": _NOT_KNOWN,
    "qwen3_5": _NOT_KNOWN,
    "gpt_oss": _NOT_KNOWN,
    "llama": _NO_EXPERTS,
    "mistral": _NO_EXPERTS,
    "qwen2": _NO_EXPERTS,
    "qwen3": _NO_EXPERTS,
    "gemma3": _NO_EXPERTS,
}
# In the order of JANG's own writer.
PROJECTIONS = tuple(SHORT_NAMES)

_SHORT_BLOCK = ".block_sparse_moe."
_STACK = ".switch_mlp."
_LAST_WORDS = {word: name for name, short in SHORT_NAMES.items() for word in (name, short)}
_IN_EXPERTS = re.compile(r"\.(?:switch_mlp|experts\.\d+)\.\w+$")
_LEFT_OUT = {
    "vision": "jang's loader of these families builds the language model only",
    "audio": "jang's loader of these families builds the language model only",
    "mtp": "jang's loader has no multi-token prediction for these families",
}


def omission(tensor: ModelTensor, model: Model) -> str | None:
    """Why jang's loader has no place for a tensor, else None."""
    if tensor.role == "lm_head" and model.tied:
        return "tied: readers use embed_tokens"
    return _LEFT_OUT.get(tensor.component or "")


def module_path(tensor: ModelTensor, model: Model) -> str:
    """The module of a tensor on disk: experts stacked under `switch_mlp`, the rest as it was.

    A tensor that is no module's `.weight` keeps its full name.
    """
    name = published_name(tensor, model)
    if tensor.expert is not None:
        return stack_path(name, f"switch_mlp.{tensor.projection}")
    return name.removesuffix(".weight")


def expert_path(path: str, expert: int) -> str:
    """The module of one expert of a stack, where experts lie apart."""
    block, _, projection = path.rpartition(_STACK)
    if f"{block}.".endswith(_SHORT_BLOCK):
        projection = SHORT_NAMES[projection]
    return f"{block}.experts.{expert}.{projection}"


def projection_of(path: str) -> str | None:
    """The projection of an expert's or a stack's module, from its name; None for others."""
    projection = _LAST_WORDS.get(path[path.rfind(".") + 1 :])
    # The word first: of the many modules few but experts get to the pattern.
    return projection if projection and _IN_EXPERTS.search(path) else None


def plain_dtype(tensor: ModelTensor, model: Model) -> str:
    """F16, for every tensor that is not coded, and for what affine groups are made of."""
    return "F16"
