"""Whether a model's tensors are whole: each once, no layer or expert left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.model import Model, ModelTensor
from policy_dsl.vocabulary import OUTSIDE_LANGUAGE_MODEL

Place = tuple[int | None, str]


def review(model: Model) -> Iterator[Diagnostic]:
    """What is missing or there twice."""
    places: dict[Place, list[ModelTensor]] = defaultdict(list)
    layers = set()
    for tensor in model.tensors:
        layers.add(tensor.layer)
        if tensor.is_matrix and tensor.component not in OUTSIDE_LANGUAGE_MODEL:
            places[tensor.layer, tensor.role].append(tensor)
    layers.discard(None)
    if len(layers) < model.n_layers:
        yield diagnostic(
            "missing-layers",
            model=model.id,
            missing=_some(i for i in range(model.n_layers) if i not in layers),
            n_layers=model.n_layers,
        )
    for role in ("embed",) if model.tied else ("embed", "lm_head"):
        if (None, role) not in places:
            yield diagnostic("missing-tensor", model=model.id, role=role)
    for (layer, role), tensors in places.items():
        yield from _review_place(model, layer, role, tensors)


def _review_place(
    model: Model, layer: int | None, role: str, tensors: list[ModelTensor]
) -> Iterator[Diagnostic]:
    numbers = {tensor.expert for tensor in tensors}
    if len(numbers) < len(tensors):
        yield _ambiguous(tensors)
    if tensors[0].component != "experts":
        return
    expected = range(model.n_experts)
    if len(numbers) < model.n_experts:
        missing = _some(i for i in expected if i not in numbers)
        yield diagnostic(
            "missing-experts", role=role, layer=layer, missing=missing, count=model.n_experts
        )
    beyond = _some(sorted(i for i in numbers if i is not None and i not in expected))
    if beyond:
        yield diagnostic(
            "expert-beyond-config", role=role, layer=layer, beyond=beyond, count=model.n_experts
        )


def _ambiguous(tensors: list[ModelTensor]) -> Diagnostic:
    seen: dict[int | None, ModelTensor] = {}
    for tensor in tensors:
        first = seen.setdefault(tensor.expert, tensor)
        if first is not tensor:
            break
    return diagnostic(
        "ambiguous-tensor", first=first.source.name, second=tensor.source.name, role=tensor.role
    )


def _some(numbers: Iterable[int], limit: int = 5) -> str:
    shown = list(islice(numbers, limit + 1))
    text = ", ".join(str(number) for number in shown[:limit])
    return f"{text}, …" if len(shown) > limit else text
