"""The syntax tree of a selector -> Selector, with the place of every node."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from lark import Token

from policy_dsl.diagnostics import Diagnostic, Span, diagnostic
from policy_dsl.language.fragments import Fragment
from policy_dsl.language.layer_expression import canonical_expression, expression_defects
from policy_dsl.language.parsing import Syntax, children, place, tokens
from policy_dsl.language.quoting import unquote
from policy_dsl.roles.name_index import pattern_defect
from policy_dsl.selectors import (
    All,
    Boundary,
    Family,
    Glob,
    LayerRange,
    Layers,
    LayersWhere,
    Middle,
    Name,
    Regex,
    Selector,
    all_of,
    any_of,
    without,
)

_RANGE = re.compile(r"([-+]?\d+)(?:\s*(?:\.\.|-)\s*([-+]?\d+))?")


class ReadSelector(NamedTuple):
    """A selector, the places of its nodes, and what is wrong with it."""

    selector: Selector
    spans: tuple[tuple[Selector, Span], ...]
    findings: tuple[Diagnostic, ...]


def read_selector(tree: Syntax, fragment: Fragment) -> ReadSelector:
    """The selector that a `selector` node of the grammar says.

    fragment: the text whose positions the tree holds.
    """
    reader = _Reader(fragment)
    selector = reader.selector(tree)
    return ReadSelector(selector, tuple(reader.spans), tuple(reader.findings))


def read_numbers(
    tree: Syntax, fragment: Fragment
) -> tuple[tuple[LayerRange, ...], tuple[Diagnostic, ...]]:
    """The numbers from 0 up that a `ranges` node says, as written, and what is wrong."""
    reader = _Reader(fragment)
    found = reader.ranges(tree, signed=False)
    return found, tuple(reader.findings)


class _Reader:
    """Walks the tree; `spans` and `findings` grow on the way."""

    def __init__(self, fragment: Fragment) -> None:
        self._fragment = fragment
        self.spans: list[tuple[Selector, Span]] = []
        self.findings: list[Diagnostic] = []

    def selector(self, tree: Syntax) -> Selector:
        base, *excluded = [self._union(part) for part in children(tree)]
        return without(base, any_of(*excluded)) if excluded else base

    def _union(self, tree: Syntax) -> Selector:
        terms = children(tree)
        self._refuse_ambiguous_in(terms)
        return any_of(*(self._term(term) for term in terms))

    def _refuse_ambiguous_in(self, terms: list[Syntax]) -> None:
        bound = [any(token.type == "IN" for token in tokens(term)) for term in terms]
        for index in range(1, len(terms)):
            # `a, b in layers 0-1` binds to b alone, which is rarely meant: asked, not guessed.
            if bound[index] and not bound[index - 1]:
                span = self._fragment.place(terms[0].meta.start_pos, terms[index].meta.end_pos)
                self._report("ambiguous-in", span, cure=self._parenthesised(terms, index))
                return

    def _parenthesised(self, terms: list[Syntax], index: int) -> str:
        term, text = terms[index], self._fragment.text
        word = next(token for token in tokens(term) if token.type == "IN")
        start, split = terms[0].meta.start_pos, word.start_pos or 0
        names = text[start:split].strip()
        return f'write "({names}) {text[split : term.meta.end_pos]}"'

    def _term(self, tree: Syntax) -> Selector:
        return all_of(*(self._item(item) for item in children(tree)))

    def _item(self, tree: Syntax) -> Selector:
        if tree.data == "group":
            return self.selector(children(tree)[0])
        read = getattr(self, f"_{tree.data}")
        found: Selector = read(tree)
        self.spans.append((found, place(self._fragment, tree)))
        return found

    def _all(self, tree: Syntax) -> Selector:
        return All()

    def _middle(self, tree: Syntax) -> Selector:
        return Middle()

    def _layers(self, tree: Syntax) -> Selector:
        return Layers(self.ranges(children(tree)[0]), boundary=bool(tokens(tree)))

    def _layers_where(self, tree: Syntax) -> Selector:
        expression = children(tree)[0]
        defects = expression_defects(expression, self._fragment)
        self.findings += defects
        # Any whole expression will do here: the findings stop the policy.
        return LayersWhere("i" if defects else canonical_expression(expression))

    def _boundary(self, tree: Syntax) -> Selector:
        count = tokens(tree)[1]
        if not count.isdecimal() or len(count) > 9 or int(count) < 1:
            cure = None if count.isdecimal() else f'write "boundary layers {count}"'
            self._report("bad-boundary", place(self._fragment, count), cure=cure, written=count)
            return Boundary(1)
        return Boundary(int(count))

    def _family(self, tree: Syntax) -> Selector:
        return Family(str(tokens(tree)[0]))

    def _role(self, tree: Syntax) -> Selector:
        name, *dotted = tokens(tree)
        # Checkpoints call both the router and an expert's projection so.
        if name == "gate":
            cure = 'did you mean "experts.gate_proj" or "router"?'
            self._report("ambiguous-gate", place(self._fragment, name), cure=cure)
        numbers = children(tree)
        if not numbers:
            return Name(str(name))
        if name != "experts":
            span = place(self._fragment, tree)
            self._report("numbered-name", span, cure='write "experts[0-15].down_proj"', name=name)
        return Name(str(name) + "".join(dotted), self.ranges(numbers[0], signed=False))

    def _glob(self, tree: Syntax) -> Selector:
        pattern = unquote(tokens(tree)[0])
        if not pattern:
            self._report("empty-pattern", place(self._fragment, tree))
        return self._checked(Glob(pattern), tree)

    def _regex(self, tree: Syntax) -> Selector:
        pattern = tokens(tree)[0][1:-1].replace("\\/", "/")
        return self._checked(Regex(pattern), tree)

    def _checked(self, pattern: Glob | Regex, tree: Syntax) -> Selector:
        if defect := pattern_defect(pattern):
            kind = "regular expression" if isinstance(pattern, Regex) else "name pattern"
            span = place(self._fragment, tree)
            self._report("bad-regex", span, cure=defect.cure, kind=kind, reason=defect)
        return pattern

    def ranges(self, tree: Syntax, *, signed: bool = True) -> tuple[LayerRange, ...]:
        """The numbers that a `ranges` node says, from the end too if they may be signed."""
        return tuple(self._range(token, signed) for token in tokens(tree))

    def _range(self, token: Token, signed: bool) -> LayerRange:
        found = _RANGE.fullmatch(token)
        first, last = (found[1], found[2] or found[1]) if found else ("0", "0")
        if max(len(first), len(last)) > 9:
            self._report("number-too-large", place(self._fragment, token), written=token)
            return LayerRange(0, 0)
        start, stop = int(first), int(last)
        # `2..-3` depends on the number of layers; only ranges of one sign are known empty.
        if start > stop and (start < 0) == (stop < 0):
            self._report(
                "empty-range",
                place(self._fragment, token),
                cure=f'did you mean "{_range_text(stop, start)}"?',
                written=token,
            )
        if start < 0 and not signed:
            self._report("negative-expert", place(self._fragment, token), written=token)
        return LayerRange(start, stop)

    def _report(self, code: str, span: Span, *, cure: str | None = None, **facts: Any) -> None:
        self.findings.append(diagnostic(code, span, suggestion=cure, **facts))


def _range_text(start: int, stop: int) -> str:
    return f"{start}..{stop}" if start < 0 else f"{start}-{stop}"
