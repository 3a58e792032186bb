"""What of a model rules mean, and the parts of their selectors that match nothing in it.

A policy may have 10,000 rules, most for one layer or one name, and a model 100,000 tensors: a
rule is asked of those alone that it may mean. A name pattern or a number in a selector is
written for one model, so each must match something. Roles, boundaries and families serve many
models and may match nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic, fail
from policy_dsl.language.print_policy import print_selector
from policy_dsl.planning.matching import CompiledRule, Predicate, nodes, span_of, walk
from policy_dsl.planning.pattern_cures import Cure, PatternCures
from policy_dsl.policy import And, Except, Family, Glob, Layers, Name, Or, Regex, Selector
from policy_dsl.quantities import counted
from policy_dsl.roles.model import Model, ModelTensor

# How many places are kept for what comes again; each takes some 60 bytes.
_MOST_KEPT = 4_000_000
# How many tensors rules that read names may be asked about; a million take two seconds.
_MOST_ASKED = 3_000_000
# A list of names from another model has hundreds that are all wrong in the same way.
_MOST_SHOWN = 10
_MOST_CURED = 50
OPTIONAL = "write `optional` after the treatment if that is expected"


class _Candidate(NamedTuple):
    """A tensor that a part may mean; whether the rest of the selector lets it be touched."""

    tensor: ModelTensor
    is_open: bool


# What the parts around a part of a selector allow; None for anything.
_Left = Sequence[_Candidate] | None


class Reach:
    """The tensors of one model by their kinds, which are role and layer, and by their names.

    A rule that does not read names means all tensors of a kind, or none. cure: what is offered
    against parts of selectors that match nothing, where nothing better is known.
    """

    def __init__(self, model: Model, *, cure: str | None = OPTIONAL) -> None:
        self.model = model
        self._cure = cure
        self._n_cured = 0
        self._tensors = model.tensors
        self._kept: dict[object, frozenset[int]] = {}
        self._n_kept = self._n_asked = 0
        kinds: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for at, one in enumerate(self._tensors):
            kinds[one.role, one.layer, one.is_matrix].append(at)
        # By the first place of each.
        self._kinds = {places[0]: places for places in kinds.values()}

    def decided(self, rule: CompiledRule) -> frozenset[int]:
        """The places in the model of all tensors that a rule matches and may touch."""
        key = rule.rule.selector, rule.rule.treatment.action == "drop"
        return self._once(key, lambda: self._where(rule, rule.decides))

    def matched(self, rule: CompiledRule) -> Iterator[ModelTensor]:
        """All tensors that a rule matches, also those that it may not touch."""
        found = self._where(rule, lambda tensor: rule.predicate(tensor)[0])
        return (self._tensors[at] for at in found)

    def _once(self, key: object, made: Callable[[], Iterable[int]]) -> frozenset[int]:
        known = self._kept.get(key)
        if known is None:
            known = frozenset(made())
            if self._n_kept + len(known) <= _MOST_KEPT:
                self._n_kept += len(known)
                self._kept[key] = known
        return known

    def _where(self, rule: CompiledRule, holds: Callable[[ModelTensor], bool]) -> Iterator[int]:
        for at in self._places(rule, rule.rule.selector):
            if holds(self._tensors[at]):
                yield from (at,) if rule.reads_names else self._kinds[at]

    def _places(self, rule: CompiledRule, part: Selector) -> Iterable[int]:
        """The places of tensors to ask a rule about, in the model's order.

        Raises: PolicyError (too-much-to-match).
        """
        found = _narrowest(part, partial(self._of_mark, rule))
        kinds = list(self._kinds) if found is None else sorted(found)
        if not rule.reads_names:
            return kinds
        named = _narrowest(part, self._named)
        every = chain.from_iterable(map(self._kinds.__getitem__, kinds))
        places = sorted(every if named is None else named)
        self._n_asked += len(places)
        if self._n_asked > _MOST_ASKED:
            raise fail("too-much-to-match", names=f"{len(self._by_name):,}")
        return places

    def _of_mark(self, rule: CompiledRule, leaf: Selector) -> frozenset[int] | None:
        marks = rule.marks.get(leaf)
        if marks is None:
            return None
        found = (self._by_mark[mark] for mark in marks if mark in self._by_mark)
        return self._once(leaf, lambda: chain.from_iterable(found))

    def _named(self, leaf: Selector) -> frozenset[int] | None:
        if not isinstance(leaf, Glob | Regex):
            return None
        found = map(self._by_name.__getitem__, self.model.names.matching(leaf))
        return frozenset(chain.from_iterable(found))

    @cached_property
    def _by_mark(self) -> Mapping[str | int | None, Sequence[int]]:
        found: dict[str | int | None, list[int]] = defaultdict(list)
        for at in self._kinds:
            found[self._tensors[at].role].append(at)
            found[self._tensors[at].layer].append(at)
        return found

    @cached_property
    def _by_name(self) -> Mapping[str, Sequence[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for at, tensor in enumerate(self._tensors):
            found[tensor.source.name].append(at)
        return found

    def unmatched(self, compiled: CompiledRule) -> list[Diagnostic]:
        """An error for each pattern that no name of the model matches, up to a number."""
        patterns = self._patterns(compiled)
        dead = [pattern for pattern in patterns if not self.model.names.matching(pattern)]
        found = []
        for pattern in dead[:_MOST_SHOWN]:
            self._n_cured += 1
            cure = Cure(None, ())
            # To look for what was meant takes a while for each.
            if self._n_cured <= _MOST_CURED:
                cure = self._cures.cure(pattern, excepted=patterns[pattern])
            found.append(self._without_match("pattern-matches-nothing", compiled, pattern, cure))
        if len(dead) > _MOST_SHOWN:
            more, example = len(dead) - _MOST_SHOWN, print_selector(dead[-1])
            note = f"{more:,} more patterns of this rule match nothing, such as {example}"
            found[-1] = replace(found[-1], notes=(*found[-1].notes, note))
        return found

    def taking_more(self, compiled: CompiledRule) -> Iterator[Diagnostic]:
        """A warning for each pattern such as `layers.1*` that takes other numbers too."""
        for pattern in self._patterns(compiled):
            if (more := self._cures.more_taken(pattern)) is not None:
                numbers, narrower = more
                yield diagnostic(
                    "pattern-takes-more",
                    span_of(compiled.rule, pattern),
                    suggestion=f"write {print_selector(narrower)}",
                    pattern=print_selector(pattern),
                    numbers=numbers,
                )

    def idle(self, compiled: CompiledRule) -> Iterator[Diagnostic]:
        """An error for each part that matches only what the rest of the selector leaves out."""
        if compiled.rule.optional or compiled.inapplicable:
            return
        for part, left in self._idle(compiled, compiled.rule.selector, None, False):
            matches = compiled.predicates[part]
            notes = guard_notes([one.tensor for one in left if matches(one.tensor)[0]])
            yield self._without_match("part-matches-nothing", compiled, part, Cure(None, notes))

    def _without_match(
        self, code: str, compiled: CompiledRule, node: Selector, cure: Cure
    ) -> Diagnostic:
        facts: dict[str, Any] = {
            code.partition("-")[0]: print_selector(node),
            "model": self.model.id,
        }
        span = span_of(compiled.rule, node)
        suggestion = cure.suggestion or self._cure
        return diagnostic(code, span, suggestion=suggestion, notes=cure.notes, **facts)

    @cached_property
    def _cures(self) -> PatternCures:
        return PatternCures(self.model)

    def _patterns(self, compiled: CompiledRule) -> dict[Glob | Regex, bool]:
        """The patterns of a rule that must match, and whether all it says is what to except."""
        found: dict[Glob | Regex, bool] = {}
        if compiled.rule.optional or compiled.inapplicable:
            return found
        for leaf, excepted in walk(compiled.rule.selector, self._is_foreign):
            if isinstance(leaf, Glob | Regex):
                found[leaf] = excepted and found.get(leaf, True)
        return found

    def _idle(
        self, compiled: CompiledRule, node: Selector, left: _Left, excepted: bool
    ) -> Iterator[tuple[Selector, Sequence[_Candidate]]]:
        """Each part that nothing of what is left to it reaches, and that.

        left: what the parts around it allow, None for anything. excepted: whether it says what
        is not meant, so that it may be guarded.
        """
        if not _is_specific(node) or self._is_foreign(node):
            return
        parts = [(part, left, excepted) for part in node.parts] if isinstance(node, Or) else []
        if isinstance(node, Except):
            # What is excepted may be anywhere in the model.
            parts = [(node.base, left, excepted), (node.excluded, None, True)]
        elif not isinstance(node, Or):
            allowed = partial(self._allowed, compiled, node, left, excepted)
            if not any(one.is_open for one in _narrowed(allowed(), [compiled.predicates[node]])):
                yield node, list(allowed())
            elif isinstance(node, And):
                rest = _left_to_parts(compiled, node, allowed)
                parts = [(part, others, excepted) for part, others in rest]
        for part, among, is_excepted in parts:
            yield from self._idle(compiled, part, among, is_excepted)

    def _allowed(
        self, compiled: CompiledRule, node: Selector, left: _Left, excepted: bool
    ) -> Iterable[_Candidate]:
        if left is not None:
            return left
        # Of each kind one will do; for a rule that reads names, all of it.
        tensors = (self._tensors[at] for at in self._places(compiled, node))
        return (_Candidate(one, excepted or compiled.may_touch(one)) for one in tensors)

    def _is_foreign(self, selector: Selector) -> bool:
        """Whether it is bound to other families, as in `"*.w1.weight" and family mixtral`."""
        for part in selector.parts if isinstance(selector, And) else ():
            bound = part.parts if isinstance(part, Or) else (part,)
            names = [one.name for one in bound if isinstance(one, Family)]
            if len(names) == len(bound) and self.model.architecture.family not in names:
                return True
        return False


def _narrowest(
    node: Selector, of_leaf: Callable[[Selector], frozenset[int] | None]
) -> frozenset[int] | None:
    """What holds all that a selector means, by what its leaves do; None for everything."""
    if isinstance(node, Except):
        return _narrowest(node.base, of_leaf)
    if not isinstance(node, And | Or):
        return of_leaf(node)
    found = [_narrowest(part, of_leaf) for part in node.parts]
    limits = [one for one in found if one is not None]
    if isinstance(node, And):
        return frozenset.intersection(*limits) if limits else None
    return frozenset[int]().union(*limits) if len(limits) == len(found) else None


def guard_notes(guarded: Sequence[ModelTensor]) -> tuple[str, ...]:
    """The note that a selector only covers tensors that it may not touch, if there are any."""
    if not guarded:
        return ()
    example, covered = guarded[0], counted(len(guarded), "guarded tensor")
    may = f'only a rule that names "{example.role}" may touch them'
    return (f"it covers {covered} such as {example.source.name}; {may}",)


def _narrowed(
    candidates: Iterable[_Candidate], predicates: Sequence[Predicate]
) -> Iterator[_Candidate]:
    """The candidates that all these match; open are also those that one of them names."""
    for tensor, is_open in candidates:
        outcomes = [predicate(tensor) for predicate in predicates]
        if all(matches for matches, _ in outcomes):
            yield _Candidate(tensor, is_open or any(by_name for _, by_name in outcomes))


def _left_to_parts(
    compiled: CompiledRule, node: And, allowed: Callable[[], Iterable[_Candidate]]
) -> Iterator[tuple[Selector, list[_Candidate]]]:
    """The parts of an intersection that may have idle parts, each with what the others allow."""
    # What reaches all parts reaches each of them; of alternatives it may be but one.
    for part in node.parts:
        if isinstance(part, Or | Except) and _is_specific(part):
            others = [compiled.predicates[one] for one in node.parts if one is not part]
            yield part, list(_narrowed(allowed(), others))


def _is_specific(selector: Selector) -> bool:
    """Whether it holds a name pattern or numbers, which are written for one model."""
    return any(
        isinstance(node, Glob | Regex | Layers) or (isinstance(node, Name) and node.experts)
        for node in nodes(selector)
    )
