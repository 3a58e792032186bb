"""A checkpoint as a model of roles: the values that `roles.classify` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from policy_dsl.inventory import TensorInfo
from policy_dsl.roles.architecture import Architecture
from policy_dsl.roles.config_facts import ConfigFacts
from policy_dsl.roles.name_index import NameIndex
from policy_dsl.views import Operation, View
from policy_dsl.vocabulary import namesake

# Roles with an entry for every expert along their first axis.
BY_EXPERT = frozenset({"router", "router_bias"})


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One logical tensor of a model: a whole source tensor, or one matrix of a fused one.

    role: `component.projection` or a single role. component, projection: its halves (a single
    role has projection None, and component None outside of vision, audio and mtp). layer: the
    language model's block, else None. shape: [out, in] of a matrix, else that of the source.
    scale: the FP8 block scales, consumed with it. mxfp4: the source is [experts, out, blocks,
    16] packed, `scale` a byte for each block; operations are those of [experts, out, in].
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

    facts: what its config means, by the table of its family, whose roles are completed by
    those that only this model shows (vision). tied: lm_head is embed. ignored: source tensors
    that are not weights (rotary tables, FP8 scales of nothing …) with the reason.
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
