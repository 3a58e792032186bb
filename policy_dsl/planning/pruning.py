"""Pruning experts: which of every layer stay, and the model without the others.

Policy, Model, Saliency ── pruning_of ──> Pruning ── pruned ──> Model, Omissions
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from policy_dsl.diagnostics import Diagnostic, PolicyError, Span, diagnostic, fail
from policy_dsl.formats import Format
from policy_dsl.plan import Omission, Pruning
from policy_dsl.planning.decisions import Decision
from policy_dsl.policy import Policy, Prune
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.config_facts import rewritten
from policy_dsl.roles.model import BY_EXPERT
from policy_dsl.sources.saliency import KEEP, ModelShape, Saliency
from policy_dsl.views import Picked

_ROUTED = "num_experts_per_tok"
_GROUPS = "n_group"


def highest(saliencies: Sequence[float], count: int) -> tuple[int, ...]:
    """The numbers of the `count` largest saliencies, ascending; of equal ones the first.

    Source: CerebrasResearch/reap 1970473, pruning of one layer; the order of equal ones is our
    own.
    """
    order = sorted(range(len(saliencies)), key=lambda number: (-saliencies[number], number))
    return tuple(sorted(order[:count]))


def expert_layers(model: Model) -> tuple[int, ...]:
    """The language model's layers that have routed experts, ascending."""
    layers = {one.layer for one in model.tensors if one.expert is not None}
    return tuple(sorted(layer for layer in layers if layer is not None))


def pruning_of(policy: Policy, model: Model, saliency: Saliency | None) -> Pruning | None:
    """The experts that a policy keeps of a model; None if it prunes none.

    saliency: what ranks experts. Without one that the policy needs, the first experts of every
    layer are taken, so that sizes are known.
    Raises: PolicyError if experts cannot be pruned so, or the saliency is not of this model.
    """
    if not policy.transforms:
        return None
    # The language allows one, as there is one thing to prune.
    (prune,) = policy.transforms
    found = list(_defects(prune, policy, model))
    if found:
        raise PolicyError(found)
    layers, count = expert_layers(model), prune.count
    if prune.keep:
        listed = tuple(n for each in prune.keep for n in range(each.start, each.stop + 1))
        return Pruning(model.n_experts, dict.fromkeys(layers, listed))
    if saliency is None:
        first = tuple(range(count))
        return Pruning(model.n_experts, dict.fromkeys(layers, first), prune.by, chosen=False)
    shape = ModelShape(layers, model.n_layers, model.n_experts)
    if saliency.name == KEEP:
        return Pruning(model.n_experts, saliency.kept(shape, count), prune.by)
    ranks = saliency.ranks(shape)
    kept = {layer: highest(row, count) for layer, row in ranks.items()}
    return Pruning(model.n_experts, kept, prune.by)


def _defects(prune: Prune, policy: Policy, model: Model) -> Iterator[Diagnostic]:
    """What is against keeping so many experts, or these, of the model."""
    span = dict(policy.key_spans).get("transforms")
    # A config may count experts that no layer has.
    count, before = prune.count, model.n_experts if expert_layers(model) else 0
    last = prune.keep[-1].stop if prune.keep else 0
    if not 1 <= count <= before:
        yield diagnostic("prune-count", span, to=count, count=before)
    elif last >= before:
        yield diagnostic(
            "number-outside-model", span, written=f"expert {last} is", has=f"experts 0-{before - 1}"
        )
    elif count < before:
        yield from _routing_defects(count, model, span)


def _routing_defects(count: int, model: Model, span: Span | None) -> Iterator[Diagnostic]:
    """What is against a router of the model that chooses among so many experts."""
    entry = model.architecture.config.get(_ROUTED)
    for key in entry.names if entry else (_ROUTED,):
        routed = model.facts.value(key)
        if type(routed) is int and routed > count:
            yield diagnostic("prune-below-routed", span, to=count, routed=routed, key=key)
    groups = model.facts.value(_GROUPS)
    if type(groups) is int and groups > 1:
        yield diagnostic("prune-in-groups", span, model=model.id, groups=groups, key=_GROUPS)


