"""Names as publishers write them, those of experts' modules, and those of llama.cpp."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from policy_dsl.inventory import EXPERT_NAME
from policy_dsl.roles.architecture import TABLES, packaged_table

if TYPE_CHECKING:
    from policy_dsl.roles.model import Model, ModelTensor

# Projection -> its name where experts' matrices are called by number.
SHORT_NAMES: Mapping[str, str] = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_LLAMA_CPP = TABLES / "_llama_cpp.yaml"
_EXPERT = re.compile(r"\.experts\.(?:\d+\.)?\w+(?:\.weight)?$")


def published_name(tensor: ModelTensor, model: Model) -> str:
    """A tensor's name, also of a source that transformers saved."""
    block, _ = model.architecture.published_experts
    # transformers 5 calls the blocks of all families so.
    return tensor.source.name.replace(".mlp.", f".{block}.", 1)


def stack_path(name: str, word: str) -> str:
    """The name of an expert's tensor with its end, from `.experts.` on, replaced by a word."""
    return _EXPERT.sub(f".{word}", name)


def apart_path(tensor: ModelTensor, model: Model) -> str:
    """The module of a tensor: its published name; that of a layer's experts has a `*`."""
    name = published_name(tensor, model)
    if tensor.expert is None:
        return name.removesuffix(".weight")
    (_, words), projection = model.architecture.published_experts, tensor.projection or ""
    return stack_path(name, f"experts.*.{words.get(projection, projection)}")


def expert_path(path: str, expert: int) -> str:
    """The module of one expert, of such a path."""
    return path.replace("*", str(expert), 1)


def expert_of(path: str) -> int | None:
    """The expert's number in the name of its module; None for other modules."""
    matched = EXPERT_NAME.fullmatch(path)
    return int(matched[2]) if matched else None


def llama_cpp_roles() -> tuple[str, ...]:
    """The roles that llama.cpp has names for."""
    names = packaged_table(_LLAMA_CPP)
    return (*names["outside"], *names["block"])


def llama_cpp_names(role: str, layer: int | None) -> tuple[str, ...]:
    """The names of a role's matrices in a layer, `blk.3.ffn_gate_exps.weight`, likeliest first.

    layer: the language model's block, or None outside of the blocks. One name is that of all
    experts of a layer. Nothing comes back for roles that are not a matrix of the language
    model, or whose input llama.cpp reorders.
    """
    place, before = ("outside", "") if layer is None else ("block", f"blk.{layer}.")
    names = packaged_table(_LLAMA_CPP)[place].get(role, ())
    return tuple(f"{before}{name}.weight" for name in names)
