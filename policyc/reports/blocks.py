"""Reports as values, rendered as plain text or markdown: facts, tables, lists.

What they hold may come from anywhere, and is escaped when it becomes text.

blocks ── render_text(blocks, width) ──> str
       └─ render_markdown(blocks) ─────> str
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from policy_dsl.escaping import columns, escaped, markdown

# Longer than names and paths are; what is cut is whole in the JSON form.
LONGEST_CELL = 4096
GAP = "  "
T = TypeVar("T")
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under the titles of their columns.

    right: the columns of figures. leaving: those that go where the width is short, in this order.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    right: Collection[str] = ()
    leaving: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """Pairs of a word and its value, values aligned."""

    pairs: tuple[tuple[str, str], ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Items:
    """Entries of a list under a title, each on one line."""

    lines: tuple[str, ...]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Texts of several lines under a title, such as findings; they are escaped already."""

    texts: tuple[str, ...]
    title: str = ""


Block = Table | Facts | Items | Rendered


def by_key(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items that have each key, keys and items in the order of first sight."""
    members: dict[K, list[T]] = {}
    for item in items:
        members.setdefault(key(item), []).append(item)
    return members


def render_text(blocks: Iterable[Block], *, width: int | None = None) -> str:
    """The blocks as text, a blank line between them; tables lose columns to fit `width`."""
    shown = ["\n".join(_text_lines(block, width)) for block in blocks]
    return "\n\n".join(shown) + "\n"


def render_markdown(blocks: Iterable[Block]) -> str:
    """The blocks as GitHub markdown."""
    return "\n\n".join("\n".join(_markdown_lines(block)) for block in blocks) + "\n"


def _text_lines(block: Block, width: int | None) -> list[str]:
    if not block.title:
        return [line.rstrip() for line in _body_lines(block, width)]
    # What is under a title is indented, so that titles are found by the eye.
    body = _body_lines(block, width and width - len(GAP))
    return [block.title, *(f"{GAP}{line}".rstrip() for line in body)]


def _body_lines(block: Block, width: int | None) -> list[str]:
    match block:
        case Table():
            return _table_lines(block, width)
        case Facts():
            return _fact_lines(block)
        case Items():
            return [_on_one_line(line) for line in block.lines]
    return "\n".join(block.texts).split("\n")


def _fact_lines(facts: Facts) -> list[str]:
    width = max((len(name) for name, _ in facts.pairs), default=0)
    return [f"{name:<{width}}{GAP}{_on_one_line(value)}" for name, value in facts.pairs]


def _on_one_line(text: str) -> str:
    return escaped(text, longest=LONGEST_CELL)


def _table_lines(table: Table, width: int | None) -> list[str]:
    cells = [table.columns, *(tuple(map(_on_one_line, row)) for row in table.rows)]
    # The widest cell decides, titles included.
    widths = [max(columns(row[at]) for row in cells) for at in range(len(table.columns))]
    shown = list(range(len(table.columns)))
    for title in table.leaving:
        if width is None or sum(widths[at] + len(GAP) for at in shown) - len(GAP) <= width:
            break
        shown.remove(table.columns.index(title))
    lines = []
    for row in cells:
        aligned = [
            _aligned(row[at], widths[at], right=table.columns[at] in table.right) for at in shown
        ]
        lines.append(GAP.join(aligned).rstrip())
    return [lines[0], "-" * max(map(columns, lines)), *lines[1:]]


def _aligned(cell: str, width: int, *, right: bool) -> str:
    space = " " * (width - columns(cell))
    return space + cell if right else cell + space


def _markdown_lines(block: Block) -> list[str]:
    title = [f"### {markdown(block.title)}", ""] if block.title else []
    return title + _markdown_body(block)


def _markdown_body(block: Block) -> list[str]:
    match block:
        case Table():
            return _markdown_table(block)
        case Facts():
            return [f"* **{name}**: {_cell(value)}" for name, value in block.pairs]
        case Items():
            return [_markdown_item(line) for line in block.lines]
    return [_excerpt(text) for text in block.texts]


def _markdown_item(text: str) -> str:
    return f"* {markdown(_on_one_line(text), begins=True)}"


def _excerpt(text: str) -> str:
    if "\n" not in text:
        return _markdown_item(text)
    # An excerpt of the policy needs its line breaks, and its carets their columns.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _markdown_table(table: Table) -> list[str]:
    titles = [markdown(title) for title in table.columns]
    rules = ["---:" if title in table.right else "---" for title in table.columns]
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    return ["| " + " | ".join(cells) + " |" for cells in (titles, rules, *rows)]


def _cell(text: str) -> str:
    return markdown(_on_one_line(text))
