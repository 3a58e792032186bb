"""Reports as values, rendered as plain text or markdown: facts, tables, lists.

blocks ── render_text(blocks, width) ──> str
       └─ render_markdown(blocks) ─────> str
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    """Lines of a list under a title."""

    lines: tuple[str, ...]
    title: str = ""


Block = Table | Facts | Items


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
            name_width = max((len(name) for name, _ in block.pairs), default=0)
            return [f"{name:<{name_width}}{GAP}{value}" for name, value in block.pairs]
        case Items():
            return "\n".join(block.lines).split("\n")


def _table_lines(table: Table, width: int | None) -> list[str]:
    shown = _fitting_columns(table, width)
    cells = [[column.title for column in table.columns], *table.rows]
    widths = {at: max(len(row[at]) for row in cells) for at in shown}
    lines = []
    for row in cells:
        aligned = [
            row[at].rjust(widths[at]) if table.columns[at].right else row[at].ljust(widths[at])
            for at in shown
        ]
        lines.append(GAP.join(aligned).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _fitting_columns(table: Table, width: int | None) -> list[int]:
    """Indices of the columns that are shown within `width` characters."""
    shown = list(range(len(table.columns)))
    cells = [[column.title for column in table.columns], *table.rows]
    leaving = sorted(
        (column.drop, at) for at, column in enumerate(table.columns) if column.drop
    )
    for _, at in leaving:
        # The widest cell decides, titles included.
        total = sum(max(len(row[i]) for row in cells) for i in shown) + len(GAP) * len(shown)
        if width is None or total - len(GAP) <= width:
            break
        shown.remove(at)
    return shown


def _markdown_lines(block: Block) -> list[str]:
    lines = [f"### {block.title}", ""] if block.title else []
    match block:
        case Table():
            return lines + _markdown_table(block)
        case Facts():
            return lines + [f"* **{name}**: {_escaped(value)}" for name, value in block.pairs]
        case Items():
            return lines + [_markdown_item(line) for line in block.lines]


def _markdown_item(text: str) -> str:
    # An excerpt of the policy needs its line breaks, and its carets their columns.
    if "\n" not in text:
        return f"* {_escaped(text)}"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _markdown_table(table: Table) -> list[str]:
    titles = [column.title for column in table.columns]
    rules = ["---:" if column.right else "---" for column in table.columns]
    return [_markdown_row(row) for row in (titles, rules, *table.rows)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    # Globs hold stars that markdown would read as emphasis.
    for char in "\\|*":
        text = text.replace(char, "\\" + char)
    return text.replace("<", "&lt;").replace("\n", "<br>")
