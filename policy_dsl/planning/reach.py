"""What selectors mean in one model, as sets of its tensors' places, and which parts match nothing.

A name pattern or a number is written for one model, so each must match something. Roles,
boundaries and families serve many models and may match nothing.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, NamedTuple

from policy_dsl import policy as selectors
from policy_dsl.diagnostics import Diagnostic, diagnostic, fail
from policy_dsl.language.print_policy import print_selector
from policy_dsl.language.statements import layers_where
from policy_dsl.planning import matching
from policy_dsl.planning.matching import nodes, span_of, walk
from policy_dsl.planning.pattern_cures import Cure, PatternCures
from policy_dsl.policy import And, Except, Family, Glob, Layers, Name, Or, Regex, Rule, Selector
from policy_dsl.quantities import counted
from policy_dsl.roles.model import Model

# How many places are kept for what comes again; each takes some 60 bytes.
_MOST_KEPT = 4_000_000
# How many tensors patterns and numbers of experts may lead to, in all.
_MOST_NAMED = 3_000_000
# A list of names from another model has hundreds that are all wrong in the same way.
_MOST_SHOWN = 10
_MOST_CURED = 50
OPTIONAL = "write `optional` after the treatment if that is expected"
_NONE: frozenset[int] = frozenset()
_JOINED = And | Or | Except
_layers_where = cache(layers_where)


class Meaning(NamedTuple):
    """Places in a model: of the tensors that a selector matches, and that it names, of these."""

    matched: frozenset[int]
    named: frozenset[int] = _NONE


def _met(parts: Sequence[Meaning]) -> Meaning:
    """What all of them match. `router in layers 0-1` names the router, though layers do not."""
    matched = frozenset.intersection(*[part.matched for part in parts])
    return Meaning(matched, matched.intersection(_NONE.union(*[part.named for part in parts])))


class Reach:
    """What the selectors of some rules mean in one model.

    cure: what is offered against parts that match nothing, where nothing better is known.
    """

    def __init__(self, rules: Iterable[Rule], model: Model, *, cure: str | None = OPTIONAL) -> None:
        self.model = model
        self._rules = rules
        self._everything = frozenset(range(len(model.tensors)))
        self._cure = cure
        self._n_cured = self._n_kept = self._n_named = 0
        self._known: dict[Selector, Meaning] = {}
        self._by_role: dict[str, list[int]] = defaultdict(list)
        self._by_layer: dict[int | None, list[int]] = defaultdict(list)
        for at, tensor in enumerate(model.tensors):
            for role in tensor.roles:
                self._by_role[role].append(at)
            self._by_layer[tensor.layer].append(at)

    def decided(self, rule: Rule) -> frozenset[int]:
        """The places in the model of all tensors that a rule matches and may touch."""
        # The guard comes last, so that a rule that only covers a router can say so.
        matched, named = self.meaning(rule.selector)
        return matched - (self._guarded_from(rule) - named)

    def _guarded_from(self, rule: Rule) -> frozenset[int]:
        """What the rule may only touch if it names it."""
        guarded, inside = self._guarded
        return inside if rule.treatment.action == "drop" else guarded

    @cached_property
    def _guarded(self) -> tuple[frozenset[int], frozenset[int]]:
        """What only a rule that names it may touch; what only such a rule may drop."""
        tensors, outside = enumerate(self.model.tensors), selectors.OUTSIDE_LANGUAGE_MODEL
        guarded = {at: one for at, one in tensors if matching.is_guarded(one)}
        # The norms and routers of a tower or block are of no use without its matrices.
        inside = [at for at, one in guarded.items() if one.component not in outside]
        return frozenset(guarded), frozenset(inside)

    def meaning(self, node: Selector) -> Meaning:
        """What a selector, or a part of one, means. Raises: PolicyError (too-much-to-match)."""
        known = self._known.get(node)
        if known is None:
            known = self._joined(node) if isinstance(node, _JOINED) else self._of_leaf(node)
            if self._n_kept + len(known.matched) <= _MOST_KEPT:
                self._n_kept += len(known.matched)
                self._known[node] = known
        return known

    def _joined(self, node: And | Or | Except) -> Meaning:
        if isinstance(node, Except):
            base, excluded = self.meaning(node.base), self.meaning(node.excluded).matched
            return Meaning(base.matched - excluded, base.named - excluded)
        parts = [self.meaning(part) for part in node.parts]
        if isinstance(node, And):
            return _met(parts)
        matched, named = (_NONE.union(*sets) for sets in zip(*parts, strict=True))
        return Meaning(matched, named)

    def _of_leaf(self, node: Selector) -> Meaning:
        matched, named = _NONE, _NONE
        match node:
            case Name():
                return self._name(node)
            case Glob() | Regex():
                names = self.model.names.matching(node)
                matched = self._counted(map(self._by_name.__getitem__, names))
                named = matched if matching.is_spelled(node) else _NONE
            case selectors.All():
                tensors = enumerate(self.model.tensors)
                matched = frozenset(at for at, tensor in tensors if tensor.is_matrix)
            case Family():
                is_own = node.name == self.model.architecture.family
                matched = self._everything if is_own else _NONE
            case _:
                matched = _NONE.union(*map(self._by_layer.__getitem__, self._layers(node)))
        return Meaning(matched, named)

    def _name(self, node: Name) -> Meaning:
        roles, by_role = matching.roles_of(node.text, self.model.architecture), self._by_role
        if node.experts:
            # `experts[0-3]` picks by number, which names no role.
            experts = matching.numbers(node.experts, self.model.n_experts)
            by_expert = self._by_expert
            places = [by_expert.get((role, n), []) for role in roles for n in experts]
            return Meaning(self._counted(places, each=4))
        named = [by_role[role] for role, is_named in roles.items() if is_named]
        return Meaning(_NONE.union(*map(by_role.__getitem__, roles)), _NONE.union(*named))

    def _counted(self, places: Iterable[Iterable[int]], each: int = 1) -> frozenset[int]:
        """All of the places; so many of `each` take as long as one that is found by its name."""
        found = _NONE.union(*places)
        self._n_named += len(found) // each
        if self._n_named > _MOST_NAMED:
            raise fail("too-much-to-match", names=f"{len(self._by_name):,}")
        return found

    @cached_property
    def _by_expert(self) -> dict[tuple[str, int | None], list[int]]:
        found: dict[tuple[str, int | None], list[int]] = defaultdict(list)
        for at, tensor in enumerate(self.model.tensors):
            for role in tensor.roles:
                found[role, tensor.expert].append(at)
        return found

    @cached_property
    def _by_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = defaultdict(list)
        for at, tensor in enumerate(self.model.tensors):
            found[tensor.source.name].append(at)
        return found

    def _layers(self, node: Selector) -> frozenset[int]:
        n_layers = self.model.n_layers
        match node:
            case Layers():
                return matching.numbers(node.ranges, n_layers)
            case selectors.LayersWhere():
                return _layers_where(node.expression, n_layers)
            case selectors.Boundary():
                return matching.boundary_layers(node.count, n_layers)
        # Two different boundaries would leave open which of them `middle` complements.
        boundaries = self._boundaries if len(self._boundaries) == 1 else ()
        return frozenset(range(n_layers)).difference(*boundaries)

    @cached_property
    def _boundaries(self) -> frozenset[frozenset[int]]:
        every = [node for rule in self._rules for node in nodes(rule.selector)]
        # Of layers by number, those that the author calls a boundary.
        return frozenset(
            self._layers(node)
            for node in every
            if isinstance(node, selectors.Boundary) or (isinstance(node, Layers) and node.boundary)
        )

    def may_be_empty(self, rule: Rule) -> bool:
        """Whether a rule is right to match nothing, as `router and family mixtral` is here."""
        own = self.model.architecture.family
        bound = [node.name for node in nodes(rule.selector) if isinstance(node, Family)]
        return rule.optional or (bool(bound) and own not in bound)

    def defects(self, rule: Rule) -> list[Diagnostic]:
        """What is wrong with the names, families and numbers of a rule's selector."""
        found = {
            replace(defect, span=span_of(rule, node)): None
            for node in nodes(rule.selector)
            for defect in self._defects(node, optional=rule.optional)
        }
        return list(found)

    def _defects(self, node: Selector, *, optional: bool) -> Iterator[Diagnostic]:
        model = self.model
        defect: Diagnostic | None = None
        match node:
            case Name():
                table = model.architecture
                defect = matching.name_defect(node.text, table, optional=optional)
                if not defect:
                    yield from matching.outside_model(node.experts, model.n_experts, "expert")
            case Family():
                defect = matching.family_defect(node.name)
            case Layers():
                yield from matching.outside_model(node.ranges, model.n_layers, "layer")
                if node.boundary and not matching.is_boundary(self._layers(node), model.n_layers):
                    defect = diagnostic("not-the-boundary", n_layers=model.n_layers)
            case selectors.Middle() if len(self._boundaries) != 1:
                defect = diagnostic("middle-without-boundary", count=len(self._boundaries))
        if defect:
            yield defect

    def unmatched(self, rule: Rule) -> list[Diagnostic]:
        """An error for each pattern that no name of the model matches, up to a number."""
        patterns = self._patterns(rule)
        dead = [pattern for pattern in patterns if not self.model.names.matching(pattern)]
        found = []
        for pattern in dead[:_MOST_SHOWN]:
            self._n_cured += 1
            cure = Cure(None, ())
            # To look for what was meant takes a while for each.
            if self._n_cured <= _MOST_CURED:
                cure = self._cures.cure(pattern, excepted=patterns[pattern])
            found.append(self._without_match("pattern-matches-nothing", rule, pattern, cure))
        if len(dead) > _MOST_SHOWN:
            more, example = len(dead) - _MOST_SHOWN, print_selector(dead[-1])
            note = f"{more:,} more patterns of this rule match nothing, such as {example}"
            found[-1] = replace(found[-1], notes=(*found[-1].notes, note))
        return found

    def taking_more(self, rule: Rule) -> Iterator[Diagnostic]:
        """A warning for each pattern such as `layers.1*` that takes other numbers too."""
        for pattern in self._patterns(rule):
            if (more := self._cures.more_taken(pattern)) is not None:
                numbers, narrower = more
                span, cure = span_of(rule, pattern), f"write {print_selector(narrower)}"
                facts = {"pattern": print_selector(pattern), "numbers": numbers}
                yield diagnostic("pattern-takes-more", span, suggestion=cure, **facts)

    def idle(self, rule: Rule) -> Iterator[Diagnostic]:
        """An error for each part that matches only what the rest of the selector leaves out."""
        if not self.may_be_empty(rule):
            is_open = self._everything - self._guarded_from(rule)
            for part, places in self._idle(rule.selector, Meaning(self._everything, is_open)):
                cure = Cure(None, self.guard_notes(places))
                yield self._without_match("part-matches-nothing", rule, part, cure)

    def guard_notes(self, guarded: frozenset[int]) -> tuple[str, ...]:
        """The note that a selector only covers tensors that it may not touch, if there are any."""
        if not guarded:
            return ()
        example, covered = self.model.tensors[min(guarded)], counted(len(guarded), "guarded tensor")
        may = f'only a rule that names "{example.role}" may touch them'
        return (f"it covers {covered} such as {example.source.name}; {may}",)

    def _idle(self, node: Selector, left: Meaning) -> Iterator[tuple[Selector, frozenset[int]]]:
        """Each part that may touch nothing of what is left to it, and what it matches of that.

        left: what the parts around it allow; named is what may be touched of it.
        """
        if not _is_specific(node) or self._is_foreign(node):
            return
        if isinstance(node, Or):
            for part in node.parts:
                yield from self._idle(part, left)
        elif isinstance(node, Except):
            yield from self._idle(node.base, left)
            # What is excepted may be anywhere in the model, and guarded.
            yield from self._idle(node.excluded, Meaning(self._everything, self._everything))
        elif not (met := _met([left, self.meaning(node)])).named:
            yield node, met.matched
        elif isinstance(node, And):
            # What reaches all parts reaches each of them; of alternatives it may be but one.
            for part in node.parts:
                if isinstance(part, Or | Except):
                    others = [self.meaning(one) for one in node.parts if one is not part]
                    yield from self._idle(part, _met([left, *others]))

    def _without_match(self, code: str, rule: Rule, node: Selector, cure: Cure) -> Diagnostic:
        kind, span, meant = code.partition("-")[0], span_of(rule, node), cure.suggestion
        facts: dict[str, Any] = {kind: print_selector(node), "model": self.model.id}
        return diagnostic(code, span, suggestion=meant or self._cure, notes=cure.notes, **facts)

    @cached_property
    def _cures(self) -> PatternCures:
        return PatternCures(self.model)

    def _patterns(self, rule: Rule) -> dict[Glob | Regex, bool]:
        """The patterns of a rule that must match, and whether all it says is what to except."""
        found: dict[Glob | Regex, bool] = {}
        if not self.may_be_empty(rule):
            for leaf, excepted in walk(rule.selector, self._is_foreign):
                if isinstance(leaf, Glob | Regex):
                    found[leaf] = excepted and found.get(leaf, True)
        return found

    def _is_foreign(self, selector: Selector) -> bool:
        """Whether it is bound to other families, as in `"*.w1.weight" and family mixtral`."""
        for part in selector.parts if isinstance(selector, And) else ():
            bound = part.parts if isinstance(part, Or) else (part,)
            names = [one.name for one in bound if isinstance(one, Family)]
            if len(names) == len(bound) and self.model.architecture.family not in names:
                return True
        return False


def _is_specific(selector: Selector) -> bool:
    """Whether it holds a name pattern or numbers, which are written for one model."""
    return any(
        isinstance(node, Glob | Regex | Layers) or (isinstance(node, Name) and node.experts)
        for node in nodes(selector)
    )
