"""A head that a tied model has of its own, against the embedding that readers use instead."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

from emitters.core.bundle_reading import Bundle
from emitters.core.decoding import source_reader
from emitters.core.matching import tensors_in_stretches
from emitters.tensor_io.files import columns
from emitters.tensor_io.view_rows import Cast, ViewReader
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Plan
from policy_dsl.planning.plan_warnings import untied
from policy_dsl.roles.classify import Model, ModelTensor

_BLOCK_VALUES = 2**20


def ensure_equal_heads(plan: Plan, source: Inventory) -> None:
    """Raises: PolicyError if a head that the plan leaves out is not equal to its embedding."""
    names = {omission.tensor.name for omission in plan.omitted if omission.equals}
    found = list(differing_heads(source, plan.model, names)) if names else []
    if found:
        raise PolicyError(found)


def differing_heads(source: Inventory, model: Model, names: set[str]) -> Iterator[Diagnostic]:
    """A finding for each of these heads that is not the embedding, value for value.

    Both are read from the source block by block: FP8 codes times scales, all in float32.
    """
    embedding = model.embedding
    if embedding is None:
        return
    reader = source_reader(source, model)
    for head in model.tensors:
        place = _difference(reader, head, embedding) if head.source.name in names else None
        if place is not None:
            cure = 'write "lm_head: keep" to store it, or "lm_head: drop"'
            name, like = head.source.name, embedding.source.name
            yield diagnostic(
                "head-differs", suggestion=cure, name=name, embedding=like, place=place
            )


def as_in_bundle(model: Model, bundle: Bundle) -> Model:
    """The model of a bundle's source; not tied any more if the bundle has the head stored."""
    path, names = bundle.format.spec.module_path, {module.name for module in bundle.modules}
    kept = model.tied and any(path(head, model) in names for head in _heads(model))
    return untied(model) if kept else model


def heads_left_out(model: Model, bundle: Bundle) -> set[str]:
    """The heads of a tied model that the bundle leaves out, without those that a rule drops."""
    omitted = bundle.record.omitted if bundle.record else {}
    names = {head.source.name for head in _heads(model)} if model.tied else set()
    return {name for name in names if omitted.get(name, "equal")}


def _heads(model: Model) -> list[ModelTensor]:
    return [tensor for tensor in model.tensors if tensor.role == "lm_head"]


def _difference(reader: ViewReader, head: ModelTensor, embedding: ModelTensor) -> str | None:
    """Where the two differ, None if they do not."""
    if head.shape != embedding.shape:
        return f"shapes {list(head.shape)} and {list(embedding.shape)}"
    both = tensors_in_stretches(head, embedding)
    rows, width = prod(both[0].shape[:-1]), columns(both[0].shape)
    step = max(1, _BLOCK_VALUES // width)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        one, other = (reader.rows(each.view, first, count, Cast("F32")) for each in both)
        unequal = (one != other) & ~(np.isnan(one) & np.isnan(other))
        if unequal.any():
            at = int(unequal.argmax())
            place = list(divmod(first * width + at, columns(head.shape)))
            return f"{one.flat[at]:.6g} and {other.flat[at]:.6g} at {place}"
    return None
