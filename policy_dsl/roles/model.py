"""A checkpoint as a model of roles, and its names as publishers and llama.cpp write them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from policy_dsl import packaged_table
from policy_dsl.inventory import EXPERT_NAME, TensorInfo
from policy_dsl.policy import namesake
from policy_dsl.roles.architecture import TABLES, Architecture
from policy_dsl.roles.config_facts import ConfigFacts
from policy_dsl.roles.name_index import NameIndex
from policy_dsl.views import Operation, View

# Roles with an entry for every expert along their first axis.
BY_EXPERT = frozenset({"router", "router_bias"})
# Projection -> its name where experts' matrices are called by number.
SHORT_NAMES: Mapping[str, str] = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_LLAMA_CPP = TABLES / "_llama_cpp.yaml"
_EXPERT = re.compile(r"\.experts\.(?:\d+\.)?\w+(?:\.weight)?$")


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One logical tensor of a model: a whole source tensor, or one matrix of a fused one.

    role: `component.projection` or a single role, with projection None. layer: the language
    model's block, else None. shape: [out, in] of a matrix, else that of the source. scale: the
    FP8 block scales. mxfp4: the source is [experts, out, blocks, 16] packed, `scale` a byte for
    each block; operations are those of [experts, out, in].
    """

    # The first fields are what every tensor has; a fused source needs the others too.
    source: TensorInfo
    role: str
    component: str | None
    projection: str | None
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    is_matrix: bool = True
    scale: TensorInfo | None = None
    operations: tuple[Operation, ...] = ()
    mxfp4: bool = False

    @property
    def view(self) -> View:
        """The stored tensor and what makes this one of it."""
        return View(self.source, self.scale, self.operations)

    @property
    def namesake(self) -> str:
        """Its role; of an MTP block's router, norm or head the role of the model's own."""
        return namesake(self.role) if self.component == "mtp" else self.role

    @property
    def is_rows_of_source(self) -> bool:
        """Whether its rows are rows of the source, one after the other, as they are stored."""
        return not self.mxfp4 and (not self.operations or self.view.is_rows)


@dataclass(frozen=True)
class Model:
    """A checkpoint read through its architecture: every tensor with its role.

    facts: by the table of its family, completed by roles that only this model shows (vision).
    tied: lm_head is embed. ignored: source tensors that are not weights, with the reason.
    """

    id: str
    facts: ConfigFacts
    tied: bool
    tensors: tuple[ModelTensor, ...]
    ignored: tuple[tuple[TensorInfo, str], ...] = ()

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json of the source, with what a policy changed of it."""
        return self.facts.config

    @property
    def architecture(self) -> Architecture:
        """The table of its family."""
        return self.facts.table

    @property
    def n_layers(self) -> int:
        """Blocks of the language model."""
        return self.facts.n_layers

    @property
    def n_experts(self) -> int:
        """Routed experts of a block, 0 if it is dense."""
        return self.facts.n_experts

    @property
    def embedding(self) -> ModelTensor | None:
        """The matrix with a row for each token."""
        return next((tensor for tensor in self.tensors if tensor.role == "embed"), None)

    @cached_property
    def names(self) -> NameIndex:
        """The names of its tensors in the source."""
        return NameIndex(tensor.source.name for tensor in self.tensors)


def published_name(tensor: ModelTensor, model: Model) -> str:
    """A tensor's name, also of a source that transformers saved."""
    block, _ = model.architecture.published_experts
    # transformers 5 calls the blocks of all families so.
    return tensor.source.name.replace(".mlp.", f".{block}.", 1)


def stacked_path(tensor: ModelTensor, model: Model, block: str = "switch_mlp") -> str:
    """The module of a tensor: its published name; that of a layer's experts is in `block`."""
    name = published_name(tensor, model)
    if tensor.expert is None:
        return name.removesuffix(".weight")
    return _EXPERT.sub(f".{block}.{tensor.projection}", name)


def apart_path(tensor: ModelTensor, model: Model) -> str:
    """The module of a tensor: its published name; that of a layer's experts has a `*`."""
    name = published_name(tensor, model)
    if tensor.expert is None:
        return name.removesuffix(".weight")
    (_, words), projection = model.architecture.published_experts, tensor.projection or ""
    return _EXPERT.sub(f".experts.*.{words.get(projection, projection)}", name)


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

    One name is that of all experts of a layer. Nothing comes back for roles that are not a matrix
    of the language model, or whose input llama.cpp reorders.
    """
    place, before = ("outside", "") if layer is None else ("block", f"blk.{layer}.")
    names = packaged_table(_LLAMA_CPP)[place].get(role, ())
    return tuple(f"{before}{name}.weight" for name in names)


def numbered_key(name: str) -> tuple[str, tuple[int, ...]]:
    """The name with `#` for each whole number between dots, and the numbers."""
    # The names of a hundred thousand experts have few halves.
    head, experts, tail = name.partition(".experts.")
    (key, numbers), (rest, more) = _numbered(head), _numbered(tail)
    return key + experts + rest, numbers + more


@lru_cache(8192)
def _numbered(name: str) -> tuple[str, tuple[int, ...]]:
    parts = name.split(".")
    numbers = []
    for i, part in enumerate(parts):
        # 01 is another name than 1, and a number of many digits is not a layer.
        if part.isdecimal() and len(part) < 8 and (part[0] != "0" or part == "0"):
            numbers.append(int(part))
            parts[i] = "#"
    return ".".join(parts), tuple(numbers)
