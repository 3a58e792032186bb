"""Warnings about a finished plan: what is legal and often a mistake."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, Span, diagnostic
from policy_dsl.formats import Format
from policy_dsl.inventory import DTYPE_BITS
from policy_dsl.plan import Module, Plan, Refusal
from policy_dsl.planning.decisions import Decision
from policy_dsl.planning.fill import plain_of
from policy_dsl.planning.matching import CompiledRule, is_guarded
from policy_dsl.policy import And, Except, Glob, Name, Or, Regex, Selector
from policy_dsl.quantities import both_units, counted
from policy_dsl.roles.classify import ModelTensor
from policy_dsl.roles.config_facts import TIED, rewritten
from policy_dsl.roles.model import Model
from policy_dsl.treatments import KEEP, Coded
from policy_dsl.vocabulary import OUTSIDE_LANGUAGE_MODEL, namesake


def names_it(
    rule: CompiledRule, tensor: ModelTensor, left_out: frozenset[str], model: Model
) -> bool:
    """Whether a rule that matches a tensor names it, and not only covers it as `all` does.

    By its role or component, or by a pattern for nothing else than tensors that are left out.
    """
    return any(
        rule.predicates[leaf](tensor)[0]
        and (isinstance(leaf, Name) or model.names.matching(leaf) <= left_out)
        for leaf in _names(rule.rule.selector)
    )


def _names(selector: Selector) -> Iterator[Name | Glob | Regex]:
    """The names and patterns of what a selector means, not of what it excepts."""
    if isinstance(selector, And | Or):
        for part in selector.parts:
            yield from _names(part)
    elif isinstance(selector, Except):
        yield from _names(selector.base)
    elif isinstance(selector, Name | Glob | Regex):
        yield selector


def rules_without_effect(plan: Plan, made: Sequence[Decision], format: Format) -> list[Diagnostic]:
    """A warning for each rule that names tensors which the target leaves out, to store them."""
    names = frozenset(omission.tensor.name for omission in plan.omitted)
    left_out = [one for one in made if one.tensor.source.name in names]
    lost: dict[tuple[int, str], _Lost] = {}
    for rule, tensor in _named(left_out, names, plan.model):
        reason = format.review.left_out(tensor, plan.model) or ""
        lost.setdefault((rule.index, reason), _Lost(rule, [])).tensors.append(tensor)
    if not lost:
        return []
    unnamed = [one.tensor for one in left_out if one.rule is None]
    for tensor in unnamed:
        # Guarded ones: without the target's word, they would be kept beside the others.
        matching = [each for each in lost.values() if each.rule.predicate(tensor)[0]]
        if matching:
            matching[-1].tensors.append(tensor)
    used = {one.rule.index for one in made if one.rule and one.tensor.source.name not in names}
    return [
        _without_effect(plan.target, reason, found, is_used=index in used)
        for (index, reason), found in lost.items()
    ]


class _Lost(NamedTuple):
    """A rule, and the tensors that it names and the target leaves out."""

    rule: CompiledRule
    tensors: list[ModelTensor]


def _named(
    left_out: Sequence[Decision], names: frozenset[str], model: Model
) -> Iterator[tuple[CompiledRule, ModelTensor]]:
    """The tensors that are left out although the rule that decides them names them."""
    for one in left_out:
        if one.rule is None or one.written.action == "drop":
            continue
        if names_it(one.rule, one.tensor, names, model):
            yield one.rule, one.tensor


def _without_effect(target: str, reason: str, lost: _Lost, *, is_used: bool) -> Diagnostic:
    rule, tensors = lost.rule.rule, lost.tensors
    span = rule.selector_span if is_used else rule.treatment_span
    open_ones = [tensor for tensor in tensors if not is_guarded(tensor)]
    named = ", ".join(dict.fromkeys(map(_called, open_ones or tensors)))
    return diagnostic(
        "rule-without-effect",
        span or rule.span,
        suggestion=f'write "{named}: drop" after it' if is_used else 'write "drop"',
        tensors=counted(len({tensor.source.name for tensor in tensors}), "tensor"),
        target=target,
        reason=reason,
    )


def _called(tensor: ModelTensor) -> str:
    # A component does not name what is guarded.
    return tensor.role if is_guarded(tensor) else tensor.component or tensor.role


def plan_warnings(plan: Plan, made: tuple[Decision, ...], format: Format) -> list[Diagnostic]:
    """What a reviewer should know: forgotten matrices, quantized routers, outputs that grow."""
    return [
        *_unreached(plan, made),
        *_dropped(plan, made),
        *head_findings(plan),
        *rules_without_effect(plan, made, format),
        *(_router_warnings(plan) if _has_plain_routers(plan, made, format) else []),
        *_growth_warnings(plan),
        *_added(plan),
        *_not_added(plan, format),
        *_refused(plan, format),
    ]


def _span(plan: Plan, rule: int | None) -> Span | None:
    return None if rule is None else plan.policy.rules[rule].span


def _unreached(plan: Plan, made: tuple[Decision, ...]) -> list[Diagnostic]:
    # Vision towers and tied heads that the format leaves out were not forgotten.
    left_out = {omission.tensor.name for omission in plan.omitted}
    missed = [
        one.tensor
        for one in made
        if one.rule is None
        and not is_guarded(one.tensor)
        and one.tensor.source.name not in left_out
    ]
    if not missed:
        return []
    roles = sorted({tensor.role for tensor in missed})
    places = dict(plan.policy.key_spans)
    # A stack is one module: its first source represents all of them.
    names = {tensor.source.name for tensor in missed}
    size = sum(
        module.nbytes
        for module in plan.modules
        if module.decided_by is None
        and any(rows.tensor.name in names for rows in module.sources[:1])
    )
    return [
        diagnostic(
            "unreached-matrices",
            places.get("defaults.otherwise") or places.get("rules"),
            matrices=counted(len(missed), "matrix", "matrices"),
            roles=", ".join(roles),
            nbytes=both_units(size),
        )
    ]


def _dropped(plan: Plan, made: tuple[Decision, ...]) -> list[Diagnostic]:
    roles: dict[int | None, set[str]] = defaultdict(set)
    for one in made:
        tensor = one.tensor
        spare = tensor.component in OUTSIDE_LANGUAGE_MODEL
        spare = spare or (tensor.role == "lm_head" and plan.model.tied)
        if one.written.action == "drop" and not spare:
            roles[one.decided_by].add(tensor.role)
    return [
        diagnostic(
            "dropped-tensors", _span(plan, rule), roles=", ".join(sorted(found)), target=plan.target
        )
        for rule, found in roles.items()
    ]


def _has_plain_routers(plan: Plan, made: tuple[Decision, ...], format: Format) -> bool:
    """Whether readers of the format would take a router that is not quantized."""
    # Where they would not, quantizing it is not a choice.
    routers = (one.tensor for one in made if one.tensor.namesake == "router")
    return all(
        format.review.held(router, plan.model, plain_of(KEEP, router, plan.model, format.spec))
        is None
        for router in routers
    )


def _router_warnings(plan: Plan) -> list[Diagnostic]:
    # One warning for each rule, where the author can act on it.
    rules: dict[int | None, int] = defaultdict(int)
    for module in plan.modules:
        if namesake(module.role) == "router" and isinstance(module.treatment, Coded):
            rules[module.decided_by] += 1
    return [
        diagnostic("router-quantized", _span(plan, rule), routers=counted(count, "router"))
        for rule, count in rules.items()
    ]


def _growth_warnings(plan: Plan) -> list[Diagnostic]:
    grown: dict[int | None, list[int]] = {}
    # Scales of groups, for codes as wide as the source's values, do not waste bits.
    for module in filter(_is_wider, plan.modules):
        # Experts that no source has are another warning, and no rule's doing.
        before, after = _source_nbytes(module), module.nbytes - _added_nbytes(module)
        if after > before:
            totals = grown.setdefault(module.decided_by, [0, 0, 0])
            for index, value in enumerate((1, before, after)):
                totals[index] += value
    return [
        diagnostic(
            "larger-than-source",
            _span(plan, rule),
            outputs=counted(count, "output"),
            before=both_units(before),
            after=both_units(after),
        )
        for rule, (count, before, after) in grown.items()
    ]


def _added(plan: Plan) -> list[Diagnostic]:
    padded = [module for module in plan.modules if module.added]
    if not padded:
        return []
    size = sum(map(_added_nbytes, padded))
    return [
        diagnostic(
            "experts-added",
            dict(plan.policy.key_spans).get("output.pad_experts"),
            target=plan.target,
            experts=counted(plan.added_experts, "expert"),
            count=plan.model.n_experts,
            nbytes=both_units(size),
        )
    ]


def _not_added(plan: Plan, format: Format) -> list[Diagnostic]:
    family = plan.model.architecture.family
    # A target that adds none to any model does not use the setting, which is another finding.
    if (
        not plan.policy.output.pad_experts
        or not format.spec.padding
        or family in format.spec.padding
    ):
        return []
    span = dict(plan.policy.key_spans).get("output.pad_experts")
    return [diagnostic("experts-not-added", span, target=format.spec.name, family=family)]


def _refused(plan: Plan, format: Format) -> list[Diagnostic]:
    """Readers that cannot load the bundle: if it is all, or those that the author names."""
    spans = dict(plan.policy.key_spans)
    fatal = {one.reader: one.reason for one in reversed(plan.refusals) if _is_fatal(one)}
    if fatal and fatal.keys() == format.spec.runtimes.keys():
        reasons = dict.fromkeys(one.reason for one in plan.refusals if _is_fatal(one))
        return [
            diagnostic(
                "no-reader",
                notes=list(reasons)[1:],
                target=format.spec.name,
                readers=", ".join(format.spec.runtimes),
                model=plan.model.id,
                reason=next(iter(reasons)),
            )
        ]
    named = plan.policy.runtimes
    nobody = format.spec.runtimes.keys() <= {one.reader for one in plan.refusals}
    return [
        diagnostic(
            "runtime-cannot" if _is_fatal(one) and one.reader in named else "runtime-refuses",
            spans.get(f"runtimes.{one.reader}"),
            runtime=one.reader,
            reason=one.reason,
        )
        for one in plan.refusals
        if nobody or one.reader in named
    ]


def _is_fatal(refusal: Refusal) -> bool:
    return refusal.severity == "fatal"


def _added_nbytes(module: Module) -> int:
    return module.nbytes * module.added // module.shape[0] if module.added else 0


def _is_wider(module: Module) -> bool:
    if not module.sources:
        return False
    bits = min([DTYPE_BITS.get(rows.tensor.dtype, 0) for rows in module.sources])
    if isinstance(module.treatment, Coded):
        return module.treatment.bits > bits
    return DTYPE_BITS[module.dtype] > bits


def _source_nbytes(module: Module) -> int:
    """Bytes of the source rows, and of their share of the FP8 scales."""
    total = 0.0
    for view in module.sources:
        share = math.prod(view.shape) / max(1, math.prod(view.tensor.shape))
        total += share * (view.tensor.nbytes + (view.scale.nbytes if view.scale else 0))
    return round(total)


def with_own_head(model: Model, made: Sequence[Decision]) -> Model:
    """The model, not tied any more if a rule names a head of its own, to store it."""
    heads = [one for one in made if one.tensor.role == "lm_head"] if model.tied else []
    names = frozenset(one.tensor.source.name for one in heads)
    kept = any(
        one.rule is not None
        and one.written.action != "drop"
        and names_it(one.rule, one.tensor, names, model)
        for one in heads
    )
    return untied(model) if kept else model


def untied(model: Model) -> Model:
    """The model with a head of its own, as config.json then has to say."""
    # Wherever the source says it, else at the top.
    config = rewritten(model.config, lambda key, value: False if key == TIED else value)
    config |= {} if model.facts.is_given(TIED) else {TIED: False}
    return replace(model, tied=False, facts=replace(model.facts, config=config))


def head_remarks(model: Model, source: Model) -> tuple[tuple[str, str], ...]:
    """What a plan says about a model that is tied in its source and not in the bundle."""
    if model.tied == source.tied:
        return ()
    return (("head", f"stored beside the embedding, so config.json says {TIED}: false"),)


def head_findings(plan: Plan) -> list[Diagnostic]:
    """The warning about a head that is left out because the model is tied, with its bytes."""
    return [
        diagnostic(
            "tied-head-left-out",
            suggestion=f'write "{omission.role}: keep" to store it, or "{omission.role}: drop"',
            name=omission.tensor.name,
            nbytes=both_units(omission.nbytes),
            embedding=omission.equals,
        )
        for omission in plan.omitted
        if omission.equals
    ]
