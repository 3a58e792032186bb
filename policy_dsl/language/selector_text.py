"""Selectors read from the syntax tree of a statement, and printed in one fixed form.

The arithmetic of `layers where EXPR` is Python's: `i` is a layer, `n` the number of layers;
+ - * // %, comparisons, and, or, not, parentheses, whole numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lark import Token

from policy_dsl.diagnostics import Diagnostic, PolicyError, SourceText, Span, diagnostic, fail
from policy_dsl.language.fragments import Fragment, escape_variables, quote, unquote
from policy_dsl.language.parsing import Syntax, children, parse, place, tokens
from policy_dsl.roles.name_index import pattern_defect
from policy_dsl.selectors import (
    All,
    And,
    Boundary,
    Except,
    Family,
    Glob,
    LayerRange,
    Layers,
    LayerSet,
    LayersWhere,
    Middle,
    Name,
    Or,
    Regex,
    Selector,
    all_of,
    any_of,
    without,
)

_RANGE = re.compile(r"([-+]?\d+)(?:\s*(?:\.\.|-)\s*([-+]?\d+))?")
_SLASH = re.compile(r"(\\.)|/", re.DOTALL)

# No expression this long can grow numbers that hang, or a tree too deep to walk.
MAX_EXPRESSION = 256
_MAX_DIGITS = 9
# Loosest first. `ast.unparse` would not do: its parentheses differ between versions of Python.
_BINDING = ("or", "and", "not", "comparison", "sum", "product", "negative")


class SelectorReader:
    """Reads trees of selectors; the places of their nodes and `findings` grow on the way."""

    def __init__(self, fragment: Fragment) -> None:
        self.text = fragment
        self.spans: list[tuple[Selector, Span]] = []
        self.findings: list[Diagnostic] = []

    def report(
        self, code: str, where: Span | Syntax | Token, *, cure: str | None = None, **facts: Any
    ) -> None:
        """Adds a defect at a place, or where a node of the tree is."""
        span = where if isinstance(where, Span) else place(self.text, where)
        self.findings.append(diagnostic(code, span, suggestion=cure, **facts))

    def selector(self, tree: Syntax) -> Selector:
        """The selector that a `selector` node of the grammar says."""
        base, *excluded = [self._union(part) for part in children(tree)]
        return without(base, any_of(*excluded)) if excluded else base

    def _union(self, tree: Syntax) -> Selector:
        terms = children(tree)
        self._refuse_ambiguous_in(terms)
        return any_of(*(all_of(*map(self._item, children(term))) for term in terms))

    def _refuse_ambiguous_in(self, terms: list[Syntax]) -> None:
        words = [next((word for word in tokens(term) if word.type == "IN"), None) for term in terms]
        for index in range(1, len(terms)):
            word = words[index]
            # `a, b in layers 0-1` binds to b alone, which is rarely meant: asked, not guessed.
            if word is not None and words[index - 1] is None:
                text, split = self.text.text, word.start_pos or 0
                start, stop = terms[0].meta.start_pos, terms[index].meta.end_pos
                cure = f'write "({text[start:split].strip()}) {text[split:stop]}"'
                self.report("ambiguous-in", self.text.place(start, stop), cure=cure)
                return

    def _item(self, tree: Syntax) -> Selector:
        if tree.data == "group":
            return self.selector(children(tree)[0])
        selector = self._leaf(tree)
        self.spans.append((selector, place(self.text, tree)))
        return selector

    def _leaf(self, tree: Syntax) -> Selector:
        leaf: Selector = All()
        match tree.data:
            case "middle":
                leaf = Middle()
            case "layers":
                leaf = Layers(self.ranges(children(tree)[0]), boundary=bool(tokens(tree)))
            case "layers_where":
                leaf = LayersWhere(self.expression(children(tree)[0]))
            case "boundary":
                leaf = self._boundary(tokens(tree)[1])
            case "family":
                leaf = Family(str(tokens(tree)[0]))
            case "role":
                leaf = self._role(tree)
            case "glob":
                pattern = unquote(tokens(tree)[0])
                if not pattern:
                    self.report("empty-pattern", tree)
                leaf = self._checked(Glob(pattern), tree)
            case "regex":
                leaf = self._checked(Regex(tokens(tree)[0][1:-1].replace("\\/", "/")), tree)
        return leaf

    def expression(self, tree: Syntax) -> str:
        """The text of an `expression` node with single spaces and no needless parentheses."""
        before = len(self.findings)
        written = self.text.text[tree.meta.start_pos : tree.meta.end_pos]
        if len("".join(written.split())) > MAX_EXPRESSION:
            self.report("statement-too-long", tree, limit=MAX_EXPRESSION)
            return "i"
        for token in tree.scan_values(lambda value: isinstance(value, Token)):
            if token.type == "NAME" and token not in ("i", "n"):
                cure = 'to add a condition, write "(layers where …) and …"'
                self.report("unknown-expression-name", token, cure=cure, name=token)
            elif token.type == "INT" and len(token) > _MAX_DIGITS:
                self.report("number-too-large", token, written=token)
        # Any whole expression will do after a finding: it stops the policy.
        return "i" if len(self.findings) > before else _arithmetic(tree.children[0])

    def _boundary(self, count: Token) -> Selector:
        if count.isdecimal() and len(count) <= 9 and int(count):
            return Boundary(int(count))
        cure = None if count.isdecimal() else f'write "boundary layers {count}"'
        self.report("bad-boundary", count, cure=cure, written=count)
        return Boundary(1)

    def _role(self, tree: Syntax) -> Selector:
        name, *dotted = tokens(tree)
        # Checkpoints call both the router and an expert's projection so.
        if name == "gate":
            cure = 'did you mean "experts.gate_proj" or "router"?'
            self.report("ambiguous-gate", name, cure=cure)
        numbers = children(tree)
        if not numbers:
            return Name(str(name))
        if name != "experts":
            self.report("numbered-name", tree, cure='write "experts[0-15].down_proj"', name=name)
        return Name(str(name) + "".join(dotted), self.ranges(numbers[0], signed=False))

    def _checked(self, pattern: Glob | Regex, tree: Syntax) -> Selector:
        if defect := pattern_defect(pattern):
            kind = "regular expression" if isinstance(pattern, Regex) else "name pattern"
            self.report("bad-regex", tree, cure=defect.cure, kind=kind, reason=defect)
        return pattern

    def ranges(self, tree: Syntax, *, signed: bool = True) -> tuple[LayerRange, ...]:
        """The numbers that a `ranges` node says, from the end too if they may be signed."""
        return tuple(self._range(token, signed) for token in tokens(tree))

    def _range(self, token: Token, signed: bool) -> LayerRange:
        bounds = _RANGE.fullmatch(token)
        first, last = (bounds[1], bounds[2] or bounds[1]) if bounds else ("0", "0")
        if max(len(first), len(last)) > 9:
            self.report("number-too-large", token, written=token)
            return LayerRange(0, 0)
        start, stop = int(first), int(last)
        # `2..-3` depends on the number of layers; only ranges of one sign are known empty.
        if start > stop and (start < 0) == (stop < 0):
            meant = f"{stop}..{start}" if stop < 0 else f"{stop}-{start}"
            self.report("empty-range", token, cure=f'did you mean "{meant}"?', written=token)
        if start < 0 and not signed:
            self.report("negative-expert", token, written=token)
        return LayerRange(start, stop)


def print_selector(selector: Selector) -> str:
    """The selector as a policy says it, such as `experts.down_proj in layers 2-59`."""
    text = "all"
    match selector:
        case Except(base, excluded):
            text = f"{_within(base, Except)} except {_within(excluded, Except)}"
        case Or(parts):
            text = ", ".join(map(_alternative, parts))
        case And(parts):
            text = _conditions(parts)
        case Layers(ranges, boundary):
            text = f"{'boundary ' * boundary}layers {print_ranges(ranges)}"
        case LayersWhere(expression):
            text = f"layers where {expression}"
        case Boundary(count):
            text = f"boundary {count}"
        case Middle():
            text = "middle"
        case Name(text, experts) if experts:
            text = f"experts[{print_ranges(experts)}]{text.removeprefix('experts')}"
        case Name(text):
            pass
        case Family(name):
            text = f"family {name}"
        case Glob(pattern):
            text = escape_variables(quote(pattern))
        case Regex(pattern):
            slashes = _SLASH.sub(lambda found: found[1] or "\\/", pattern)
            text = escape_variables(f"/{slashes}/")
    return text


def print_ranges(ranges: Iterable[LayerRange]) -> str:
    """Ranges as `0-1,-2..-1`."""
    return ",".join(map(_print_range, ranges))


def _print_range(layers: LayerRange) -> str:
    if layers.start == layers.stop:
        return str(layers.start)
    dots = ".." if layers.start < 0 or layers.stop < 0 else "-"
    return f"{layers.start}{dots}{layers.stop}"


def _within(part: Selector, *looser: type) -> str:
    text = print_selector(part)
    return f"({text})" if isinstance(part, looser) else text


def _alternative(part: Selector) -> str:
    # `a, b in layers 0-1` would be refused, so a bound alternative has parentheses.
    bound = isinstance(part, And) and any(isinstance(leaf, LayerSet) for leaf in part.parts[1:])
    return f"({print_selector(part)})" if bound else _within(part, Or, Except)


def _conditions(parts: tuple[Selector, ...]) -> str:
    text = ""
    for index, part in enumerate(parts):
        # An expression would swallow the `and` after it.
        greedy = isinstance(part, LayersWhere) and index < len(parts) - 1
        if index:
            text += " in " if isinstance(part, LayerSet) else " and "
        text += _within(part, LayersWhere) if greedy else _within(part, And, Or, Except)
    return text


def layers_where(expression: str, n_layers: int, span: Span | None = None) -> frozenset[int]:
    """The layers i of 0 … n_layers - 1 for which the expression is true.

    span: where the expression is, for diagnostics.
    Raises: PolicyError if the expression is malformed or divides by zero for some layer.
    """
    fragment = Fragment.of(SourceText("layers where", expression), 0, len(expression))
    tree = parse(fragment, "expression")
    if isinstance(tree, Diagnostic):
        raise PolicyError([tree])
    reader = SelectorReader(fragment)
    text = reader.expression(tree)
    if reader.findings:
        raise PolicyError(reader.findings)
    # The grammar lets through numbers, i, n and operators alone, which Python reads alike.
    code = compile(text, "layers where", "eval")
    chosen = set()
    for layer in range(n_layers):
        try:
            if eval(code, {"__builtins__": {}}, {"i": layer, "n": n_layers}):
                chosen.add(layer)
        except ZeroDivisionError:
            raise fail(
                "division-by-zero", span, expression=expression, layer=layer, n_layers=n_layers
            ) from None
    return frozenset(chosen)


def _arithmetic(node: Syntax | Token, outer: int = 0) -> str:
    if isinstance(node, Token):
        return str(int(node)) if node.type == "INT" else str(node)
    binding = _BINDING.index(node.data)
    # Operators are tokens between the operands; those of `or` and `not` are left out.
    tight = binding if node.data in ("not", "negative") else binding + 1
    parts = [_arithmetic(part, tight) for part in node.children]
    joint = {"or": " or ", "not": "", "negative": ""}.get(node.data, " ")
    text = f"{'not ' * (node.data == 'not')}{joint.join(parts)}"
    return f"({text})" if binding < outer else text
