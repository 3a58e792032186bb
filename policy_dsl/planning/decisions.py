"""Which rule decides each tensor of a model, the last that matches and may touch it; and why."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic, errors, fail, nearest
from policy_dsl.documents import RuleAt
from policy_dsl.linear_patterns import PatternError
from policy_dsl.plan import OTHERWISE, Module, Omission, Plan
from policy_dsl.planning.matching import is_guarded, nodes
from policy_dsl.planning.outline import treatment_of
from policy_dsl.planning.reach import OPTIONAL, Reach
from policy_dsl.policy import Glob, Name, Policy, Rule, rule_places
from policy_dsl.quantities import counted, first_few
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.roles.name_index import full_match
from policy_dsl.treatments import KEEP, Written
from policy_dsl.views import View

_NUMBER = re.compile(r"\d+")
_MOST_SHOWN = 20
# Of rules times layers, each of which a rule may be about.
MOST_RULES = 5_000_000


class Decision(NamedTuple):
    """A tensor, its treatment as written, and the rule that decided; None: no rule reached it.

    decided_by: which of the policy's rules it is. origin: `file:line`, or `defaults.otherwise`.
    """

    tensor: ModelTensor
    written: Written
    rule: Rule | None = None
    decided_by: int | None = None
    origin: str = OTHERWISE


class Decisions(NamedTuple):
    """One decision for every tensor, in the model's order, and what is wrong with the rules.

    reach: what their selectors mean, by the places of tensors in that order.
    """

    made: tuple[Decision, ...]
    findings: tuple[Diagnostic, ...]
    reach: Reach


def decide(policy: Policy, model: Model, target: str) -> Decisions:
    """A decision for every tensor of the model, and the findings about the rules.

    Raises: PolicyError (too-many-rules).
    """
    if len(policy.rules) * model.n_layers > MOST_RULES:
        most = MOST_RULES // model.n_layers
        raise fail("too-many-rules", rules=f"{len(policy.rules):,}", most=f"{most:,}")
    rules, origins = rules_for(policy, target), [text for text, _ in rule_places(policy.rules)]
    reach, otherwise = Reach(policy.rules, model), policy.defaults.otherwise or KEEP
    winners: dict[int, int] = {}
    # How many tensors each rule matches, and the rules that it lost all of these to.
    tallies: dict[int, tuple[int, set[int]]] = {}
    # The last rule that matches decides: it is the first to be asked.
    for index in reversed(rules):
        places = reach.decided(rules[index])
        won = places.difference(winners)
        winners |= dict.fromkeys(won, index)
        tallies[index] = len(places), {winners[place] for place in places if not won}
    made = []
    for place, tensor in enumerate(model.tensors):
        if place in winners:
            rule = rules[index := winners[place]]
            made.append(Decision(tensor, rule.treatment, rule, index, origins[index]))
        else:
            made.append(Decision(tensor, KEEP if is_guarded(tensor) else otherwise))
    findings: list[Diagnostic] = []
    for index, rule in rules.items():
        n_matched, winning = tallies[index]
        # With `extends`, the winners may be in another file than the loser.
        beaten_by = dict.fromkeys(map(origins.__getitem__, sorted(winning)))
        findings += _findings(rule, n_matched, beaten_by, reach)
    return Decisions(tuple(made), tuple(findings), reach)


def rules_for(policy: Policy, target: str) -> dict[int, Rule]:
    """The policy's rules for a target, by their places in the policy."""
    return {at: rule for at, rule in enumerate(policy.rules) if rule.target in (None, target)}


def trace(policy: Policy, model: Model, target: str, tensor: ModelTensor) -> list[tuple[int, bool]]:
    """Which rules of the policy match the tensor, in order, and whether each may touch it."""
    reach, rules = Reach(policy.rules, model), rules_for(policy, target)
    place = next(at for at, one in enumerate(model.tensors) if one is tensor)
    return [
        (index, place in reach.decided(rule))
        for index, rule in rules.items()
        if place in reach.meaning(rule.selector).matched
    ]