def pruned(model: Model, pruning: Pruning | None) -> tuple[Model, tuple[Omission, ...]]:
    """The model with only these experts, renumbered in their old order, and what it lost.

    Routers and their biases lose the same entries; the config has the new count.
    """
    if pruning is None or pruning.count == pruning.before:
        return model, ()
    new = {
        layer: {old: number for number, old in enumerate(kept)}
        for layer, kept in pruning.kept.items()
    }
    tensors: list[ModelTensor] = []
    lost: dict[tuple[str, int], Omission] = {}
    for tensor in model.tensors:
        numbers = new.get(-1 if tensor.layer is None else tensor.layer)
        if numbers is None:
            tensors.append(tensor)
        elif tensor.expert is None:
            whole = not _is_by_expert(tensor, pruning.before)
            tensors.append(tensor if whole else _picked(tensor, tuple(numbers)))
        elif tensor.expert in numbers:
            tensors.append(replace(tensor, expert=numbers[tensor.expert]))
        else:
            # Of a fused source, gate and up of an expert are one stretch of it.
            key = tensor.source.name, tensor.expert
            lost.setdefault(key, _omission(tensor, tensor.expert, pruning))
    keys = model.architecture.experts
    config = rewritten(
        model.config,
        lambda key, value: pruning.count if key in keys and value is not None else value,
    )
    facts = replace(model.facts, n_experts=pruning.count, config=config)
    return replace(model, tensors=tuple(tensors), facts=facts), tuple(lost.values())


def _is_by_expert(tensor: ModelTensor, before: int) -> bool:
    """Whether a tensor outside the experts' matrices has an entry for each of them."""
    if tensor.role in BY_EXPERT:
        return True
    # Biases of fused experts: [experts, out].
    path = tensor.source.name.split(".")
    return tensor.role == "bias" and "experts" in path and tensor.shape[0] == before


def _picked(tensor: ModelTensor, numbers: tuple[int, ...]) -> ModelTensor:
    """The tensor with the entries of these experts only."""
    alone = prod(tensor.shape[:-1]) == 1
    lead, rest = (tensor.shape[:-1], ()) if alone else ((), tensor.shape[1:])
    picked = (*tensor.operations, Picked(numbers))
    return replace(tensor, shape=(*lead, len(numbers), *rest), operations=picked)


def _omission(tensor: ModelTensor, expert: int, pruning: Pruning) -> Omission:
    source, scale = tensor.source, tensor.scale
    if source.shape[0] == pruning.before and len(source.shape) > 2:
        # One of many in the tensor, named as numpy would.
        part = source.nbytes // pruning.before
        source = source._replace(
            name=f"{source.name}[{expert}]",
            shape=source.shape[1:],
            nbytes=part,
            start=source.start + expert * part,
            stop=source.start + (expert + 1) * part,
        )
        scale = scale and scale._replace(nbytes=scale.nbytes // pruning.before)
    return Omission(source, tensor.role, tensor.layer, pruning.reason, scale, expert)


def ensure_all_pruned(
    pruning: Pruning | None, made: Sequence[Decision], model: Model, format: Format
) -> None:
    """Raises: PolicyError if the bundle of a pruned model would hold experts that are not.

    MTP blocks have experts of their own, and readers build them with the config's one count.
    """
    less = pruning is not None and pruning.count < pruning.before
    carried = [
        one
        for one in (made if less else ())
        if one.tensor.component == "mtp"
        and "experts" in one.tensor.source.name.split(".")
        and one.written.action != "drop"
        and format.review.left_out(one.tensor, model) is None
    ]
    if carried:
        first = carried[0]
        raise fail(
            "prune-beside-mtp",
            first.rule.rule.span if first.rule else None,
            suggestion="leave them out with `mtp: drop`",
            count=len(carried),
            name=first.tensor.source.name,
        )
