"""What a selector means for a model: which of its tensors, and whether by name.

A guarded tensor (`router`, `router_bias`, `norm`, anything that is not a matrix) is touched
only by a rule that names it: `by_name` travels beside `matches` through the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from policy_dsl import policy as selectors
from policy_dsl.diagnostics import Diagnostic, Span, diagnostic, did_you_mean
from policy_dsl.language.print_policy import print_ranges
from policy_dsl.language.statements import layers_where
from policy_dsl.linear_patterns import WILDCARDS
from policy_dsl.plan import rule_places
from policy_dsl.policy import (
    COMPONENTS,
    OUTSIDE_LANGUAGE_MODEL,
    SINGLE_ROLES,
    And,
    Except,
    Glob,
    Name,
    Or,
    Policy,
    Regex,
    Rule,
    Selector,
)
from policy_dsl.roles.architecture import Architecture, architecture, families

# A policy is checked without what a model is.
if TYPE_CHECKING:
    from policy_dsl.roles.model import Model, ModelTensor

_GUARDED_ROLES = frozenset({"router", "router_bias", "norm"})
# (matches, by name)
Outcome = tuple[bool, bool]
Predicate = Callable[["ModelTensor"], Outcome]

_layers_where = cache(layers_where)
_NO: Outcome = (False, False)
_YES: Outcome = (True, False)
_NAMED: Outcome = (True, True)


def is_guarded(tensor: ModelTensor) -> bool:
    """Whether only a rule that names this tensor may touch it."""
    return not tensor.is_matrix or tensor.namesake in _GUARDED_ROLES


def walk(
    selector: Selector,
    unless: Callable[[Selector], bool] = lambda node: False,
    *,
    excepted: bool = False,
) -> Iterator[tuple[Selector, bool]]:
    """Every node of a selector tree, the root first, and whether it says what is not meant.

    unless: whether a node is left out with all below it.
    """
    if unless(selector):
        return
    yield selector, excepted
    if isinstance(selector, And | Or):
        for part in selector.parts:
            yield from walk(part, unless, excepted=excepted)
    elif isinstance(selector, Except):
        yield from walk(selector.base, unless, excepted=excepted)
        yield from walk(selector.excluded, unless, excepted=True)


def nodes(selector: Selector) -> Iterator[Selector]:
    """Every node of a selector tree, the root first."""
    return (node for node, _ in walk(selector))


@dataclass(frozen=True)
class CompiledRule:
    """A rule made executable for one model.

    index: which of the policy's rules it is. origin: its place as text, see `rule_places`.
    findings: what is wrong with its selector in this model. inapplicable: it is bound to
    another family, where matching nothing is not a defect. predicates: of every node of its
    selector. marks: of a name the roles, of a layer set the layers that it is limited to.
    """

    rule: Rule
    index: int
    origin: str
    predicate: Predicate
    findings: tuple[Diagnostic, ...]
    inapplicable: bool
    predicates: Mapping[Selector, Predicate]
    marks: Mapping[Selector, frozenset[str] | frozenset[int]]

    @cached_property
    def reads_names(self) -> bool:
        """Whether the outcome depends on more than role and layer."""
        return any(
            isinstance(node, Glob | Regex) or (isinstance(node, Name) and node.experts)
            for node in nodes(self.rule.selector)
        )

    def decides(self, tensor: ModelTensor) -> bool:
        """Whether the rule matches the tensor and may touch it."""
        # The guard is applied last, so that a rule that only covers a router can say so.
        matches, by_name = self.predicate(tensor)
        return matches and (by_name or self.may_touch(tensor))

    def may_touch(self, tensor: ModelTensor) -> bool:
        """Whether the rule may touch a tensor that it does not name."""
        # The norms and routers of a tower or block are of no use without its matrices.
        drops = self.rule.treatment.action == "drop"
        return not is_guarded(tensor) or (drops and tensor.component in OUTSIDE_LANGUAGE_MODEL)


def compile_rules(policy: Policy, model: Model, target: str) -> tuple[CompiledRule, ...]:
    """The policy's rules for this target, executable, in the order of the text."""
    compiler = _Compiler(policy, model)
    places = rule_places(policy.rules)
    return tuple(
        compiler.compile(rule, index, places[index][0])
        for index, rule in enumerate(policy.rules)
        if rule.target in (None, target)
    )


def compile_rule(rule: Rule, policy: Policy, model: Model) -> CompiledRule:
    """One rule, executable as if it were the policy's last."""
    # `middle` looks at all rules, this one too.
    whole = replace(policy, rules=(*policy.rules, rule))
    return _Compiler(whole, model).compile(rule, len(policy.rules), "")


def span_of(rule: Rule, node: Selector) -> Span | None:
    """The place of a part of the rule's selector, as narrow as it is known."""
    inside = {id(part) for part in nodes(node)}
    spans = [span for named, span in rule.name_spans if id(named) in inside]
    spans = spans or [span for named, span in rule.name_spans if named == node][:1]
    if not spans:
        return rule.selector_span or rule.span
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    return Span(spans[0].source, start, end)


