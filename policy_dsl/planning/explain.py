"""Why a tensor is treated as it is: the rule that decided, those that lost, and the bytes.

Plan x name ── find_subject ──> Subject ── explain ──> Explanation
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from policy_dsl.diagnostics import fail, nearest
from policy_dsl.documents import RuleAt
from policy_dsl.linear_patterns import PatternError
from policy_dsl.plan import Module, Omission, Plan, rule_place
from policy_dsl.planning.decisions import trace
from policy_dsl.planning.matching import CompiledRule, is_guarded
from policy_dsl.planning.outline import treatment_of
from policy_dsl.policy import Glob
from policy_dsl.quantities import counted
from policy_dsl.roles.model import ModelTensor
from policy_dsl.roles.name_index import full_match

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Subject:
    """What a name means: the module that holds it, or why nothing does.

    tensor: the model's tensor that is explained; None for a source tensor without a role, for
    what no source has, and for a pruned expert's. omission: of a tensor that is left out.
    """

    name: str
    module: Module | None
    tensor: ModelTensor | None
    omission: Omission | None = None


class Namesake(NamedTuple):
    """An expert of the source by its number there, and its new one; None if it is pruned."""

    source_expert: int
    expert: int | None


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """A rule that matches.

    place: file:line; rule_at: the same, in parts. outcome: decided, lost, guarded, or without
    effect: it decided, and the target leaves the tensor out.
    """

    place: str
    text: str
    outcome: str
    rule_at: RuleAt | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that is known about one decision. alike: modules with the same decision.

    kept_expert: the number in the source of the expert that the name means. namesake: that of
    another one, whose tensor has this name in the source, and what became of it.
    """

    subject: Subject
    guarded: bool
    rules: tuple[RuleOutcome, ...]
    alike: tuple[Module, ...]
    kept_expert: int | None = None
    namesake: Namesake | None = None

    @property
    def source_expert(self) -> int | None:
        """The number in the source of the expert that the name means, if some were pruned."""
        omission = self.subject.omission
        return omission.expert if omission else self.kept_expert

    @property
    def expert(self) -> int | None:
        """The expert that the name means; None for the stack of all of them."""
        tensor, module = self.subject.tensor, self.subject.module
        own = set(_output_names(module)) if module else set()
        # The stack is explained by its first expert.
        stacked = self.subject.name in own and module is not None and len(module.sources) > 1
        return None if tensor is None or stacked else tensor.expert


def explain(plan: Plan, name: str) -> Explanation:
    """The explanation of a tensor by its source or output name, or a glob over both.

    Raises: PolicyError (unknown-tensor, many-tensors) if the name is none or several;
    bad-argument for a glob without end.
    """
    subject = find_subject(plan, name)
    module = subject.module
    alike = tuple(m for m in plan.modules if module and _kind(m, plan) == _kind(module, plan))
    if subject.tensor is None:
        return Explanation(subject, False, (), alike)
    matching = trace(plan.policy, plan.model, plan.target, subject.tensor)
    # The last rule that may touch it decides, as in resolve.
    last = max((at for at, (_, may) in enumerate(matching) if may), default=None)
    dropped = last is not None and matching[last][0].rule.treatment.action == "drop"
    decided = "decided" if module or dropped else "without effect"
    rules = tuple(
        _outcome(rule, decided if at == last else "lost" if may else "guarded")
        for at, (rule, may) in enumerate(matching)
    )
    found = Explanation(subject, is_guarded(subject.tensor), rules, alike)
    return _with_old_numbers(found, plan)


def find_subject(plan: Plan, name: str) -> Subject:
    """What the name means in the plan.

    Raises: PolicyError (unknown-tensor, many-tensors, bad-argument for an endless glob).
    """
    try:
        matches = full_match(Glob(name))
    except PatternError as error:
        raise fail("bad-argument", option="TENSOR", reason=str(error)) from None
    found = [subject for subject in _subjects(plan) if matches(subject.name)]
    # Many tensors with one decision are one answer, not an ambiguity.
    kinds: dict[tuple[str, ...], Subject] = {}
    for subject in found:
        kinds.setdefault(_kind(subject.module, plan) if subject.module else ("",), subject)
    if not found:
        raise _unknown(plan, name)
    if len(kinds) > 1:
        examples = "; ".join(_described(subject) for subject in list(kinds.values())[:4])
        raise fail("many-tensors", name=name, count=len(kinds), examples=examples)
    first = found[0]
    return replace(first, tensor=first.tensor or _tensor(plan, first))


