"""The size bars: every room of code is measured, and each figure stays within its bar.

Figures are taken from the syntax tree and the tokens, never by importing. A code line holds a
token that is neither comment nor docstring; the length of a function is its code lines from
`def` on. p95 is by nearest rank.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
# figure -> (largest p95, largest of all); None where there is no bar
BARS: dict[str, tuple[int, int | None]] = {
    "file_lines": (400, 500),
    "function_lines": (30, 60),
    "nesting": (2, 4),
    "branches": (10, None),
    "parameters": (5, None),
    "width": (100, 100),
}
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
DECISIONS = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.IfExp,
    ast.ExceptHandler,
    ast.comprehension,
    ast.match_case,
)
LAYOUT_TOKENS = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function


@dataclass
class Figures:
    """What is measured of one room; every value keeps the place where it was found."""

    values: dict[str, list[tuple[int, str]]] = field(
        default_factory=lambda: {figure: [] for figure in BARS}
    )
    public_functions: int = 0
    undocumented: list[str] = field(default_factory=list)
    undocumented_functions: list[str] = field(default_factory=list)
    untyped: list[str] = field(default_factory=list)


@cache
def figures_of(room: str) -> Figures:
    """The figures of every file under a room."""
    figures = Figures()
    for path in sorted((ROOT / room).rglob("*.py")):
        _measure_file(figures, path)
    return figures


def _measure_file(figures: Figures, path: Path) -> None:
    text, shown = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    tree, lines = ast.parse(text), text.splitlines()
    code = _code_lines(text, tree)
    figures.values["file_lines"].append((len(lines), shown))
    figures.values["width"] += [
        (len(line), f"{shown}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not ast.get_docstring(tree):
        figures.undocumented.append(shown)
    for node, dotted, public in _definitions(tree.body, ""):
        place = f"{shown}:{node.lineno} {dotted}"
        silent = public and not ast.get_docstring(node)
        if isinstance(node, ast.ClassDef):
            figures.undocumented += [place] * silent
            continue
        figures.public_functions += public
        figures.undocumented_functions += [place] * silent
        _measure_function(figures, node, place, code)


def _measure_function(figures: Figures, node: Function, place: str, code: set[int]) -> None:
    parameters = _parameters(node)
    measured = {
        "function_lines": len(code.intersection(_lines(node))),
        "nesting": _nesting(node),
        "branches": 1 + _decisions(node),
        "parameters": len(parameters),
    }
    for figure, value in measured.items():
        figures.values[figure].append((value, place))
    returns = node.returns is not None or node.name == "__init__"
    if not returns or any(parameter.annotation is None for parameter in parameters):
        figures.untyped.append(place)


def _definitions(
    body: list[ast.stmt], owner: str, *, inside: bool = False
) -> Iterator[tuple[Function | ast.ClassDef, str, bool]]:
    """Every class and function with its dotted name, and whether it is public."""
    for node in body:
        if isinstance(node, Function | ast.ClassDef):
            dotted = f"{owner}.{node.name}".lstrip(".")
            private = any(part.startswith("_") for part in dotted.split("."))
            yield node, dotted, not (private or inside)
            deeper = inside or not isinstance(node, ast.ClassDef)
            yield from _definitions(node.body, dotted, inside=deeper)
        else:
            yield from _definitions(_blocks(node), owner, inside=inside)


def _blocks(node: ast.stmt) -> list[ast.stmt]:
    """The statements in the blocks of a compound statement."""
    parts = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
    parts += [handler.body for handler in getattr(node, "handlers", [])]
    return [statement for part in parts for statement in part]


def _parameters(node: Function) -> list[ast.arg]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [one for one in (arguments.vararg, arguments.kwarg) if one]
    return named[1:] if named and named[0].arg in ("self", "cls") else named


def _nesting(node: ast.AST) -> int:
    """The deepest chain of blocks under a node, leaving out nested definitions."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef):
            continue
        chained = isinstance(node, ast.If) and node.orelse == [child]
        deepest = max(deepest, _nesting(child) + (isinstance(child, BLOCKS) and not chained))
    return deepest


def _decisions(node: ast.AST) -> int:
    found = 0
    for inner in ast.walk(node):
        found += isinstance(inner, DECISIONS)
        found += len(inner.values) - 1 if isinstance(inner, ast.BoolOp) else 0
    return found


def _code_lines(text: str, tree: ast.Module) -> set[int]:
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, Documented) and ast.get_docstring(node, clean=False) is not None:
            docstrings.update(_lines(node.body[0]))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT_TOKENS:
            code.update(range(token.start[0], token.end[0] + 1))
    return code - docstrings


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


@pytest.mark.parametrize("figure", BARS)
@pytest.mark.parametrize("room", ROOMS)
def test_figure_within_its_bar(room: str, figure: str) -> None:
    ranked = sorted(figures_of(room).values[figure])
    count = len(ranked)
    ranks = (min(int(0.95 * count), count - 1), count - 1)
    for name, rank, bar in zip(("p95", "max"), ranks, BARS[figure], strict=True):
        above = [f"{value:6} {place}" for value, place in ranked if value > (bar or value)]
        assert bar is None or ranked[rank][0] <= bar, "\n".join(
            [f"{name} of {figure} in {room} is {ranked[rank][0]}, its bar {bar}:", *above]
        )


@pytest.mark.parametrize("room", ROOMS)
def test_what_is_public_is_documented(room: str) -> None:
    figures = figures_of(room)
    assert figures.undocumented == []
    silent = figures.undocumented_functions
    assert len(silent) <= 0.05 * figures.public_functions, silent


@pytest.mark.parametrize("room", ROOMS)
def test_every_function_is_typed(room: str) -> None:
    assert figures_of(room).untyped == []
