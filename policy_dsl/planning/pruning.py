"""Pruning experts: which of every layer stay, and the model without the others.

Policy, Model, Saliency ── pruning_of ──> Pruning ── pruned ──> Model, Omissions
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from policy_dsl.diagnostics import Diagnostic, PolicyError, Span, diagnostic, fail
from policy_dsl.formats import Format
from policy_dsl.plan import Omission, Pruning
from policy_dsl.planning.decisions import Decision
from policy_dsl.policy import Policy, Prune
from policy_dsl.roles.config_facts import rewritten
from policy_dsl.roles.model import BY_EXPERT, Model, ModelTensor
from policy_dsl.sources.saliency import KEEP, ModelShape, Saliency
from policy_dsl.views import Picked

_ROUTED = "num_experts_per_tok"
_GROUPS = "n_group"


def highest(saliencies: Sequence[float], count: int) -> tuple[int, ...]:
    """The numbers of the `count` largest saliencies, ascending; of equal ones the first.

    Source: CerebrasResearch/reap 1970473, pruning of one layer; the order of equal ones is ours.
    """
    order = sorted(range(len(saliencies)), key=lambda number: -saliencies[number])
    return tuple(sorted(order[:count]))


def expert_layers(model: Model) -> tuple[int, ...]:
    """The language model's layers that have routed experts, ascending."""
    layers = (one.layer for one in model.tensors if one.expert is not None)
    return tuple(sorted({layer for layer in layers if layer is not None}))


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
    layers, count, before = expert_layers(model), prune.count, model.n_experts
    if found := list(_defects(prune, policy, model, layers)):
        raise PolicyError(found)
    shape = ModelShape(layers, model.n_layers, before)
    if prune.keep:
        listed = tuple(n for each in prune.keep for n in range(each.start, each.stop + 1))
        kept = dict.fromkeys(layers, listed)
    elif saliency is None:
        kept = dict.fromkeys(layers, tuple(range(count)))
    elif saliency.name == KEEP:
        kept = dict(saliency.kept(shape, count))
    else:
        kept = {layer: highest(row, count) for layer, row in saliency.ranks(shape).items()}
    return Pruning(before, kept, prune.by, chosen=bool(prune.keep) or saliency is not None)


def _defects(
    prune: Prune, policy: Policy, model: Model, layers: Sequence[int]
) -> Iterator[Diagnostic]:
    """What is against keeping so many experts, or these, of the model."""
    span = policy.key_spans.get("transforms")
    # A config may count experts that no layer has.
    count, before = prune.count, model.n_experts if layers else 0
    last = prune.keep[-1].stop if prune.keep else 0
    if not 1 <= count <= before:
        yield diagnostic("prune-count", span, to=count, count=before)
    elif last >= before:
        has = f"experts 0-{before - 1}"
        yield diagnostic("number-outside-model", span, written=f"expert {last} is", has=has)
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
    # Layer -> an expert's old number -> its new one.
    new: dict[int | None, dict[int, int]] = {
        layer: dict(zip(kept, range(len(kept)), strict=True))
        for layer, kept in pruning.kept.items()
    }
    tensors: list[ModelTensor] = []
    lost: dict[tuple[str, int], Omission] = {}
    for tensor in model.tensors:
        numbers = new.get(tensor.layer)
        if numbers is None:
            tensors.append(tensor)
        elif tensor.expert is None:
            tensors.append(_picked(tensor, tuple(numbers), pruning.before))
        elif tensor.expert in numbers:
            tensors.append(tensor._replace(expert=numbers[tensor.expert]))
        else:
            # Of a fused source, gate and up of an expert are one stretch of it.
            key = tensor.source.name, tensor.expert
            lost.setdefault(key, _omission(tensor, tensor.expert, pruning))
    keys, n = model.architecture.experts, pruning.count
    config = rewritten(model.config, lambda key, old: n if key in keys and old is not None else old)
    facts = replace(model.facts, n_experts=n, config=config)
    return replace(model, tensors=tuple(tensors), facts=facts), tuple(lost.values())


def _picked(tensor: ModelTensor, numbers: tuple[int, ...], before: int) -> ModelTensor:
    """The tensor with the entries of these experts only, if it has an entry for each."""
    # Beside routers, biases of fused experts: [experts, out].
    of_fused = tensor.role == "bias" and "experts" in tensor.source.name.split(".")
    if tensor.role not in BY_EXPERT and not (of_fused and tensor.shape[0] == before):
        return tensor
    alone = prod(tensor.shape[:-1]) == 1
    lead, rest = (tensor.shape[:-1], ()) if alone else ((), tensor.shape[1:])
    # Behind the experts are those that are the identity.
    numbers = (*numbers, *range(before, tensor.shape[-1 if alone else 0]))
    operations = (*tensor.operations, Picked(numbers))
    return tensor._replace(shape=(*lead, len(numbers), *rest), operations=operations)


def _omission(tensor: ModelTensor, expert: int, pruning: Pruning) -> Omission:
    source, scale = tensor.source, tensor.scale
    if source.shape[0] == pruning.before and len(source.shape) > 2:
        # One of many in the tensor, named as numpy would.
        part = source.nbytes // pruning.before
        name, start = f"{source.name}[{expert}]", source.start + expert * part
        source = source._replace(name=name, shape=source.shape[1:], nbytes=part)
        source = source._replace(start=start, stop=start + part)
        scale = scale and scale._replace(nbytes=scale.nbytes // pruning.before)
    return Omission(source, tensor.role, tensor.layer, pruning.reason, scale, expert)


def ensure_all_pruned(
    pruning: Pruning | None, made: Sequence[Decision], model: Model, format: Format
) -> None:
    """Raises: PolicyError if the bundle of a pruned model would hold experts that are not.

    MTP blocks have experts of their own, and readers build them with the config's one count.
    """
    if pruning is None or pruning.count == pruning.before:
        return
    stored = (one for one in made if one.written.action != "drop")
    outside = (one for one in stored if one.tensor.component == "mtp")
    experts = (one for one in outside if "experts" in one.tensor.source.name.split("."))
    carried = [one for one in experts if format.review.left_out(one.tensor, model) is None]
    if carried:
        rule, name = carried[0].rule, carried[0].tensor.source.name
        span, cure = rule.span if rule else None, "leave them out with `mtp: drop`"
        raise fail("prune-beside-mtp", span, suggestion=cure, count=len(carried), name=name)