def _findings(
    rule: Rule, n_matched: int, beaten_by: Iterable[str], reach: Reach
) -> Iterator[Diagnostic]:
    """What is wrong with a rule. beaten_by: where the rules are that it lost all tensors to."""
    broken = [*reach.defects(rule), *reach.unmatched(rule)]
    yield from (*broken, *reach.taking_more(rule))
    # A broken selector has its own finding: that it matches nothing only follows from it.
    if errors(broken):
        return
    if n_matched:
        yield from reach.idle(rule)
    elif not reach.may_be_empty(rule):
        yield _matches_nothing(rule, reach)
    if beaten_by:
        tensors, shown = counted(n_matched, "tensor"), first_few(beaten_by, _MOST_SHOWN)
        yield diagnostic("shadowed-rule", rule.span, tensors=tensors, rules=shown)


def _matches_nothing(rule: Rule, reach: Reach) -> Diagnostic:
    names, model = [n.text for n in nodes(rule.selector) if isinstance(n, Name)], reach.model
    if model.tied and names == ["lm_head"]:
        return diagnostic("tied-lm-head", rule.selector_span)
    notes = reach.guard_notes(reach.meaning(rule.selector).matched)
    span = rule.selector_span or rule.span
    return diagnostic("matches-nothing", span, suggestion=OPTIONAL, notes=notes, model=model.id)


@dataclass(frozen=True, slots=True)
class Subject:
    """What a name means: the module that holds it, or why nothing does.

    tensor: the model's, that is explained; None without a role, or of a pruned expert. omission:
    of a tensor that is left out.
    """

    name: str
    module: Module | None
    tensor: ModelTensor | None = None
    omission: Omission | None = None


class Namesake(NamedTuple):
    """An expert of the source by its number there, and its new one; None if it is pruned."""

    source_expert: int
    expert: int | None


