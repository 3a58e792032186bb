"""Names as publishers write them, and those of experts' modules that are made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from policy_dsl.roles.classify import Model, ModelTensor

# Projection -> its name where experts' matrices are called by number.
SHORT_NAMES: Mapping[str, str] = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# Families that call them so, below `block_sparse_moe`; transformers 5 keeps that as `mlp`.
_SHORT = frozenset({"mixtral", "minimax_m2"})
_EXPERT = re.compile(r"\.experts\.(?:\d+\.)?\w+(?:\.weight)?$")
_NUMBER = re.compile(r"\.experts\.([0-9]{1,7})\.\w+$")


def published_name(tensor: ModelTensor, model: Model) -> str:
    """A tensor's name, also of a source that transformers saved."""
    name = tensor.source.name
    if model.architecture.family in _SHORT:
        return name.replace(".mlp.", ".block_sparse_moe.", 1)
    return name


def stack_path(name: str, word: str) -> str:
    """The name of an expert's tensor with its end, from `.experts.` on, replaced by a word."""
    return _EXPERT.sub(f".{word}", name)


def experts_path(tensor: ModelTensor, model: Model) -> str:
    """The modules of all experts of a tensor's projection, the expert's number being a `*`."""
    word = tensor.projection or ""
    short = model.architecture.family in _SHORT
    return stack_path(
        published_name(tensor, model), f"experts.*.{SHORT_NAMES[word] if short else word}"
    )


def expert_path(path: str, expert: int) -> str:
    """The module of one expert, of such a path."""
    return path.replace("*", str(expert), 1)


def expert_of(path: str) -> int | None:
    """The expert's number in the name of its module; None for other modules."""
    found = _NUMBER.search(path)
    return int(found[1]) if found else None