class _Compiler:
    """Turns selector nodes into predicates and collects what is wrong with them."""

    def __init__(self, policy: Policy, model: Model) -> None:
        self._policy = policy
        self._model = model
        self._findings: list[Diagnostic] = []
        self._predicates: dict[Selector, Predicate] = {}
        self._marks: dict[Selector, frozenset[str] | frozenset[int]] = {}
        self._rule: Rule

    def compile(self, rule: Rule, index: int, origin: str) -> CompiledRule:
        self._rule, self._findings, self._predicates, self._marks = rule, [], {}, {}
        predicate = self._build(rule.selector)
        # `router and family mixtral` in a policy for all models is right to match nothing here.
        bound = [one for one in nodes(rule.selector) if isinstance(one, selectors.Family)]
        own = self._model.architecture.family
        other = bool(bound) and all(one.name != own for one in bound)
        # The same selector may be built twice: once for its rule, once for `middle`.
        findings = tuple(dict.fromkeys(self._findings))
        built = self._predicates, self._marks
        return CompiledRule(rule, index, origin, predicate, findings, other, *built)

    def _build(self, node: Selector) -> Predicate:
        predicate: Predicate
        match node:
            case And():
                predicate = _all_of([self._build(part) for part in node.parts])
            case Or():
                predicate = self._union(node)
            case Except():
                predicate = _without(self._build(node.base), self._build(node.excluded))
            case Name():
                predicate = self._name(node)
            case Glob() | Regex():
                predicate = self._pattern(node)
            case selectors.All():
                predicate = _covering(lambda tensor: tensor.is_matrix)
            case selectors.Family():
                self._find(family_defect(node.name), node)
                is_own = node.name == self._model.architecture.family
                predicate = _covering(lambda tensor: is_own)
            case _:
                layers = self._marks[node] = self._layers(node)
                predicate = _covering(lambda tensor: tensor.layer in layers)
        self._predicates[node] = predicate
        return predicate

    def _union(self, node: Or) -> Predicate:
        # Hundreds of patterns are one look into a table.
        built = {part: self._build(part) for part in node.parts}
        patterns = [part for part in built if isinstance(part, Glob | Regex)]
        others = [made for part, made in built.items() if not isinstance(part, Glob | Regex)]
        return _any_of([*others, self._pattern(*patterns)] if patterns else others)

    def _name(self, node: Name) -> Predicate:
        meaning = _meaning_of(node.text, self._model.architecture, optional=self._rule.optional)
        if isinstance(meaning, Diagnostic):
            self._find(meaning, node)
            return lambda tensor: _NO
        self._marks[node] = roles = frozenset(meaning)
        if node.experts:
            # `experts[0-3]` picks by number, which names no role.
            experts = self._numbers(node, node.experts, self._model.n_experts, "expert")
            return _covering(lambda tensor: tensor.role in roles and tensor.expert in experts)
        return lambda tensor: meaning.get(tensor.role, _NO)

    def _pattern(self, *patterns: Glob | Regex) -> Predicate:
        outcomes: dict[str, Outcome] = {}
        for pattern in patterns:
            spelled = is_spelled(pattern)
            for name in self._model.names.matching(pattern):
                outcomes[name] = _NAMED if spelled else outcomes.get(name, _YES)
        return lambda tensor: outcomes.get(tensor.source.name, _NO)

    def _layers(self, node: Selector) -> frozenset[int]:
        n_layers = self._model.n_layers
        match node:
            case selectors.Layers(ranges, boundary):
                found = self._numbers(node, ranges, n_layers, "layer")
                if boundary and not is_boundary(found, n_layers):
                    self._report("not-the-boundary", node, n_layers=n_layers)
                return found
            case selectors.LayersWhere(expression):
                return _layers_where(expression, n_layers)
            case selectors.Boundary(count):
                return _boundary_layers(count, n_layers)
            case selectors.Middle():
                # Two different boundaries would leave open which of them `middle` complements.
                if len(self._boundaries) == 1:
                    return frozenset(range(n_layers)).difference(*self._boundaries)
                self._report("middle-without-boundary", node, count=len(self._boundaries))
                return frozenset(range(n_layers))
        raise TypeError(f"no selector: {node!r}")

    @cached_property
    def _boundaries(self) -> frozenset[frozenset[int]]:
        every = [node for rule in self._policy.rules for node in nodes(rule.selector)]
        layers = [one for one in every if isinstance(one, selectors.Boundary | selectors.Layers)]
        # Of layers by number, those that the author calls a boundary.
        return frozenset(self._layers(one) for one in layers if getattr(one, "boundary", True))

    def _numbers(
        self, node: Selector, ranges: tuple[selectors.LayerRange, ...], count: int, kind: str
    ) -> frozenset[int]:
        found: set[int] = set()
        for span in ranges:
            # Negative numbers count from the end, as in Python.
            start, stop = (n + count if n < 0 else n for n in (span.start, span.stop))
            if not 0 <= start <= stop < count:
                several = f"{kind}s {print_ranges([span])} are"
                written = f"{kind} {span.start} is" if start == stop else several
                has = f"{kind}s 0-{count - 1}" if count else f"no {kind}s"
                self._report("number-outside-model", node, written=written, has=has)
            found.update(range(max(start, 0), min(stop, count - 1) + 1))
        return frozenset(found)

    def _report(self, code: str, node: Selector, **facts: Any) -> None:
        self._find(diagnostic(code, **facts), node)

    def _find(self, defect: Diagnostic | None, node: Selector) -> None:
        if defect is not None:
            self._findings.append(replace(defect, span=span_of(self._rule, node)))


