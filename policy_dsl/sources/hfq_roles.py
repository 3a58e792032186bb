"""The tensors of an HFQ file as roles, for people to see; nothing is planned from them."""

from __future__ import annotations

import re
from dataclasses import replace

from policy_dsl.inventory import Inventory
from policy_dsl.roles.classify import classify
from policy_dsl.roles.model import Model

# What hipfire's quantizer adds to a model, and what it is.
_ADDED = (
    (re.compile(r"\.awq_scale\w*\.weight$"), "AWQ scales that activations are divided by"),
    (re.compile(r"\.lr_[uv]\.weight$"), "low-rank correction of a matrix"),
)


def classify_hfq(inventory: Inventory) -> Model:
    """The model of an HFQ file: roles by names and logical shapes, whatever the quant codes.

    Raises: PolicyError as `classify` does, but never for a dtype.
    """
    tensors = inventory.tensors
    added = {name: reason for name in tensors if (reason := _added(name)) is not None}
    # Names and shapes are the original checkpoint's; only its dtypes are gone.
    values = {
        name: tensor._replace(dtype="F16") for name, tensor in tensors.items() if name not in added
    }
    model = classify(replace(inventory, tensors=values))
    ignored = [(tensors[tensor.name], reason) for tensor, reason in model.ignored]
    return replace(
        model,
        tensors=tuple(replace(one, source=tensors[one.source.name]) for one in model.tensors),
        ignored=(*ignored, *((tensors[name], reason) for name, reason in added.items())),
    )


def _added(name: str) -> str | None:
    return next((reason for pattern, reason in _ADDED if pattern.search(name)), None)
