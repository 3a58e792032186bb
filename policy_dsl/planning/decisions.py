"""Which rule decides each tensor of a model, the last that matches and may touch it; and why."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic, errors, fail, nearest
from policy_dsl.documents import RuleAt
from policy_dsl.linear_patterns import PatternError
from policy_dsl.plan import OTHERWISE, Module, Omission, Plan
from policy_dsl.planning.matching import CompiledRule, compile_rules, is_guarded, nodes
from policy_dsl.planning.outline import treatment_of
from policy_dsl.planning.reach import OPTIONAL, Reach, guard_notes
from policy_dsl.policy import Glob, Name, Policy
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
    """A tensor, the rule that decided (None: no rule reached it), the treatment as written."""

    tensor: ModelTensor
    rule: CompiledRule | None
    written: Written

    @property
    def origin(self) -> str:
        """`file:line` of the rule, or `defaults.otherwise`."""
        return OTHERWISE if self.rule is None else self.rule.origin

    @property
    def decided_by(self) -> int | None:
        """Which of the policy's rules decided."""
        return None if self.rule is None else self.rule.index


class Decisions(NamedTuple):
    """One decision for every tensor, in the model's order, and what is wrong with the rules."""

    made: tuple[Decision, ...]
    findings: tuple[Diagnostic, ...]


class _Tally(NamedTuple):
    """How many tensors a rule matched and won; if it won none, the rules that it lost to."""

    matched: int
    won: int
    beaten_by: set[int]


def decide(policy: Policy, model: Model, target: str) -> Decisions:
    """A decision for every tensor of the model, and the findings about the rules.

    Raises: PolicyError (too-many-rules).
    """
    if len(policy.rules) * model.n_layers > MOST_RULES:
        most = MOST_RULES // model.n_layers
        raise fail("too-many-rules", rules=f"{len(policy.rules):,}", most=f"{most:,}")
    rules, reach = compile_rules(policy, model, target), Reach(model)
    winners, tallies = _contest(rules, reach)
    otherwise = policy.defaults.otherwise or KEEP
    made = []
    for place, tensor in enumerate(model.tensors):
        rule = rules[winners[place]] if place in winners else None
        unreached = KEEP if is_guarded(tensor) else otherwise
        made.append(Decision(tensor, rule, rule.rule.treatment if rule else unreached))
    findings = [
        finding
        for index, rule in enumerate(rules)
        for finding in _findings(rule, tallies[index], rules, reach)
    ]
    return Decisions(tuple(made), tuple(findings))


def _contest(
    rules: Sequence[CompiledRule], reach: Reach
) -> tuple[dict[int, int], dict[int, _Tally]]:
    """The rule that wins each place in the model that some rule reaches, and how rules did."""
    winners: dict[int, int] = {}
    tallies: dict[int, _Tally] = {}
    # The last rule that matches decides: it is the first to be asked.
    for index in reversed(range(len(rules))):
        places = reach.decided(rules[index])
        won = places.difference(winners)
        winners |= dict.fromkeys(won, index)
        beaten_by = set() if won else {winners[place] for place in places}
        tallies[index] = _Tally(len(places), len(won), beaten_by)
    return winners, tallies


def trace(
    policy: Policy, model: Model, target: str, tensor: ModelTensor
) -> list[tuple[CompiledRule, bool]]:
    """Every rule that matches the tensor, in order, and whether it may touch it."""
    compiled = compile_rules(policy, model, target)
    return [(rule, rule.decides(tensor)) for rule in compiled if rule.predicate(tensor)[0]]


def _findings(
    compiled: CompiledRule, tally: _Tally, rules: Sequence[CompiledRule], reach: Reach
) -> Iterator[Diagnostic]:
    broken = [*compiled.findings, *reach.unmatched(compiled)]
    yield from (*broken, *reach.taking_more(compiled))
    # A broken selector has its own finding: that it matches nothing only follows from it.
    if errors(broken):
        return
    if not tally.matched:
        if not (compiled.rule.optional or compiled.inapplicable):
            yield _matches_nothing(compiled, reach.model)
        return
    yield from reach.idle(compiled)
    if not tally.won:
        tensors = counted(tally.matched, "tensor")
        # With `extends`, the winners may be in another file than the loser.
        winners = dict.fromkeys(rules[index].origin for index in sorted(tally.beaten_by))
        shown, span = first_few(winners, _MOST_SHOWN), compiled.rule.span
        yield diagnostic("shadowed-rule", span, tensors=tensors, rules=shown)


