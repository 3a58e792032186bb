"""What of a model a selector may mean, so that a rule is asked of that alone.

A policy may have 10,000 rules, most for one layer or one name, and a model 100,000 tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain

from policy_dsl.diagnostics import fail
from policy_dsl.planning.matching import CompiledRule
from policy_dsl.policy import And, Except, Glob, Or, Regex, Selector
from policy_dsl.roles.classify import Model, ModelTensor

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
        found: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for at, one in enumerate(self._tensors):
            found[one.role, one.layer, one.is_matrix].append(at)
        return [*found.values()]

    @cached_property
    def _kind_of(self) -> Mapping[int, int]:
        return {places[0]: kind for kind, places in enumerate(self._kinds)}

    @cached_property
    def _by_mark(self) -> Mapping[str | int | None, Sequence[int]]:
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
