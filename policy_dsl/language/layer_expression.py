"""The arithmetic of `layers where EXPR`: read, printed in one form, evaluated for a model.

`i` is a layer, `n` the number of layers; + - * // %, comparisons (chained as in i < j < k),
and, or, not, parentheses, whole numbers. Truth is a number other than 0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

from lark import Token

from policy_dsl.diagnostics import Diagnostic, PolicyError, SourceText, Span, diagnostic, fail
from policy_dsl.language.fragments import Fragment
from policy_dsl.language.parsing import Syntax, parse, place

# No expression this long can grow numbers that hang, or a tree too deep to walk.
MAX_EXPRESSION = 256
_MAX_DIGITS = 9

_OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_BINDING = {
    "or": 1, "and": 2, "not": 3, "comparison": 4, "sum": 5, "product": 6, "negative": 7,
}  # fmt: skip


def layers_where(expression: str, n_layers: int, span: Span | None = None) -> frozenset[int]:
    """The layers i of 0 … n_layers - 1 for which the expression is true.

    span: where the expression stands, for diagnostics.
    Raises: PolicyError if the expression is malformed or divides by zero for some layer.
    """
    fragment = Fragment.of(SourceText("layers where", expression), 0, len(expression))
    tree = parse(fragment, "expression")
    if isinstance(tree, Diagnostic):
        raise PolicyError([tree])
    if defects := expression_defects(tree, fragment):
        raise PolicyError(defects)
    found = set()
    for layer in range(n_layers):
        try:
            if _value(tree.children[0], {"i": layer, "n": n_layers}):
                found.add(layer)
        except ZeroDivisionError:
            raise fail(
                "division-by-zero", span, expression=expression, layer=layer, n_layers=n_layers
            ) from None
    return frozenset(found)


def canonical_expression(tree: Syntax) -> str:
    """The expression with single spaces and no needless parentheses.

    tree: an `expression` node of the grammar.
    """
    return _text(tree.children[0], 0)


def expression_defects(tree: Syntax, fragment: Fragment) -> list[Diagnostic]:
    """What is wrong with an `expression` node: its size, its names, its numbers."""
    written = fragment.text[tree.meta.start_pos : tree.meta.end_pos]
    if len("".join(written.split())) > MAX_EXPRESSION:
        where = place(fragment, tree)
        return [diagnostic("statement-too-long", where, limit=MAX_EXPRESSION)]
    return list(_word_defects(tree, fragment))


def _word_defects(tree: Syntax, fragment: Fragment) -> Iterator[Diagnostic]:
    for token in tree.scan_values(lambda value: isinstance(value, Token)):
        where = place(fragment, token)
        if token.type == "NAME" and token not in ("i", "n"):
            cure = 'to add a condition, write "(layers where …) and …"'
            yield diagnostic("unknown-expression-name", where, suggestion=cure, name=token)
        elif token.type == "INT" and len(token) > _MAX_DIGITS:
            yield diagnostic("number-too-large", where, written=token)


def _value(node: Syntax | Token, names: Mapping[str, int]) -> int:
    if isinstance(node, Token):
        return names[node] if node.type == "NAME" else int(node)
    return _EVALUATE[node.data](node, names)


def _any(node: Syntax, names: Mapping[str, int]) -> int:
    values = (_value(part, names) for part in _operands(node))
    return next((value for value in values if value), 0)


def _every(node: Syntax, names: Mapping[str, int]) -> int:
    value = 1
    for part in _operands(node):
        value = _value(part, names)
        if not value:
            break
    return value


def _negate(node: Syntax, names: Mapping[str, int]) -> int:
    return int(not _value(node.children[0], names))


def _signed(node: Syntax, names: Mapping[str, int]) -> int:
    value = _value(node.children[1], names)
    return -value if node.children[0] == "-" else value


def _fold(node: Syntax, names: Mapping[str, int]) -> int:
    total = _value(node.children[0], names)
    for sign, part in zip(node.children[1::2], node.children[2::2], strict=True):
        total = _OPERATORS[str(sign)](total, _value(part, names))
    return total


def _compare(node: Syntax, names: Mapping[str, int]) -> int:
    signs = node.children[1::2]
    sides = pairwise(node.children[0::2])
    return int(
        all(
            _OPERATORS[str(sign)](_value(left, names), _value(right, names))
            for sign, (left, right) in zip(signs, sides, strict=True)
        )
    )


_EVALUATE: Mapping[str, Callable[[Syntax, Mapping[str, int]], int]] = {
    "or": _any,
    "and": _every,
    "not": _negate,
    "negative": _signed,
    "comparison": _compare,
    "sum": _fold,
    "product": _fold,
}


def _operands(node: Syntax) -> list[Syntax | Token]:
    # The `and` between two conditions is a token that the selectors share.
    return [child for child in node.children if not _is_word(child)]


def _is_word(child: Syntax | Token) -> bool:
    return isinstance(child, Token) and child.type == "AND"


def _text(node: Syntax | Token, outer: int) -> str:
    if isinstance(node, Token):
        return node if node.type == "NAME" else str(int(node))
    binding = _BINDING[node.data]
    if node.data in ("or", "and"):
        text = f" {node.data} ".join(_text(part, binding + 1) for part in _operands(node))
    elif node.data == "not":
        text = f"not {_text(node.children[0], binding)}"
    elif node.data == "negative":
        text = f"{node.children[0]}{_text(node.children[1], binding)}"
    else:
        text = _infix(node, binding)
    return f"({text})" if binding < outer else text


def _infix(node: Syntax, binding: int) -> str:
    parts = [_text(part, binding + 1) for part in node.children[0::2]]
    signs = [str(sign) for sign in node.children[1::2]]
    return parts[0] + "".join(
        f" {sign} {part}" for sign, part in zip(signs, parts[1:], strict=True)
    )