def _with_old_numbers(found: Explanation, plan: Plan) -> Explanation:
    """The explanation with what its expert was called in the source, if experts were pruned."""
    tensor = found.subject.tensor
    if plan.pruning is None or tensor is None or found.expert is None:
        return found
    old = plan.old_experts(tensor.layer)[found.expert]
    return replace(found, kept_expert=old, namesake=_namesake(plan, found.subject))


def _namesake(plan: Plan, subject: Subject) -> Namesake | None:
    """The expert of the source whose tensor is called like one of the bundle's, if another."""
    name, tensor = subject.name, subject.tensor
    if tensor is None or name == tensor.source.name:
        return None
    for omission in plan.omitted:
        if name == omission.tensor.name and omission.expert is not None:
            return Namesake(omission.expert, None)
    for other in plan.model.tensors:
        if name == other.source.name and other.expert is not None:
            return Namesake(plan.old_experts(other.layer)[other.expert], other.expert)
    return None


def _subjects(plan: Plan) -> Iterator[Subject]:
    for module in plan.modules:
        for name in dict.fromkeys([module.name, *(tensor.name for tensor in module.tensors)]):
            yield Subject(name, module, None)
    # A kept tensor has the same name on both sides; it is one subject.
    own = {name for module in plan.modules for name in _output_names(module)}
    read = ((name, module) for module in plan.modules for name in _source_names(module))
    yield from (Subject(name, module, None) for name, module in read if name not in own)
    # Of a pruned expert, whose number another one may have now.
    lost = ((name, one) for one in plan.omitted for name in _omitted_names(one))
    yield from (Subject(name, None, None, one) for name, one in lost if name not in own)


def _omitted_names(omission: Omission) -> Iterator[str]:
    yield omission.tensor.name
    if omission.scale is not None:
        yield omission.scale.name


def _output_names(module: Module) -> Iterator[str]:
    yield module.name
    yield from (tensor.name for tensor in module.tensors)


def _source_names(module: Module) -> Iterator[str]:
    for rows in module.sources:
        yield rows.tensor.name
        if rows.scale is not None:
            yield rows.scale.name


def _tensor(plan: Plan, subject: Subject) -> ModelTensor | None:
    """The model's tensor behind a name: the one of that name, else the module's first."""
    module = subject.module
    wanted = {subject.name}
    if module is not None:
        own = [rows.tensor.name for rows in module.sources]
        scaled = [r.tensor.name for r in module.sources if r.scale and r.scale.name in wanted]
        # Scales are explained by the weight that they belong to.
        wanted = set(scaled) or wanted & set(own) or set(own[:1])
    role = module.role if module else None
    for tensor in plan.model.tensors:
        if tensor.source.name in wanted and role in (None, tensor.role):
            return tensor
    return None


def _kind(module: Module, plan: Plan) -> tuple[str, ...]:
    return module.role, treatment_of(module), plan.rule_text(module)


def _described(subject: Subject) -> str:
    if subject.module is None:
        return f"{subject.name} ({subject.omission.reason if subject.omission else ''})"
    return f"{subject.name} ({subject.module.role}, {treatment_of(subject.module)})"


def _outcome(rule: CompiledRule, outcome: str) -> RuleOutcome:
    span = rule.rule.span
    text = span.source.text[span.start : span.end] if span else ""
    return RuleOutcome(rule.origin, " ".join(text.split()), outcome, rule_place(rule.rule))


def _unknown(plan: Plan, name: str) -> Exception:
    known = list(dict.fromkeys(subject.name for subject in _subjects(plan)))
    close = _closest(name, known)
    suggestion = f'did you mean "{close}"?' if close else None
    if plan.model.tied and "lm_head" in name:
        suggestion = "the head is tied: it is the embedding"
    total = counted(len(plan.modules), "module")
    notes = [f"`policyc plan --tensors` lists the output tensors of all {total}"]
    return fail(
        "unknown-tensor", suggestion=suggestion, notes=notes, model=plan.model.id, name=name
    )


def _closest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like this one, with its numbers where such a tensor exists."""
    shapes: dict[str, str] = {}
    every = set(known)
    for each in known:
        shapes.setdefault(_NUMBER.sub("0", each), each)
    # Comparing shapes of names instead of 100,000 names keeps a typo's answer quick.
    shape = nearest(_NUMBER.sub("0", name), shapes)
    if shape is None:
        return None
    # The typo is seldom in the numbers, so those of the user are kept.
    numbers = iter(_NUMBER.findall(name))
    filled = _NUMBER.sub(lambda found: next(numbers, found[0]), shape)
    return filled if filled in every else shapes[shape]
