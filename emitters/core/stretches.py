"""Plain tensors of long rows, seen as a column of single values that can be split anywhere.

A vector is one row, however long it is. What is not coded needs no row whole: such tensors are
worked on as [values, 1], and a block of their rows is a stretch of values.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from emitters.core.record import BundleModule
from emitters.tensor_io.read import columns
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Module, PlannedTensor
from policy_dsl.roles.classify import ModelTensor
from policy_dsl.treatments import Coded
from policy_dsl.views import Values

# Rows up to this many values are worked on whole, whatever becomes of them.
LONGEST_ROW = 64 * 2**10


def in_stretches(module: Module) -> Module:
    """The module of a plan as its rows are worked on: itself, unless its rows are split.

    The plan alone decides, so that the journal of a build with other blocks can be resumed.
    """
    width = columns(module.shape)
    if isinstance(module.treatment, Coded) or not _may_split(module, width):
        return module
    # A scale belongs to a block of a row.
    if any(view.scale is not None for view in module.sources):
        return module
    return replace(
        module,
        shape=_as_values(module.shape),
        sources=tuple(view.as_values() for view in module.sources),
        tensors=tuple(_planned_in_stretches(tensor) for tensor in module.tensors),
    )


def both_in_stretches(
    module: BundleModule, stack: tuple[ModelTensor, ...]
) -> tuple[BundleModule, tuple[ModelTensor, ...]]:
    """The module of a bundle and what it stands for, as their rows are compared."""
    if isinstance(module.treatment, Coded) or not _may_split(module, columns(module.shape)):
        return module, stack
    split = tensors_in_stretches(*stack)
    if stack and split == stack:
        return module, stack
    view = replace(
        module,
        shape=_as_values(module.shape),
        tensors={part: _info_in_stretches(held) for part, held in module.tensors.items()},
        added=module.added * prod(module.shape[1:]),
    )
    return view, split


def tensors_in_stretches(*tensors: ModelTensor) -> tuple[ModelTensor, ...]:
    """Tensors of a source as their rows are read side by side: split, if all of them can be."""
    if any(tensor.scale is not None or columns(tensor.shape) <= LONGEST_ROW for tensor in tensors):
        return tensors
    return tuple(
        replace(tensor, shape=_as_values(tensor.shape), operations=(*tensor.operations, Values()))
        for tensor in tensors
    )


def _may_split(module: Module | BundleModule, width: int) -> bool:
    # In a bias the experts that were added make the row longer than the source's.
    is_padded_row = module.added > 0 and len(module.shape) == 1
    return width > LONGEST_ROW and not is_padded_row


def _info_in_stretches(tensor: TensorInfo) -> TensorInfo:
    return tensor._replace(shape=_as_values(tensor.shape))


def _planned_in_stretches(tensor: PlannedTensor) -> PlannedTensor:
    return replace(tensor, shape=_as_values(tensor.shape))


def _as_values(shape: tuple[int, ...]) -> tuple[int, ...]:
    return prod(shape), 1
