"""Reports as values, rendered as plain text or markdown: facts, tables, lists.

What they hold may come from anywhere, and is escaped when it becomes text.

blocks ── render_text(blocks, width) ──> str
       └─ render_markdown(blocks) ─────> str
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from policy_dsl.escaping import columns, escaped, markdown

# Longer than names and paths are; what is cut is whole in the JSON form.
LONGEST_CELL = 4096
GAP = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, whether figures stand right, and when it may go.

    drop: where the width is short, columns leave in the order 1, 2, …; 0 stays always.
    """

    title: str
    right: bool = False
    drop: int = 0


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under columns."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""


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
    # What stands under a title is set in, so that titles are found by the eye.
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
    rows = tuple(tuple(map(_on_one_line, row)) for row in table.rows)
    table = replace(table, rows=rows)
    shown = _fitting_columns(table, width)
    cells = [[column.title for column in table.columns], *table.rows]
    widths = {at: max(columns(row[at]) for row in cells) for at in shown}
    lines = []
    for row in cells:
        aligned = [_aligned(row[at], widths[at], right=table.columns[at].right) for at in shown]
        lines.append(GAP.join(aligned).rstrip())
    return [lines[0], "-" * max(map(columns, lines)), *lines[1:]]


def _aligned(cell: str, width: int, *, right: bool) -> str:
    space = " " * (width - columns(cell))
    return space + cell if right else cell + space


def _fitting_columns(table: Table, width: int | None) -> list[int]:
    """Indices of the columns that are shown within `width` characters."""
    shown = list(range(len(table.columns)))
    cells = [[column.title for column in table.columns], *table.rows]
    leaving = sorted((column.drop, at) for at, column in enumerate(table.columns) if column.drop)
    for _, at in leaving:
        # The widest cell decides, titles included.
        total = sum(max(columns(row[i]) for row in cells) for i in shown)
        if width is None or total + len(GAP) * (len(shown) - 1) <= width:
            break
        shown.remove(at)
    return shown


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
    titles = [markdown(column.title) for column in table.columns]
    rules = ["---:" if column.right else "---" for column in table.columns]
    rows = [[_cell(cell) for cell in row] for row in table.rows]
    return ["| " + " | ".join(cells) + " |" for cells in (titles, rules, *rows)]


def _cell(text: str) -> str:
    return markdown(_on_one_line(text))
