"""What the words of a selector mean: names and their roles, numbers, boundaries.

A guarded tensor (`router`, `shared_expert_gate`, `norm`, what is not a matrix …) is touched
only by a rule that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from policy_dsl import policy as selectors
from policy_dsl.diagnostics import Diagnostic, Span, diagnostic, did_you_mean
from policy_dsl.language.print_policy import print_ranges
from policy_dsl.linear_patterns import WILDCARDS
from policy_dsl.policy import OUTSIDE_LANGUAGE_MODEL, And, Except, Glob, LayerRange, Or, Regex, Rule
from policy_dsl.roles.architecture import Architecture, architecture, families

# A policy is checked without what a model is.
if TYPE_CHECKING:
    from policy_dsl.roles.model import ModelTensor

# They choose experts, or weigh them.
CHOOSERS = frozenset({"router", "shared_expert_gate"})
_GUARDED_ROLES = CHOOSERS | {"router_bias", "norm"}
_WORDS = selectors.COMPONENTS | selectors.SINGLE_ROLES


def is_guarded(tensor: ModelTensor) -> bool:
    """Whether only a rule that names this tensor may touch it."""
    return not tensor.is_matrix or tensor.namesake in _GUARDED_ROLES


def walk(
    selector: selectors.Selector,
    unless: Callable[[selectors.Selector], bool] = lambda node: False,
    *,
    excepted: bool = False,
) -> Iterator[tuple[selectors.Selector, bool]]:
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


def nodes(selector: selectors.Selector) -> Iterator[selectors.Selector]:
    """Every node of a selector tree, the root first."""
    return (node for node, _ in walk(selector))


def span_of(rule: Rule, node: selectors.Selector) -> Span | None:
    """The place of a part of the rule's selector, as narrow as it is known."""
    inside = {id(part) for part in nodes(node)}
    spans = [span for named, span in rule.name_spans if id(named) in inside]
    spans = spans or [span for named, span in rule.name_spans if named == node][:1]
    if not spans:
        return rule.selector_span or rule.span
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    return Span(spans[0].source, start, end)


def numbers(ranges: Iterable[LayerRange], count: int) -> frozenset[int]:
    """The numbers below `count` that ranges of a selector mean."""
    ends = (_ends(each, count) for each in ranges)
    return frozenset(n for start, stop in ends for n in range(max(start, 0), min(stop + 1, count)))


def _ends(span: LayerRange, count: int) -> tuple[int, int]:
    # Negative numbers count from the end, as in Python.
    start, stop = (n + count if n < 0 else n for n in (span.start, span.stop))
    return start, stop


def outside_model(ranges: Iterable[LayerRange], count: int, kind: str) -> Iterator[Diagnostic]:
    """The defect of each range with numbers that none of `count` layers or experts has."""
    for span in ranges:
        start, stop = _ends(span, count)
        if not 0 <= start <= stop < count:
            several = f"{kind}s {print_ranges([span])} are"
            written = f"{kind} {span.start} is" if start == stop else several
            has = f"{kind}s 0-{count - 1}" if count else f"no {kind}s"
            yield diagnostic("number-outside-model", written=written, has=has)


def boundary_layers(count: int, n_layers: int) -> frozenset[int]:
    """The first and the last `count` layers."""
    first, last = range(min(count, n_layers)), range(max(0, n_layers - count), n_layers)
    return frozenset((*first, *last))


def is_boundary(layers: frozenset[int], n_layers: int) -> bool:
    """Whether these are as many first layers as last ones."""
    # Each layer of the first half has one of the last; all may share the one in the middle.
    return bool(layers) and layers == boundary_layers((len(layers) + 1) // 2, n_layers)


def is_spelled(node: Glob | Regex) -> bool:
    """Whether a pattern names what it matches, and so may touch a router.

    A glob that spells the last part of a name means just that tensor. A regular expression may
    cover anything.
    """
    if isinstance(node, Regex):
        return False
    last = node.pattern.removesuffix(".weight").rsplit(".", 1)[-1]
    return bool(last) and not WILDCARDS & set(last)


def roles_of(text: str, table: Architecture) -> dict[str, bool]:
    """The roles that a name means in a family, each with whether it spells them; {} if unknown."""
    component, _, projection = text.rpartition(".")
    components = table.aliases.get(component, (component,))
    # Only a name that is a role by itself spells it: a component never opens the guard.
    spelled = {text, *table.aliases.get(text, ())}
    found = {
        role: role in spelled
        for role in table.roles
        for word in table.aliases.get(projection, (projection,))
        if any(_means(part, word, role) for part in components)
    }
    # A word of the language that this model has nothing of: the rule matches nothing, which is
    # a finding of its own and says more than "unknown".
    return found or ({text: text in selectors.SINGLE_ROLES} if text in _WORDS else {})


def _means(component: str, word: str, role: str) -> bool:
    if component:
        return role == f"{component}.{word}"
    # Vision and MTP have a `down_proj` too; the bare word means the language model's.
    outside, _, last = role.rpartition(".")
    return word in (role, outside) or (last == word and outside not in OUTSIDE_LANGUAGE_MODEL)


def name_defect(
    text: str, table: Architecture | None = None, *, optional: bool = False
) -> Diagnostic | None:
    """What is wrong with a name in a family, or in every family that there is; else None.

    optional: whether it may be one that only other families have.
    """
    if table is not None:
        tables, where = [table], f"architecture {table.family}"
    elif text.rpartition(".")[0] in OUTSIDE_LANGUAGE_MODEL:
        # What towers and MTP blocks have besides, only a model shows.
        return None
    else:
        tables, where = list(map(architecture, families())), "the language"
    if any(roles_of(text, each) for each in tables) or (optional and name_defect(text) is None):
        return None
    # Everything that would have been understood may be what was meant.
    words = _WORDS.union(*[{*each.aliases, *each.roles} for each in tables])
    words |= {word.split(".", 1)[1] for word in words if "." in word}
    return diagnostic("unknown-role", suggestion=did_you_mean(text, words), where=where, role=text)


def family_defect(name: str) -> Diagnostic | None:
    """What is wrong with the name of a family, else None."""
    if name in families():
        return None
    return diagnostic("unknown-family", suggestion=did_you_mean(name, families()), family=name)