def _boundary_layers(count: int, n_layers: int) -> frozenset[int]:
    """The first and the last `count` layers."""
    first, last = range(min(count, n_layers)), range(max(0, n_layers - count), n_layers)
    return frozenset((*first, *last))


def is_boundary(layers: frozenset[int], n_layers: int) -> bool:
    """Whether these are as many first layers as last ones."""
    # Each layer of the first half has one of the last; all may share the one in the middle.
    return bool(layers) and layers == _boundary_layers((len(layers) + 1) // 2, n_layers)


def _covering(holds: Callable[[ModelTensor], bool]) -> Predicate:
    return lambda tensor: _YES if holds(tensor) else _NO


def _all_of(parts: list[Predicate]) -> Predicate:
    def outcome(tensor: ModelTensor) -> Outcome:
        # `router in layers 0-1` names the router, though layers alone never do.
        matched, named = zip(*[part(tensor) for part in parts], strict=True)
        return all(matched), any(named)

    return outcome


def _any_of(parts: list[Predicate]) -> Predicate:
    def outcome(tensor: ModelTensor) -> Outcome:
        # In `all, router` only the part that names the tensor opens the guard.
        outcomes = [part(tensor) for part in parts]
        return any(matches for matches, _ in outcomes), _NAMED in outcomes

    return outcome


def _without(base: Predicate, excluded: Predicate) -> Predicate:
    return lambda tensor: _NO if excluded(tensor)[0] else base(tensor)


def is_spelled(node: Glob | Regex) -> bool:
    """Whether a pattern names what it matches, and so may touch a router.

    A glob that spells the last part of a name means just that tensor. A regular expression may
    cover anything.
    """
    if isinstance(node, Regex):
        return False
    last = node.pattern.removesuffix(".weight").rsplit(".", 1)[-1]
    return bool(last) and not WILDCARDS & set(last)


def _meaning_of(
    text: str, table: Architecture, *, optional: bool
) -> Mapping[str, Outcome] | Diagnostic:
    """The roles that a name means in a family, or the defect of the name.

    With `optional`, a name that only other families have means no role at all.
    """
    if meaning := _roles(text, table):
        return meaning
    # A word of the language that this model has nothing of: the rule matches nothing, which is
    # a finding of its own and says more than "unknown".
    if text in COMPONENTS or text in SINGLE_ROLES:
        return {text: _NAMED if text in SINGLE_ROLES else _YES}
    if optional and name_defect(text) is None:
        return {}
    return _unknown(text, f"architecture {table.family}", [table])


def name_defect(text: str) -> Diagnostic | None:
    """What is wrong with a name in every family that there is, else None."""
    # What towers and MTP blocks have besides, only a model shows.
    if text.rpartition(".")[0] in OUTSIDE_LANGUAGE_MODEL or text in COMPONENTS | SINGLE_ROLES:
        return None
    tables = [architecture(family) for family in families()]
    known = any(_roles(text, table) for table in tables)
    return None if known else _unknown(text, "the language", tables)


def family_defect(name: str) -> Diagnostic | None:
    """What is wrong with the name of a family, else None."""
    if name in families():
        return None
    return diagnostic("unknown-family", suggestion=did_you_mean(name, families()), family=name)


def _unknown(text: str, where: str, tables: Iterable[Architecture]) -> Diagnostic:
    # Everything that would have been understood may be what was meant.
    words = {*COMPONENTS, *SINGLE_ROLES}
    for table in tables:
        words |= {*table.roles, *table.aliases}
        words |= {role.split(".", 1)[1] for role in table.roles if "." in role}
    return diagnostic("unknown-role", suggestion=did_you_mean(text, words), where=where, role=text)


def _roles(text: str, table: Architecture) -> dict[str, Outcome]:
    """The roles that a name means, each with what a rule by that name is for its tensors."""
    component, _, projection = text.rpartition(".")
    components = table.aliases.get(component, (component,))
    # Only a name that is a role by itself spells it: a component never opens the guard.
    spelled = {text, *table.aliases.get(text, ())}
    return {
        role: _NAMED if role in spelled else _YES
        for role in table.roles
        for word in table.aliases.get(projection, (projection,))
        if any(_means(part, word, role) for part in components)
    }


def _means(component: str, word: str, role: str) -> bool:
    if component:
        return role == f"{component}.{word}"
    # Vision and MTP have a `down_proj` too; the bare word means the language model's.
    outside, _, last = role.rpartition(".")
    return word in (role, outside) or (last == word and outside not in OUTSIDE_LANGUAGE_MODEL)
