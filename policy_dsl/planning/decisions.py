"""Which rule decides each tensor of a model: the last one that matches and may touch it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic, errors, fail
from policy_dsl.plan import OTHERWISE
from policy_dsl.planning.matching import CompiledRule, compile_rules, is_guarded, nodes
from policy_dsl.planning.reach import OPTIONAL, Reach, guard_notes
from policy_dsl.policy import Name, Policy
from policy_dsl.quantities import counted, first_few
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.treatments import KEEP, Written

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