def _matches_nothing(compiled: CompiledRule, model: Model) -> Diagnostic:
    rule = compiled.rule
    names = [node.text for node in nodes(rule.selector) if isinstance(node, Name)]
    if model.tied and names == ["lm_head"]:
        return diagnostic("tied-lm-head", rule.selector_span)
    notes = guard_notes([one for one in model.tensors if compiled.predicate(one)[0]])
    span = rule.selector_span or rule.span
    return diagnostic("matches-nothing", span, suggestion=OPTIONAL, notes=notes, model=model.id)


@dataclass(frozen=True, slots=True)
class Subject:
    """What a name means: the module that holds it, or why nothing does.

    tensor: the model's tensor that is explained; None for a source tensor without a role, for
    what no source has, and for a pruned expert's. omission: of a tensor that is left out.
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
    alike = tuple(_alike(module, plan)) if module else ()
    source_expert = omission.expert if omission else None
    if tensor is None:
        return Explanation(subject, False, (), alike, source_expert=source_expert)
    # The stack is explained by its first expert.
    stacked = module is not None and len(module.sources) > 1
    named = stacked and module is not None and subject.name in _output_names(module)
    expert, namesake = None if named else tensor.expert, None
    if plan.pruning is not None and expert is not None:
        kept = plan.old_experts(tensor.layer)[expert]
        source_expert, namesake = source_expert if omission else kept, _namesake(plan, subject)
    rules = tuple(_outcomes(plan, tensor, is_left_out=module is None))
    guarded = is_guarded(tensor)
    return Explanation(subject, guarded, rules, alike, expert, source_expert, namesake)


def _alike(module: Module, plan: Plan) -> Iterator[Module]:
    kind = _kind(module, plan)
    return (other for other in plan.modules if _kind(other, plan) == kind)


def _outcomes(plan: Plan, tensor: ModelTensor, *, is_left_out: bool) -> Iterator[RuleOutcome]:
    matching = trace(plan.policy, plan.model, plan.target, tensor)
    # The last rule that may touch it decides, as in resolve.
    last = max((at for at, (_, may) in enumerate(matching) if may), default=None)
    for at, (compiled, may) in enumerate(matching):
        rule, outcome = compiled.rule, "lost" if may else "guarded"
        if at == last:
            in_vain = is_left_out and rule.treatment.action != "drop"
            outcome = "without effect" if in_vain else "decided"
        text = rule.span.source.text[rule.span.start : rule.span.end] if rule.span else ""
        place, rule_at = plan.rule_places[compiled.index]
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
        raise _unknown(plan, name, subjects)
    # Many tensors with one decision are one answer, not an ambiguity.
    kinds: dict[tuple[str, ...], Subject] = {}
    for subject in found:
        kinds.setdefault(_kind(subject.module, plan), subject)
    if len(kinds) > 1:
        examples = "; ".join([_described(subject) for subject in kinds.values()][:4])
        raise fail("many-tensors", name=name, count=len(kinds), examples=examples)
    first = found[0]
    return replace(first, tensor=_tensor(plan, first))


def _subjects(plan: Plan) -> Iterator[Subject]:
    own = {name: module for module in plan.modules for name in _output_names(module)}
    yield from (Subject(name, module) for name, module in own.items())
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


def _kind(module: Module | None, plan: Plan) -> tuple[str, ...]:
    return (module.role, treatment_of(module), plan.rule_of(module)[0]) if module else ()


def _described(subject: Subject) -> str:
    module, omission = subject.module, subject.omission
    if module is None:
        return f"{subject.name} ({omission.reason if omission else ''})"
    return f"{subject.name} ({module.role}, {treatment_of(module)})"


def _unknown(plan: Plan, name: str, subjects: Sequence[Subject]) -> Exception:
    close = _closest(name, [subject.name for subject in subjects])
    suggestion = f'did you mean "{close}"?' if close else None
    if plan.model.tied and "lm_head" in name:
        suggestion = "the head is tied: it is the embedding"
    total = counted(len(plan.modules), "module")
    notes = [f"`policyc plan --tensors` lists the output tensors of all {total}"]
    model = plan.model.id
    return fail("unknown-tensor", suggestion=suggestion, notes=notes, model=model, name=name)


def _closest(name: str, known: Sequence[str]) -> str | None:
    """The known name most like this one, with its numbers where such a tensor exists."""
    # Comparing shapes of names instead of 100,000 names keeps a typo's answer quick.
    shapes = {_NUMBER.sub("0", each): each for each in reversed(known)}
    shape = nearest(_NUMBER.sub("0", name), shapes)
    if shape is None:
        return None
    # The typo is seldom in the numbers, so those of the user are kept.
    numbers = iter(_NUMBER.findall(name))
    filled = _NUMBER.sub(lambda found: next(numbers, found[0]), shape)
    return filled if filled in known else shapes[shape]
