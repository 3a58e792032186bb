"""Rules for tensors that a target leaves out: which of them name those tensors, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Format
from policy_dsl.plan import Plan
from policy_dsl.planning.decisions import Decision
from policy_dsl.planning.matching import CompiledRule, is_guarded
from policy_dsl.quantities import counted
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.selectors import And, Except, Glob, Name, Or, Regex, Selector


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
