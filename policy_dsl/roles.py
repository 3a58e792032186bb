"""Tensor name -> role, by the table of its architecture; a checkpoint as a model of roles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policy_dsl.inventory import TensorInfo


@dataclass(frozen=True, slots=True)
class ModelTensor:
    """One logical tensor of a model: a whole source tensor, or one matrix of a fused one.

    role: `component.projection` or a single role. component, projection: its halves (a single
    role has projection None, and component None unless it stands inside `vision`, `audio`, `mtp`).
    layer: the language model's block, else None. expert: its number within the layer, else None.
    shape: [out, in] of a matrix; the source's shape of anything else. first_row: the first row of
    the source (viewed as [rows, last axis]) that belongs to it. transposed: the source stores
    [in, out]. scale: the FP8 block scales, consumed with it.
    """

    source: TensorInfo
    role: str
    component: str | None
    projection: str | None
    layer: int | None
    expert: int | None
    shape: tuple[int, ...]
    first_row: int = 0
    transposed: bool = False
    is_matrix: bool = True
    scale: TensorInfo | None = None


@dataclass(frozen=True)
class Architecture:
    """A model family's table: its names, aliases and how its config tells the sizes."""

    family: str
    model_types: tuple[str, ...]
    roles: tuple[str, ...]
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class Model:
    """A checkpoint read through its architecture: every tensor with its role.

    tied: lm_head is embed. ignored: source tensors that are no weights (rotary tables, FP8
    scales of nothing …) with the reason.
    """

    id: str
    architecture: Architecture
    config: Mapping[str, Any]
    n_layers: int
    n_experts: int
    tied: bool
    tensors: tuple[ModelTensor, ...]
    ignored: tuple[tuple[TensorInfo, str], ...] = ()