class RuleOutcome(NamedTuple):
    """A rule that matches. place: file:line; rule_at: the same, in parts.

    outcome: decided, lost, guarded, or without effect: the target leaves the tensor out.
    """

    place: str
    text: str
    outcome: str
    rule_at: RuleAt | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that is known about one decision. alike: modules with the same decision.

    expert: the one that the name means; None for the stack of all of them. source_expert: its
    number in the source, if some were pruned. namesake: another expert whose tensor has this
    name in the source, and what became of it.
    """

    subject: Subject
    guarded: bool
    rules: tuple[RuleOutcome, ...]
    alike: tuple[Module, ...]
    expert: int | None = None
    source_expert: int | None = None
    namesake: Namesake | None = None


def explain(plan: Plan, name: str) -> Explanation:
    """The explanation of a tensor by its source or output name, or a glob over both.

    Raises: PolicyError (unknown-tensor, many-tensors) if the name is none or several;
    bad-argument for a glob without end.
    """
    subject = _find_subject(plan, name)
    module, tensor, omission = subject.module, subject.tensor, subject.omission
    kind = _kind(module, plan)
    alike = tuple(other for other in plan.modules if module and _kind(other, plan) == kind)
    source_expert = omission.expert if omission else None
    if tensor is None:
        return Explanation(subject, False, (), alike, source_expert=source_expert)
    # The stack is explained by its first expert.
    named = module and len(module.sources) > 1 and subject.name in _output_names(module)
    expert, namesake = None if named else tensor.expert, None
    if plan.pruning is not None and expert is not None:
        kept = plan.old_experts(tensor.layer)[expert]
        source_expert = source_expert if omission else kept
        namesake = _namesake(plan, subject.name, tensor)
    rules = tuple(_outcomes(plan, tensor, is_left_out=module is None))
    guarded = is_guarded(tensor)
    return Explanation(subject, guarded, rules, alike, expert, source_expert, namesake)


def _outcomes(plan: Plan, tensor: ModelTensor, *, is_left_out: bool) -> Iterator[RuleOutcome]:
    matching = trace(plan.policy, plan.model, plan.target, tensor)
    # The last rule that may touch it decides, as in resolve.
    last = max((index for index, may in matching if may), default=None)
    for index, may in matching:
        rule, outcome = plan.policy.rules[index], "lost" if may else "guarded"
        if index == last:
            in_vain = is_left_out and rule.treatment.action != "drop"
            outcome = "without effect" if in_vain else "decided"
        text = rule.span.source.text[rule.span.start : rule.span.end] if rule.span else ""
        place, rule_at = plan.rule_places[index]
        yield RuleOutcome(place, " ".join(text.split()), outcome, rule_at)


def _find_subject(plan: Plan, name: str) -> Subject:
    """What the name means in the plan. Raises: PolicyError, as of `explain`."""
    try:
        matches = full_match(Glob(name))
    except PatternError as error:
        raise fail("bad-argument", option="TENSOR", reason=str(error)) from None
    subjects = list(_subjects(plan))
    found = [subject for subject in subjects if matches(subject.name)]
    if not found:
        raise _unknown(plan, name, [subject.name for subject in subjects])
    # Many tensors with one decision are one answer, not an ambiguity.
    kinds: dict[tuple[str, ...], Subject] = {}
    for subject in found:
        kinds.setdefault(_kind(subject.module, plan), subject)
    if len(kinds) > 1:
        examples = "; ".join([_described(subject) for subject in kinds.values()][:4])
        raise fail("many-tensors", name=name, count=len(kinds), examples=examples)
    return replace(found[0], tensor=_tensor(plan, found[0]))


def _subjects(plan: Plan) -> Iterator[Subject]:
    own = {name: module for module in plan.modules for name in _output_names(module)}
    yield from map(Subject, own, own.values())
    # A kept tensor has the same name on both sides; it is one subject.
    for module in plan.modules:
        read = (name for rows in module.sources for name in _source_names(rows))
        yield from (Subject(name, module) for name in read if name not in own)
    # Of a pruned expert, whose number another one may have now.
    lost = ((name, omission) for omission in plan.omitted for name in _source_names(omission))
    yield from (Subject(name, None, None, one) for name, one in lost if name not in own)


def _output_names(module: Module) -> list[str]:
    return [module.name, *(tensor.name for tensor in module.tensors)]


def _source_names(rows: View | Omission) -> list[str]:
    return [rows.tensor.name, *([rows.scale.name] if rows.scale else [])]


def _tensor(plan: Plan, subject: Subject) -> ModelTensor | None:
    """The model's tensor behind a name: the one of that name, else the module's first."""
    module, wanted = subject.module, {subject.name}
    if module is not None:
        own = [rows.tensor.name for rows in module.sources]
        # Scales are explained by the weight that they belong to.
        scaled = {r.tensor.name for r in module.sources if r.scale and r.scale.name in wanted}
        wanted = scaled or wanted & set(own) or set(own[:1])
    named = (one for one in plan.model.tensors if one.source.name in wanted)
    return next((one for one in named if module is None or one.role == module.role), None)


def _namesake(plan: Plan, name: str, tensor: ModelTensor) -> Namesake | None:
    """The expert of the source whose tensor is called like one of the bundle's, if another."""
    if name == tensor.source.name:
        return None
    for omission in plan.omitted:
        if name == omission.tensor.name and omission.expert is not None:
            return Namesake(omission.expert, None)
    for other in plan.model.tensors:
        if name == other.source.name and other.expert is not None:
            return Namesake(plan.old_experts(other.layer)[other.expert], other.expert)
    return None


def _kind(module: Module | None, plan: Plan) -> tuple[str, ...]:
    return (module.role, treatment_of(module), plan.rule_of(module)[0]) if module else ()


def _described(subject: Subject) -> str:
    module, omission = subject.module, subject.omission
    if module is None:
        return f"{subject.name} ({omission.reason if omission else ''})"
    return f"{subject.name} ({module.role}, {treatment_of(module)})"


def _unknown(plan: Plan, name: str, known: Sequence[str]) -> Exception:
    total, suggestion = counted(len(plan.modules), "module"), None
    notes = [f"`policyc plan --tensors` lists the output tensors of all {total}"]
    # Comparing shapes of names instead of 100,000 names keeps a typo's answer quick.
    shapes = {_NUMBER.sub("0", each): each for each in reversed(known)}
    if (shape := nearest(_NUMBER.sub("0", name), shapes)) is not None:
        # The typo is seldom in the numbers, so those of the user are kept.
        numbers = iter(_NUMBER.findall(name))
        filled = _NUMBER.sub(lambda found: next(numbers, found[0]), shape)
        suggestion = f'did you mean "{filled if filled in known else shapes[shape]}"?'
    if plan.model.tied and "lm_head" in name:
        suggestion = "the head is tied: it is the embedding"
    model = plan.model.id
    return fail("unknown-tensor", suggestion=suggestion, notes=notes, model=model, name=name)
