"""Which rule decides each tensor of a model: the last one that matches and may touch it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic, errors, fail
from policy_dsl.plan import OTHERWISE
from policy_dsl.planning.matching import CompiledRule, compile_rules, is_guarded, nodes
from policy_dsl.planning.reach import Reach
from policy_dsl.planning.selector_parts import OPTIONAL, SelectorParts, guard_notes
from policy_dsl.policy import Name, Policy
from policy_dsl.quantities import counted
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import KEEP, Written

_MOST_SHOWN = 20
# Roles that fit into a suggestion.
_MOST_NAMED = 3
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


def decide(policy: Policy, model: Model, target: str) -> Decisions:
    """A decision for every tensor of the model, and the findings about the rules.

    Raises: PolicyError (too-many-rules).
    """
    if len(policy.rules) * model.n_layers > MOST_RULES:
        most = MOST_RULES // model.n_layers
        raise fail("too-many-rules", rules=f"{len(policy.rules):,}", most=f"{most:,}")
    rules = compile_rules(policy, model, target)
    otherwise = policy.defaults.otherwise or KEEP
    reach = Reach(model)
    tally = _Tally(rules, reach)
    made = []
    for position, tensor in enumerate(model.tensors):
        winner = tally.winners.get(position)
        if winner is None:
            made.append(Decision(tensor, None, KEEP if is_guarded(tensor) else otherwise))
        else:
            made.append(Decision(tensor, rules[winner], rules[winner].rule.treatment))
    return Decisions(tuple(made), tuple(_rule_findings(rules, tally, model, reach)))


def trace(
    policy: Policy, model: Model, target: str, tensor: ModelTensor
) -> list[tuple[CompiledRule, bool]]:
    """Every rule that matches the tensor, in order, and whether it may touch it."""
    compiled = compile_rules(policy, model, target)
    return [(rule, rule.decides(tensor)) for rule in compiled if rule.predicate(tensor)[0]]


class _Tally:
    """Who wins each tensor, how many each rule matched and won, and to whom it lost."""

    def __init__(self, rules: Sequence[CompiledRule], reach: Reach) -> None:
        self.winners: dict[int, int] = {}
        self.matched: Counter[int] = Counter()
        self.won: Counter[int] = Counter()
        self.beaten_by: dict[int, set[int]] = {}
        decided: set[int] = set()
        # The last rule that matches decides: it is the first to be asked.
        for index in range(len(rules) - 1, -1, -1):
            places = reach.decided(rules[index])
            won = places - decided
            decided |= won
            self.winners.update(dict.fromkeys(won, index))
            self.matched[index], self.won[index] = len(places), len(won)
            # It matters only of rules that win nothing.
            if not won:
                self.beaten_by[index] = set(map(self.winners.__getitem__, places))


def _rule_findings(
    rules: Sequence[CompiledRule], tally: _Tally, model: Model, reach: Reach
) -> list[Diagnostic]:
    found: list[Diagnostic] = []
    parts = SelectorParts(model, reach)
    for index, compiled in enumerate(rules):
        broken = [*compiled.findings, *parts.unmatched(compiled)]
        found += [*broken, *parts.taking_more(compiled)]
        # A broken selector has its own finding: that it matches nothing only follows from it.
        if errors(broken):
            continue
        if not tally.matched[index]:
            optional = compiled.rule.optional or compiled.inapplicable
            found += [] if optional else [_matches_nothing(compiled, model)]
            continue
        found += parts.idle(compiled)
        if not tally.won[index]:
            # With `extends`, the winners may be in another file than the loser.
            winners = dict.fromkeys(rules[at].origin for at in sorted(tally.beaten_by[index]))
            found.append(
                diagnostic(
                    "shadowed-rule",
                    compiled.rule.span,
                    tensors=counted(tally.matched[index], "tensor"),
                    rules=_some(list(winners)),
                )
            )
    return found


def _some(origins: Sequence[str]) -> str:
    more = len(origins) - _MOST_SHOWN
    return ", ".join(origins[:_MOST_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _matches_nothing(compiled: CompiledRule, model: Model) -> Diagnostic:
    rule = compiled.rule
    names = [node.text for node in nodes(rule.selector) if isinstance(node, Name)]
    if model.tied and names == ["lm_head"]:
        return diagnostic("tied-lm-head", rule.selector_span)
    guarded = [tensor for tensor in model.tensors if compiled.predicate(tensor)[0]]
    return diagnostic(
        "matches-nothing",
        rule.selector_span or rule.span,
        suggestion=OPTIONAL,
        notes=guard_notes(guarded),
        model=model.id,
    )


class Unheld(NamedTuple):
    """What readers of a target have against tensors of some roles stored like that.

    cure: the treatment that they would take instead, empty if none is known.
    """

    target: str
    treatment: str
    reason: str
    cure: str

    def of(self, roles: Sequence[str]) -> Diagnostic:
        """The finding about tensors of these roles."""
        named = ", ".join(roles)
        cure = f'write "{named}: {self.cure}" after it'
        if len(roles) > _MOST_NAMED:
            cure = f'"{self.cure}" would do for them'
        return diagnostic(
            "unsupported-treatment",
            suggestion=cure if self.cure else None,
            target=self.target,
            roles=named,
            treatment=self.treatment,
            reason=self.reason,
        )


@dataclass
class _Defect:
    """A finding of several tensors of one rule, with the roles and names of all of them."""

    decision: Decision
    found: Diagnostic | Unheld
    roles: dict[str, None] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


class TensorDefects:
    """Findings about tensors, one a rule and defect, with a count and an example."""

    def __init__(self, policy: Policy) -> None:
        self._otherwise = dict(policy.key_spans).get("defaults.otherwise")
        self._seen: dict[tuple[int | None, Diagnostic | Unheld], _Defect] = {}

    def add(
        self,
        decision: Decision,
        found: Diagnostic | Unheld,
        *,
        what: str = "tensor",
        name: str = "",
    ) -> None:
        """Take what is wrong with a decision, or with the stack `name` that it begins."""
        # One finding for a rule, not one for each of its 15,000 experts.
        one = self._seen.setdefault((decision.decided_by, found), _Defect(decision, found))
        one.roles[decision.tensor.role] = None
        one.names.append(f"{what} {name or decision.tensor.source.name}")

    def findings(self) -> list[Diagnostic]:
        """One finding for each rule and defect, at the treatment that is to blame."""
        return [self._placed(one) for one in self._seen.values()]

    def _placed(self, one: _Defect) -> Diagnostic:
        decision, found, names = one.decision, one.found, one.names
        if isinstance(found, Unheld):
            found = found.of(list(one.roles))
        span = None if is_guarded(decision.tensor) else self._otherwise
        if decision.rule is not None:
            rule = decision.rule.rule
            # The selector was right if it got here: the caret belongs under the treatment.
            span = rule.treatment_span or rule.span
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return replace(found, span=span, notes=(*found.notes, f"{names[0]}{more}"))
