"""Which rule decides each tensor of a model: the last one that matches and may touch it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic, errors, fail
from policy_dsl.plan import OTHERWISE
from policy_dsl.planning.matching import CompiledRule, compile_rules, is_guarded, nodes
from policy_dsl.planning.selector_parts import OPTIONAL, SelectorParts, guard_notes
from policy_dsl.policy import Policy
from policy_dsl.quantities import counted
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.selectors import And, Except, Glob, Name, Or, Regex, Selector
from policy_dsl.treatments import KEEP, Written

# How many places are kept for what comes again; each takes some 60 bytes.
_MOST_KEPT = 4_000_000
# How many tensors rules that read names may be asked about; a million take two seconds.
_MOST_ASKED = 3_000_000


class Reach:
    """The tensors of one model by their kinds, which are role and layer, and by their names.

    A rule that does not read names means all tensors of a kind, or none.
    """

    def __init__(self, model: Model) -> None:
        self._tensors = model.tensors
        self._names = model.names
        self._kept: dict[tuple[Selector, bool], frozenset[int]] = {}
        self._n_kept = self._n_asked = 0
        self._by_leaf: dict[Selector, frozenset[int]] = {}

    def decided(self, rule: CompiledRule) -> frozenset[int]:
        """The places in the model of all tensors that a rule matches and may touch."""
        key = rule.rule.selector, rule.rule.treatment.action == "drop"
        known = self._kept.get(key)
        if known is None:
            known = frozenset(self._where(rule, rule.decides))
            if self._has_room(known):
                self._kept[key] = known
        return known

    def candidates(self, rule: CompiledRule, part: Selector) -> Iterator[ModelTensor]:
        """All tensors that a part of a rule can mean, and others; one of each kind will do.

        For a rule that reads names, all of each kind.
        """
        return (self._tensors[at] for at in self._places(rule, part))

    def _has_room(self, places: frozenset[int]) -> bool:
        """Whether these may be kept too; then they count."""
        if self._n_kept + len(places) > _MOST_KEPT:
            return False
        self._n_kept += len(places)
        return True

    def matched(self, rule: CompiledRule) -> Iterator[ModelTensor]:
        """All tensors that a rule matches, also those that it may not touch."""
        found = self._where(rule, lambda tensor: rule.predicate(tensor)[0])
        return (self._tensors[at] for at in found)

    def _where(self, rule: CompiledRule, holds: Callable[[ModelTensor], bool]) -> Iterator[int]:
        for at in self._places(rule, rule.rule.selector):
            if holds(self._tensors[at]):
                yield from (at,) if rule.reads_names else self._kinds[self._kind_of[at]]

    def _places(self, rule: CompiledRule, part: Selector) -> Iterable[int]:
        """The places of tensors to ask a rule about, in the model's order.

        Raises: PolicyError (too-much-to-match).
        """
        kinds = _narrowest(part, partial(self._kinds_of, rule))
        among = range(len(self._kinds)) if kinds is None else sorted(kinds)
        if not rule.reads_names:
            return (self._kinds[kind][0] for kind in among)
        named = _narrowest(part, self._named)
        every = chain.from_iterable(self._kinds[kind] for kind in among)
        places = sorted(every if named is None else named)
        self._n_asked += len(places)
        if self._n_asked > _MOST_ASKED:
            raise fail("too-much-to-match", names=f"{len(self._by_name):,}")
        return places

    def _kinds_of(self, rule: CompiledRule, leaf: Selector) -> frozenset[int] | None:
        marks = rule.marks.get(leaf)
        if marks is None:
            return None
        known = self._by_leaf.get(leaf)
        if known is None:
            found = (self._by_mark[mark] for mark in marks if mark in self._by_mark)
            known = frozenset(chain.from_iterable(found))
            if self._has_room(known):
                self._by_leaf[leaf] = known
        return known

    def _named(self, leaf: Selector) -> frozenset[int] | None:
        if not isinstance(leaf, Glob | Regex):
            return None
        found = map(self._by_name.__getitem__, self._names.matching(leaf))
        return frozenset(chain.from_iterable(found))

    @cached_property
    def _kinds(self) -> Sequence[Sequence[int]]:
        """The places of the tensors of each kind."""
        found: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for at, one in enumerate(self._tensors):
            found[one.role, one.layer, one.is_matrix].append(at)
        return [*found.values()]

    @cached_property
    def _kind_of(self) -> Mapping[int, int]:
        """The kind of the first tensor of each."""
        return {places[0]: kind for kind, places in enumerate(self._kinds)}

    @cached_property
    def _by_mark(self) -> Mapping[str | int | None, Sequence[int]]:
        """The kinds of each role and of each layer."""
        found: dict[str | int | None, list[int]] = defaultdict(list)
        for at, kind in self._kind_of.items():
            found[self._tensors[at].role].append(kind)
            found[self._tensors[at].layer].append(kind)
        return found

    @cached_property
    def _by_name(self) -> Mapping[str, Sequence[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for at, tensor in enumerate(self._tensors):
            found[tensor.source.name].append(at)
        return found


def _narrowest(
    node: Selector, of_leaf: Callable[[Selector], frozenset[int] | None]
) -> frozenset[int] | None:
    """What holds all that a selector means, by what its leaves do; None for everything."""
    match node:
        case Except():
            return _narrowest(node.base, of_leaf)
        case And():
            found = (_narrowest(part, of_leaf) for part in node.parts)
            limits = [one for one in found if one is not None]
            return frozenset.intersection(*limits) if limits else None
        case Or():
            held: set[int] = set()
            for part in node.parts:
                more = _narrowest(part, of_leaf)
                if more is None:
                    return None
                held |= more
            return frozenset(held)
    return of_leaf(node)


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
            # With `extends`, the winners may stand in another file than the loser.
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
