"""Warnings about a finished plan: what is legal and often a mistake."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from policy_dsl.diagnostics import Diagnostic, Span, diagnostic
from policy_dsl.formats import Format
from policy_dsl.inventory import DTYPE_BITS
from policy_dsl.plan import Module, Plan, coded_modules
from policy_dsl.planning.decisions import Decision, Decisions
from policy_dsl.planning.matching import CHOOSERS, is_guarded, walk
from policy_dsl.planning.outline import bits_of
from policy_dsl.planning.reach import Reach
from policy_dsl.policy import OUTSIDE_LANGUAGE_MODEL, Glob, Name, Regex, Rule, namesake
from policy_dsl.quantities import both_units, counted
from policy_dsl.roles.config_facts import TIED, rewritten
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.treatments import Plain


def plan_warnings(plan: Plan, decisions: Decisions, format: Format) -> Iterator[Diagnostic]:
    """What a reviewer should know: forgotten matrices, quantized routers, outputs that grow."""
    yield from _unreached(plan, decisions.made)
    yield from _dropped(plan, decisions.made)
    yield from _heads_left_out(plan)
    yield from _without_effect(plan, decisions, format)
    yield from _routers(plan, decisions.made, format)
    yield from _grown(plan)
    yield from _unpinned(plan)
    yield from _padded(plan, format)
    yield from _refused(plan, format)
    yield from _differing(plan)


def _span(plan: Plan, rule: int | None) -> Span | None:
    return None if rule is None else plan.policy.rules[rule].span


def _unreached(plan: Plan, made: Sequence[Decision]) -> Iterator[Diagnostic]:
    # Vision towers and tied heads that the format leaves out were not forgotten.
    left_out = {omission.tensor.name for omission in plan.omitted}
    without = (one.tensor for one in made if one.rule is None and not is_guarded(one.tensor))
    missed = [tensor for tensor in without if tensor.source.name not in left_out]
    if not missed:
        return
    names = {tensor.source.name for tensor in missed}
    # A stack is one module: its first source represents all of them.
    unruled = (one for one in plan.modules if one.decided_by is None and one.sources)
    size = sum(one.nbytes for one in unruled if one.sources[0].tensor.name in names)
    places, count = plan.policy.key_spans, counted(len(missed), "matrix", "matrices")
    span = places.get("defaults.otherwise") or places.get("rules")
    roles = ", ".join(sorted({tensor.role for tensor in missed}))
    facts: dict[str, Any] = {"matrices": count, "roles": roles, "nbytes": both_units(size)}
    yield diagnostic("unreached-matrices", span, **facts)


def _dropped(plan: Plan, made: Sequence[Decision]) -> Iterator[Diagnostic]:
    found: dict[int | None, set[str]] = defaultdict(set)
    for one in made:
        tensor = one.tensor
        spare = tensor.component in OUTSIDE_LANGUAGE_MODEL
        spare = spare or (tensor.role == "lm_head" and plan.model.tied)
        if one.written.action == "drop" and not spare:
            found[one.decided_by].add(tensor.role)
    for rule, roles in found.items():
        named = ", ".join(sorted(roles))
        yield diagnostic("dropped-tensors", _span(plan, rule), roles=named, target=plan.target)


def _heads_left_out(plan: Plan) -> Iterator[Diagnostic]:
    for one in plan.omitted:
        if one.equals:
            cure = f'write "{one.role}: keep" to store it, or "{one.role}: drop"'
            facts: dict[str, Any] = {"name": one.tensor.name, "embedding": one.equals}
            size = both_units(one.nbytes)
            yield diagnostic("tied-head-left-out", suggestion=cure, nbytes=size, **facts)


def _without_effect(plan: Plan, decisions: Decisions, format: Format) -> Iterator[Diagnostic]:
    """A warning for each rule that names tensors which the target leaves out, to store them."""
    names, made = frozenset(omission.tensor.name for omission in plan.omitted), decisions.made
    lost = _named_in_vain(plan, decisions, names, format)
    used = {one.decided_by for one in made if lost and one.tensor.source.name not in names}
    for (index, reason), tensors in lost.items():
        rule, is_used = plan.policy.rules[index], index in used
        span = (rule.selector_span if is_used else rule.treatment_span) or rule.span
        cure = f'write "{_called(tensors)}: drop" after it' if is_used else 'write "drop"'
        count = counted(len({tensor.source.name for tensor in tensors}), "tensor")
        facts: dict[str, Any] = {"target": plan.target, "reason": reason}
        yield diagnostic("rule-without-effect", span, suggestion=cure, tensors=count, **facts)


def _called(tensors: Sequence[ModelTensor]) -> str:
    # A component does not name what is guarded.
    called = [one.component or one.role for one in tensors if not is_guarded(one)]
    return ", ".join(dict.fromkeys(called or [one.role for one in tensors]))


def _named_in_vain(
    plan: Plan, decisions: Decisions, names: frozenset[str], format: Format
) -> dict[tuple[int, str], list[ModelTensor]]:
    """Rule and reason -> tensors of these names, which are left out though it stores them."""
    made, reach, rules = decisions.made, decisions.reach, plan.policy.rules
    left_out = [at for at, one in enumerate(made) if one.tensor.source.name in names]
    lost: dict[tuple[int, str], list[ModelTensor]] = defaultdict(list)
    for at in left_out:
        tensor, index = made[at].tensor, made[at].decided_by
        if index is not None and _stores_by_name(rules[index], at, names, reach):
            lost[index, format.review.left_out(tensor, plan.model) or ""].append(tensor)
    for at in [at for at in left_out if made[at].rule is None]:
        # Guarded ones: without the target's word, they would be kept beside the others.
        matching = [key for key in lost if at in reach.meaning(rules[key[0]].selector).matched]
        for key in matching[-1:]:
            lost[key].append(made[at].tensor)
    return lost


def _stores_by_name(rule: Rule, place: int, left_out: frozenset[str], reach: Reach) -> bool:
    """Whether a rule that matches a tensor names it to store it, unlike `all`, which covers it.

    By its role or component, or by a pattern for nothing else than tensors that are left out.
    """
    return rule.treatment.action != "drop" and any(
        place in reach.meaning(leaf).matched
        and (isinstance(leaf, Name) or reach.model.names.matching(leaf) <= left_out)
        for leaf, excepted in walk(rule.selector)
        if isinstance(leaf, Name | Glob | Regex) and not excepted
    )


def _routers(plan: Plan, made: Sequence[Decision], format: Format) -> Iterator[Diagnostic]:
    model, review, dtype_of = plan.model, format.review, format.spec.plain_dtype
    # Where readers would not take a plain one, quantizing it is not a choice.
    for tensor, *_ in made:
        is_router = tensor.namesake == "router"
        if is_router and review.held(tensor, model, Plain(dtype_of(tensor, model))) is not None:
            return
    # One warning for each rule, where the author can act on it.
    usual = review.usual
    found = Counter(
        (one.decided_by, namesake(one.role), treatment.bits, usual(one, model) if usual else None)
        for one, treatment in coded_modules(plan.modules)
    )
    for (rule, role, bits, own), count in found.items():
        span = _span(plan, rule)
        if own is None and role in CHOOSERS:
            routers = counted(count, role.replace("_", " "))
            yield diagnostic("router-quantized", span, routers=routers)
        elif bits < (own or 0):
            facts: dict[str, Any] = {"role": role, "bits": bits, "usual": own}
            yield diagnostic("below-usual-width", span, count=counted(count, "module"), **facts)


def _unpinned(plan: Plan) -> Iterator[Diagnostic]:
    named = plan.policy.model
    # Folders and catalog entries have no commit.
    if plan.source_commit and named == plan.model.id and "@" not in named:
        cure = f"write {named}@{plan.source_commit}"
        span = plan.policy.key_spans.get("model")
        yield diagnostic("unpinned-revision", span, suggestion=cure, model=named)


def _grown(plan: Plan) -> Iterator[Diagnostic]:
    found: dict[int | None, list[tuple[int, int]]] = defaultdict(list)
    for module in plan.modules:
        bits = min([DTYPE_BITS.get(rows.tensor.dtype, 0) for rows in module.sources], default=0)
        # Scales of groups, for codes as wide as the source's values, do not waste bits.
        if module.sources and bits_of(module) > bits:
            # Experts that no source has are another warning, and no rule's doing.
            before, after = _source_nbytes(module), module.nbytes - _added_nbytes(module)
            if after > before:
                found[module.decided_by].append((before, after))
    for rule, sizes in found.items():
        outputs, span = counted(len(sizes), "output"), _span(plan, rule)
        old, new = (both_units(sum(side)) for side in zip(*sizes, strict=True))
        yield diagnostic("larger-than-source", span, outputs=outputs, before=old, after=new)


def _source_nbytes(module: Module) -> int:
    """Bytes of the source rows, and of their share of the FP8 scales."""
    total = 0.0
    for view in module.sources:
        share = prod(view.shape) / max(1, prod(view.tensor.shape))
        total += share * (view.tensor.nbytes + (view.scale.nbytes if view.scale else 0))
    return round(total)


def _added_nbytes(module: Module) -> int:
    return module.nbytes * module.added // module.shape[0] if module.added else 0


def _padded(plan: Plan, format: Format) -> Iterator[Diagnostic]:
    """That experts are added, or are not although the policy wants them."""
    span = plan.policy.key_spans.get("output.pad_experts")
    if any(module.added for module in plan.modules):
        experts, count = counted(plan.added_experts, "expert"), plan.model.n_experts
        size = both_units(sum(map(_added_nbytes, plan.modules)))
        facts: dict[str, Any] = {"target": plan.target, "experts": experts, "nbytes": size}
        yield diagnostic("experts-added", span, count=count, **facts)
    padding, family = format.spec.padding, plan.model.architecture.family
    # A target that adds none to any model does not use the setting, which is another finding.
    if plan.policy.output.pad_experts and padding and family not in padding:
        yield diagnostic("experts-not-added", span, target=plan.target, family=family)


def _refused(plan: Plan, format: Format) -> Iterator[Diagnostic]:
    """Readers that cannot load the bundle: if it is all, or those that the author names."""
    readers, named = format.spec.runtimes.keys(), plan.policy.runtimes
    if (nothing := _no_reader(plan, readers)) is not None:
        yield nothing
        return
    nobody = readers <= {one.reader for one in plan.not_loaded}
    for one in plan.not_loaded:
        if nobody or one.reader in named:
            cannot = one.severity == "fatal" and one.reader in named
            code = "runtime-cannot" if cannot else "runtime-refuses"
            span = plan.policy.key_spans.get(f"runtimes.{one.reader}")
            yield diagnostic(code, span, runtime=one.reader, reason=one.reason)


def _differing(plan: Plan) -> Iterator[Diagnostic]:
    alike: dict[str, list[str]] = defaultdict(list)
    for one in (one for one in plan.refusals if one.severity == "inexact"):
        alike[one.reason].append(one.reader)
    for reason, names in alike.items():
        yield diagnostic("answers-differ", readers=", ".join(names), reason=reason)


def _no_reader(plan: Plan, readers: Collection[str]) -> Diagnostic | None:
    fatal = [one for one in plan.refusals if one.severity == "fatal"]
    if not fatal or {one.reader for one in fatal} != set(readers):
        return None
    reason, *others = dict.fromkeys(one.reason for one in fatal)
    facts: dict[str, Any] = {"target": plan.target, "model": plan.model.id, "reason": reason}
    return diagnostic("no-reader", notes=others, readers=", ".join(readers), **facts)


def with_own_head(model: Model, decisions: Decisions) -> Model:
    """The model, not tied any more if a rule names a head of its own, to store it."""
    made = enumerate(decisions.made) if model.tied else ()
    heads = {at: one for at, one in made if one.tensor.role == "lm_head"}
    names = frozenset(one.tensor.source.name for one in heads.values())
    kept = any(
        one.rule is not None and _stores_by_name(one.rule, at, names, decisions.reach)
        for at, one in heads.items()
    )
    return untied(model) if kept else model


def untied(model: Model) -> Model:
    """The model with a head of its own, as config.json then has to say."""
    # Wherever the source says it, else at the top.
    config = rewritten(model.config, lambda key, value: False if key == TIED else value)
    config |= {} if model.facts.is_given(TIED) else {TIED: False}
    return replace(model, tied=False, facts=replace(model.facts, config=config))
