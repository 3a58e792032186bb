"""Why a tensor is treated as it is: the rule that decided, those that lost, and the bytes.

Plan x name ── find_subject ──> Subject ── explain ──> Explanation
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from policy_dsl.diagnostics import fail, nearest
from policy_dsl.plan import Module, Plan
from policy_dsl.planning.decisions import trace
from policy_dsl.planning.matching import CompiledRule, is_guarded
from policy_dsl.planning.outline import treatment_of
from policy_dsl.roles.model import ModelTensor
from policy_dsl.units import counted

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Subject:
    """What a name means: the module that holds it, or why nothing does.

    tensor: the model's tensor that is explained; None for a source tensor without a role, and
    for what no source has.
    """

    name: str
    module: Module | None
    tensor: ModelTensor | None
    left_out: str = ""


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """A rule that matches: `place` is file:line, `outcome` decided, lost, or guarded."""

    place: str
    text: str
    outcome: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that is known about one decision. alike: modules with the same decision."""

    subject: Subject
    guarded: bool
    rules: tuple[RuleOutcome, ...]
    alike: tuple[Module, ...]

    @property
    def expert(self) -> int | None:
        """The expert that the name means; None for the stack of all of them."""
        tensor, module = self.subject.tensor, self.subject.module
        # The stack is explained by its first expert.
        if tensor is None or (module and self.subject.name in set(_output_names(module))):
            return None
        return tensor.expert


def explain(plan: Plan, name: str) -> Explanation:
    """The explanation of a tensor by its source or output name, or a glob over both.

    Raises: PolicyError (unknown-tensor, many-tensors) if the name is none or several.
    """
    subject = find_subject(plan, name)
    module = subject.module
    alike = tuple(m for m in plan.modules if module and _kind(m) == _kind(module))
    if subject.tensor is None:
        return Explanation(subject, False, (), alike)
    matching = trace(plan.policy, plan.model, plan.target, subject.tensor)
    # The last rule that may touch it decides, as in resolve.
    last = max((at for at, (_, may) in enumerate(matching) if may), default=None)
    rules = tuple(
        _outcome(rule, "decided" if at == last else "lost" if may else "guarded")
        for at, (rule, may) in enumerate(matching)
    )
    return Explanation(subject, is_guarded(subject.tensor), rules, alike)


def find_subject(plan: Plan, name: str) -> Subject:
    """What the name means in the plan.

    Raises: PolicyError (unknown-tensor, many-tensors).
    """
    is_glob = bool(set(name) & set("*?["))
    matches = re.compile(fnmatch.translate(name) if is_glob else re.escape(name)).fullmatch
    found = [subject for subject in _subjects(plan) if matches(subject.name)]
    # Many tensors with one decision are one answer, not an ambiguity.
    kinds: dict[tuple[str, ...], Subject] = {}
    for subject in found:
        kinds.setdefault(_kind(subject.module) if subject.module else ("",), subject)
    if not found:
        raise _unknown(plan, name)
    if len(kinds) > 1:
        examples = "; ".join(_described(subject) for subject in list(kinds.values())[:4])
        raise fail("many-tensors", name=name, count=len(kinds), examples=examples)
    first = found[0]
    return Subject(
        first.name, first.module, first.tensor or _tensor(plan, first), first.left_out
    )


def _subjects(plan: Plan) -> Iterator[Subject]:
    for module in plan.modules:
        for name in dict.fromkeys([module.name, *(tensor.name for tensor in module.tensors)]):
            yield Subject(name, module, None)
    # A kept tensor has the same name on both sides; it is one subject.
    own = {name for module in plan.modules for name in _output_names(module)}
    for module in plan.modules:
        for name in _source_names(module):
            if name not in own:
                yield Subject(name, module, None)
    for omission in plan.omitted:
        yield Subject(omission.tensor.name, None, None, omission.reason)


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


def _kind(module: Module) -> tuple[str, ...]:
    return module.role, treatment_of(module), module.rule


def _described(subject: Subject) -> str:
    if subject.module is None:
        return f"{subject.name} ({subject.left_out})"
    return f"{subject.name} ({subject.module.role}, {treatment_of(subject.module)})"


def _outcome(rule: CompiledRule, outcome: str) -> RuleOutcome:
    span = rule.rule.span
    text = span.source.text[span.start : span.end] if span else ""
    return RuleOutcome(rule.origin, " ".join(text.split()), outcome)


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
