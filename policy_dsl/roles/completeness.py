"""Whether a model's tensors are whole: each once, no layer or expert left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.roles.name_rules import numbered_key
from policy_dsl.roles.presence import Presence
from policy_dsl.vocabulary import OUTSIDE_LANGUAGE_MODEL

_Place = tuple[int | None, str]


def review(model: Model, presence: Presence) -> Iterator[Diagnostic]:
    """What is missing, there twice, or there although the config denies it."""
    yield from _missing_layers(model)
    yield from presence.absences(model.id, _begun(model, presence))
    places = _places(model)
    if not model.tied and (None, "lm_head") not in places:
        yield diagnostic("missing-tensor", model=model.id, what="lm_head", why="")
    for (layer, _), tensors in places.items():
        yield from _ambiguous(tensors)
        if tensors[0].component == "experts":
            yield from _wrong_experts(model, tensors, layer)
    for (block, _), tensors in _mtp_experts(model).items():
        yield from _wrong_experts(model, tensors, block)


def wrong_experts(
    role: str, layer: int | None, numbers: Iterable[int], count: int
) -> Iterator[Diagnostic]:
    """Which of `count` experts of a projection in a layer are missing, or beyond them."""
    held, wanted = set(numbers), range(count)
    missing = shown_first(i for i in wanted if i not in held)
    if missing:
        yield diagnostic("missing-experts", role=role, layer=layer, missing=missing, count=count)
    beyond = shown_first(sorted(held.difference(wanted)))
    if beyond:
        yield diagnostic("expert-beyond-config", role=role, layer=layer, beyond=beyond, count=count)


def shown_first(things: Iterable[object], limit: int = 5) -> str:
    """The first few as text; `…` if there are more, and nothing if there are none."""
    # A hostile config may leave millions missing; only what is shown is looked for.
    shown = list(map(str, islice(things, limit + 1)))
    text = ", ".join(shown[:limit])
    return f"{text}, …" if len(shown) > limit else text


def _begun(model: Model, presence: Presence) -> list[int]:
    """The layers that have any tensor, and MTP blocks, which may be left out whole."""
    there = {tensor.layer for tensor in model.tensors if tensor.layer is not None}
    return sorted(there | {block for block in presence.blocks if block >= model.n_layers})


def _mtp_experts(model: Model) -> dict[_Place, list[ModelTensor]]:
    """The experts of MTP blocks by block and role."""
    places: dict[_Place, list[ModelTensor]] = defaultdict(list)
    for tensor in model.tensors:
        if tensor.component == "mtp" and tensor.expert is not None:
            block = numbered_key(tensor.source.name)[1][0]
            places[block, tensor.role].append(tensor)
    return places


def _places(model: Model) -> dict[_Place, list[ModelTensor]]:
    """The matrices of the language model by layer and role."""
    places: dict[_Place, list[ModelTensor]] = defaultdict(list)
    for tensor in model.tensors:
        # Norms and biases share a role, so only matrices can be there twice.
        if tensor.is_matrix and tensor.component not in OUTSIDE_LANGUAGE_MODEL:
            places[tensor.layer, tensor.role].append(tensor)
    return places


def _missing_layers(model: Model) -> Iterator[Diagnostic]:
    layers = {tensor.layer for tensor in model.tensors}
    missing = shown_first(i for i in range(model.n_layers) if i not in layers)
    if missing:
        yield diagnostic("missing-layers", model=model.id, missing=missing, n_layers=model.n_layers)


def _ambiguous(tensors: list[ModelTensor]) -> Iterator[Diagnostic]:
    if len({tensor.expert for tensor in tensors}) == len(tensors):
        return
    first: dict[int | None, ModelTensor] = {}
    second = next(each for each in tensors if first.setdefault(each.expert, each) is not each)
    yield diagnostic(
        "ambiguous-tensor",
        first=first[second.expert].source.name,
        second=second.source.name,
        role=second.role,
    )


def _wrong_experts(
    model: Model, tensors: list[ModelTensor], layer: int | None
) -> Iterator[Diagnostic]:
    """tensors: all experts of one projection in one layer."""
    numbers = (tensor.expert for tensor in tensors if tensor.expert is not None)
    yield from wrong_experts(tensors[0].role, layer, numbers, model.n_experts)
