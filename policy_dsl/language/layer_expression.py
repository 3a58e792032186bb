"""The arithmetic of `layers where EXPR`: checked, printed in one form, evaluated for a model.

`i` is a layer, `n` the number of layers; + - * // %, comparisons (chained as in i < j < k),
and, or, not, parentheses, whole numbers. Truth is a number other than 0.
"""

from __future__ import annotations

from collections.abc import Iterator

from lark import Token

from policy_dsl.diagnostics import Diagnostic, PolicyError, SourceText, Span, diagnostic, fail
from policy_dsl.language.fragments import Fragment
from policy_dsl.language.parsing import Syntax, parse, place

# No expression this long can grow numbers that hang, or a tree too deep to walk.
MAX_EXPRESSION = 256
_MAX_DIGITS = 9
# Loosest first. `ast.unparse` would not do: its parentheses differ between versions of Python.
_BINDING = ("or", "and", "not", "comparison", "sum", "product", "negative")


def layers_where(expression: str, n_layers: int, span: Span | None = None) -> frozenset[int]:
    """The layers i of 0 … n_layers - 1 for which the expression is true.

    span: where the expression is, for diagnostics.
    Raises: PolicyError if the expression is malformed or divides by zero for some layer.
    """
    fragment = Fragment.of(SourceText("layers where", expression), 0, len(expression))
    tree = parse(fragment, "expression")
    if isinstance(tree, Diagnostic):
        raise PolicyError([tree])
    if defects := expression_defects(tree, fragment):
        raise PolicyError(defects)
    # The grammar lets through numbers, i, n and operators alone, which Python reads alike.
    code = compile(canonical_expression(tree), "layers where", "eval")
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


def canonical_expression(tree: Syntax) -> str:
    """The expression with single spaces and no needless parentheses.

    tree: an `expression` node of the grammar.
    """
    return _text(tree.children[0], 0)


def expression_defects(tree: Syntax, fragment: Fragment) -> list[Diagnostic]:
    """What is wrong with an `expression` node: its size, its names, its numbers."""
    written = fragment.text[tree.meta.start_pos : tree.meta.end_pos]
    if len("".join(written.split())) > MAX_EXPRESSION:
        return [diagnostic("statement-too-long", place(fragment, tree), limit=MAX_EXPRESSION)]
    return list(_word_defects(tree, fragment))


def _word_defects(tree: Syntax, fragment: Fragment) -> Iterator[Diagnostic]:
    for token in tree.scan_values(lambda value: isinstance(value, Token)):
        where = place(fragment, token)
        if token.type == "NAME" and token not in ("i", "n"):
            cure = 'to add a condition, write "(layers where …) and …"'
            yield diagnostic("unknown-expression-name", where, suggestion=cure, name=token)
        elif token.type == "INT" and len(token) > _MAX_DIGITS:
            yield diagnostic("number-too-large", where, written=token)


def _text(node: Syntax | Token, outer: int) -> str:
    if isinstance(node, Token):
        return str(int(node)) if node.type == "INT" else str(node)
    binding = _BINDING.index(node.data)
    # Operators are tokens between the operands; those of `or` and `not` are left out.
    tight = binding if node.data in ("not", "negative") else binding + 1
    parts = [_text(part, tight) for part in node.children]
    joint = {"or": " or ", "not": "", "negative": ""}.get(node.data, " ")
    text = f"{'not ' * (node.data == 'not')}{joint.join(parts)}"
    return f"({text})" if binding < outer else text
