"""Parts of a selector that match nothing in a model, though the rest of it may match.

A name pattern, a regular expression or a number is written for one model: each must match
something. Roles, boundaries and families serve many models and may match nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.language.print_policy import print_selector
from policy_dsl.planning.matching import CompiledRule, nodes, span_of
from policy_dsl.planning.pattern_cures import Cure, PatternCures
from policy_dsl.planning.reach import Reach
from policy_dsl.policy import And, Except, Family, Glob, Layers, Name, Or, Regex, Selector
from policy_dsl.quantities import counted
from policy_dsl.roles.classify import Model, ModelTensor

# A list of names from another model has hundreds that are all wrong in the same way.
_MOST_SHOWN = 10
_MOST_CURED = 50
OPTIONAL = "write `optional` after the treatment if that is expected"


class _Candidate(NamedTuple):
    """A tensor that a part may mean; whether the rest of the selector lets it be touched."""

    tensor: ModelTensor
    is_open: bool


class SelectorParts:
    """The parts of rules' selectors against the tensors of one model.

    cure: what is offered where nothing better is known.
    """

    def __init__(self, model: Model, reach: Reach, *, cure: str | None = OPTIONAL) -> None:
        self._model = model
        self._reach = reach
        self._n_cured = 0
        self._cure = cure
        self.names = model.names
        self.family = model.architecture.family

    def unmatched(self, compiled: CompiledRule) -> list[Diagnostic]:
        """An error for each pattern that no name of the model matches, up to a number."""
        patterns = self._patterns(compiled)
        dead = [pattern for pattern in patterns if not self.names.matching(pattern)]
        found = [
            self._unmatched(compiled, pattern, excepted=patterns[pattern])
            for pattern in dead[:_MOST_SHOWN]
        ]
        if len(dead) > _MOST_SHOWN:
            more, example = len(dead) - _MOST_SHOWN, print_selector(dead[-1])
            note = f"{more:,} more patterns of this rule match nothing, such as {example}"
            found[-1] = replace(found[-1], notes=(*found[-1].notes, note))
        return found

    def taking_more(self, compiled: CompiledRule) -> list[Diagnostic]:
        """A warning for each pattern such as `layers.1*` that takes other numbers too."""
        found = []
        for pattern in self._patterns(compiled):
            more = self._cures.more_taken(pattern)
            if more is not None:
                numbers, narrower = more
                found.append(
                    diagnostic(
                        "pattern-takes-more",
                        span_of(compiled.rule, pattern),
                        suggestion=f"write {print_selector(narrower)}",
                        pattern=print_selector(pattern),
                        numbers=numbers,
                    )
                )
        return found

    def idle(self, compiled: CompiledRule) -> list[Diagnostic]:
        """An error for each part that matches only what the rest of the selector leaves out."""
        if compiled.rule.optional or compiled.inapplicable:
            return []
        search = _Search(compiled, self)
        found = search.idle(compiled.rule.selector, None, excepted=False)
        return [self._idle(compiled, part, candidates) for part, candidates in found]

    def candidates(
        self, compiled: CompiledRule, part: Selector, *, excepted: bool
    ) -> Iterator[_Candidate]:
        """What a part of a rule's selector may mean by itself."""
        tensors = self._reach.candidates(compiled, part)
        return (_Candidate(one, excepted or compiled.may_touch(one)) for one in tensors)

    @cached_property
    def _cures(self) -> PatternCures:
        return PatternCures(self._model)

    def _patterns(self, compiled: CompiledRule) -> dict[Glob | Regex, bool]:
        """The patterns of a rule that must match, and whether all it says is what to except."""
        if compiled.rule.optional or compiled.inapplicable:
            return {}
        found: dict[Glob | Regex, bool] = {}
        for pattern, excepted in _patterns(compiled.rule.selector, self.family):
            found[pattern] = excepted and found.get(pattern, True)
        return found

    def _unmatched(
        self, compiled: CompiledRule, pattern: Glob | Regex, *, excepted: bool
    ) -> Diagnostic:
        self._n_cured += 1
        suggestion, notes = Cure(None, ())
        # To look for what was meant takes a while for each.
        if self._n_cured <= _MOST_CURED:
            suggestion, notes = self._cures.cure(pattern, excepted=excepted)
        return diagnostic(
            "pattern-matches-nothing",
            span_of(compiled.rule, pattern),
            suggestion=suggestion or self._cure,
            notes=notes,
            pattern=print_selector(pattern),
            model=self._model.id,
        )

    def _idle(
        self, compiled: CompiledRule, part: Selector, candidates: Sequence[_Candidate]
    ) -> Diagnostic:
        matches = compiled.predicates[part]
        guarded = [one.tensor for one in candidates if matches(one.tensor)[0]]
        return diagnostic(
            "part-matches-nothing",
            span_of(compiled.rule, part),
            suggestion=self._cure,
            notes=guard_notes(guarded),
            part=print_selector(part),
            model=self._model.id,
        )


