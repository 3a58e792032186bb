"""Which rule decides each tensor of a model: the last one that matches and may touch it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic, errors
from policy_dsl.planning.matching import CompiledRule, compile_rules, is_guarded, nodes
from policy_dsl.planning.selector_parts import OPTIONAL, SelectorParts, guard_notes
from policy_dsl.policy import Policy, Treatment
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.selectors import Name
from policy_dsl.units import counted

KEEP = Treatment("keep")
OTHERWISE = "defaults.otherwise"


class Decision(NamedTuple):
    """A tensor, the rule that decided (None: no rule reached it), the treatment as written."""

    tensor: ModelTensor
    rule: CompiledRule | None
    written: Treatment

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
    """A decision for every tensor of the model, and the findings about the rules."""
    rules = compile_rules(policy, model, target)
    otherwise = policy.defaults.otherwise or KEEP
    tally = _Tally(rules)
    winners = _winners(rules, model, tally)
    made = []
    for position, tensor in enumerate(model.tensors):
        winner = winners[position]
        if winner is None:
            made.append(Decision(tensor, None, KEEP if is_guarded(tensor) else otherwise))
        else:
            made.append(Decision(tensor, rules[winner], rules[winner].rule.treatment))
    return Decisions(tuple(made), tuple(_rule_findings(rules, tally, model)))


def _winners(
    rules: Sequence[CompiledRule], model: Model, tally: _Tally
) -> dict[int, int | None]:
    """Position of each tensor -> index of the rule that decides it."""
    # A big MoE model has 100,000 tensors and some hundred kinds of them: rules that do not
    # read names are asked once for each kind.
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for position, tensor in enumerate(model.tensors):
        groups[tensor.role, tensor.layer, tensor.is_matrix].append(position)
    by_name = [index for index, rule in enumerate(rules) if rule.reads_names]
    by_role = [index for index, rule in enumerate(rules) if not rule.reads_names]
    winners: dict[int, int | None] = {}
    for positions in groups.values():
        first = model.tensors[positions[0]]
        common = [i for i in by_role if rules[i].decides(first)]
        for position in positions:
            named = [i for i in by_name if rules[i].decides(model.tensors[position])]
            winners[position] = tally.count(common + named)
    return winners


def trace(
    policy: Policy, model: Model, target: str, tensor: ModelTensor
) -> list[tuple[CompiledRule, bool]]:
    """Every rule that matches the tensor, in order, and whether it may touch it."""
    compiled = compile_rules(policy, model, target)
    return [(rule, rule.decides(tensor)) for rule in compiled if rule.predicate(tensor)[0]]


class _Tally:
    """How many tensors each rule matched and won, and who won where it matched."""

    def __init__(self, rules: Sequence[CompiledRule]) -> None:
        self.matched: Counter[int] = Counter()
        self.won: Counter[int] = Counter()
        self.beaten_by: dict[int, set[int]] = defaultdict(set)

    def count(self, matching: list[int]) -> int | None:
        if not matching:
            return None
        winner = max(matching)
        self.won[winner] += 1
        for index in matching:
            self.matched[index] += 1
            if index != winner:
                self.beaten_by[index].add(winner)
        return winner


def _rule_findings(
    rules: Sequence[CompiledRule], tally: _Tally, model: Model
) -> list[Diagnostic]:
    found: list[Diagnostic] = []
    parts = SelectorParts(model)
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
            # With `extends`, the winners may stand in another file than the loser.
            winners = [rules[winner].origin for winner in sorted(tally.beaten_by[index])]
            found.append(
                diagnostic(
                    "shadowed-rule",
                    compiled.rule.span,
                    tensors=counted(tally.matched[index], "tensor"),
                    rules=", ".join(dict.fromkeys(winners)),
                )
            )
    return found


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