def guard_notes(guarded: Sequence[ModelTensor]) -> list[str]:
    """The note that a selector only covers tensors that it may not touch, if there are any."""
    if not guarded:
        return []
    example = guarded[0]
    covered = counted(len(guarded), "guarded tensor")
    return [
        f"it covers {covered} such as {example.source.name}; "
        f'only a rule that names "{example.role}" may touch them'
    ]


class _Search(NamedTuple):
    """Looks for parts that none of the tensors which are left to them reaches."""

    compiled: CompiledRule
    parts: SelectorParts

    def idle(
        self, node: Selector, left: Sequence[_Candidate] | None, *, excepted: bool
    ) -> Iterator[tuple[Selector, Sequence[_Candidate]]]:
        """Each such part, with what is left to it.

        left: what the parts around it allow, None for anything. excepted: whether it says what
        is not meant, so that it may be guarded.
        """
        if not _is_specific(node) or _is_foreign(node, self.parts.family):
            return
        if isinstance(node, Or):
            for part in node.parts:
                yield from self.idle(part, left, excepted=excepted)
        elif isinstance(node, Except):
            yield from self.idle(node.base, left, excepted=excepted)
            # What is excepted may be anywhere in the model.
            yield from self.idle(node.excluded, None, excepted=True)
        elif not any(self._reaches(node, one) for one in self._left(node, left, excepted)):
            yield node, list(self._left(node, left, excepted))
        elif isinstance(node, And):
            # What reaches all parts reaches each of them; of alternatives it may be but one.
            for part in node.parts:
                if not isinstance(part, Or | Except) or not _is_specific(part):
                    continue
                others = [other for other in node.parts if other is not part]
                allowed = self._narrowed(self._left(node, left, excepted), others)
                yield from self.idle(part, allowed, excepted=excepted)

    def _left(
        self, node: Selector, left: Sequence[_Candidate] | None, excepted: bool
    ) -> Iterable[_Candidate]:
        if left is not None:
            return left
        return self.parts.candidates(self.compiled, node, excepted=excepted)

    def _reaches(self, node: Selector, candidate: _Candidate) -> bool:
        matches, by_name = self.compiled.predicates[node](candidate.tensor)
        return matches and (by_name or candidate.is_open)

    def _narrowed(self, left: Iterable[_Candidate], parts: Sequence[Selector]) -> list[_Candidate]:
        for part in parts:
            predicate = self.compiled.predicates[part]
            asked = ((one, predicate(one.tensor)) for one in left)
            left = [
                _Candidate(one.tensor, one.is_open or by_name)
                for one, (matches, by_name) in asked
                if matches
            ]
        return list(left)


def _patterns(
    selector: Selector, family: str, *, excepted: bool = False
) -> Iterator[tuple[Glob | Regex, bool]]:
    """The name patterns of a selector but for those of other families; whether excepted."""
    if _is_foreign(selector, family):
        return
    if isinstance(selector, Glob | Regex):
        yield selector, excepted
    elif isinstance(selector, And | Or):
        for part in selector.parts:
            yield from _patterns(part, family, excepted=excepted)
    elif isinstance(selector, Except):
        yield from _patterns(selector.base, family, excepted=excepted)
        yield from _patterns(selector.excluded, family, excepted=True)


def _is_specific(selector: Selector) -> bool:
    """Whether it holds a name pattern or numbers, which are written for one model."""
    return any(
        isinstance(node, Glob | Regex | Layers) or (isinstance(node, Name) and node.experts)
        for node in nodes(selector)
    )


def _is_foreign(selector: Selector, family: str) -> bool:
    """Whether it is bound to other families, as in `"*.w1.weight" and family mixtral`."""
    if not isinstance(selector, And):
        return False
    for part in selector.parts:
        bound = part.parts if isinstance(part, Or) else (part,)
        names = [one.name for one in bound if isinstance(one, Family)]
        if len(names) == len(bound) and family not in names:
            return True
    return False
