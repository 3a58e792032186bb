"""Reports as values, rendered as plain text or markdown: facts, tables, lists.

What they hold may come from anywhere, and is escaped when it becomes text.
"""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

from policy_dsl.diagnostics import Diagnostic
from policy_dsl.documents import FindingEntry, entry_of
from policy_dsl.escaping import columns, escaped, markdown

# Longer than names and paths are; what is cut is whole in the JSON form.
LONGEST_CELL = 4096
GAP = "  "
T = TypeVar("T")
K = TypeVar("K")
D = TypeVar("D")


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under the titles of their columns.

    right: the columns of figures. leaving: those that go where the width is short, in this order.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    right: Collection[str] = ()
    leaving: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """Pairs of a word and its value, values aligned."""

    pairs: Sequence[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Items:
    """Entries of a list under a title, each on one line."""

    lines: Sequence[str]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Texts of several lines under a title, such as findings; they are escaped already."""

    texts: Sequence[str]
    title: str = ""


Block = Table | Facts | Items | Rendered


def by_key(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items that have each key, keys and items in the order of first sight."""
    members: dict[K, list[T]] = {}
    for item in items:
        members.setdefault(key(item), []).append(item)
    return members


def entries_of(document: type[D], values: Iterable[object], /, **renamed: str) -> list[D]:
    """The entry of each value, as `entry_of` makes it. renamed: key -> the attribute it is."""
    return [
        entry_of(document, value, **{key: attrgetter(renamed[key])(value) for key in renamed})
        for value in values
    ]


def sizes_text(shape: Iterable[int]) -> str:
    """`3072x1536`: a shape as reports show it."""
    return "x".join(map(str, shape))


def render_text(blocks: Iterable[Block], *, width: int | None = None) -> str:
    """The blocks as text, a blank line between them; tables lose columns to fit `width`."""
    return "\n\n".join("\n".join(_text_lines(block, width)) for block in blocks) + "\n"


def render_markdown(blocks: Iterable[Block]) -> str:
    """The blocks as GitHub markdown."""
    shown = []
    for block in blocks:
        title = [f"### {markdown(block.title)}", ""] if block.title else []
        shown.append("\n".join([*title, *_markdown_lines(block)]))
    return "\n\n".join(shown) + "\n"


def _on_one_line(text: str) -> str:
    return escaped(text, longest=LONGEST_CELL)


def _text_lines(block: Block, width: int | None) -> list[str]:
    indent = GAP if block.title else ""
    match block:
        case Table():
            lines = _table_lines(block, width and width - len(indent))
        case Facts():
            longest = max(map(len, dict(block.pairs)), default=0)
            lines = [f"{name:<{longest}}{GAP}{_on_one_line(value)}" for name, value in block.pairs]
        case Items():
            lines = list(map(_on_one_line, block.lines))
        case Rendered():
            lines = "\n".join(block.texts).split("\n")
    # What is under a title is indented, so that titles are found by the eye.
    lines = [f"{indent}{line}".rstrip() for line in lines]
    return [block.title, *lines] if block.title else lines


def _table_lines(table: Table, width: int | None) -> list[str]:
    cells = [table.columns, *(list(map(_on_one_line, row)) for row in table.rows)]
    # The widest cell decides, titles included.
    widths = [max(map(columns, column)) for column in zip(*cells, strict=True)]
    shown = list(range(len(widths)))
    for title in table.leaving:
        if width is None or sum(widths[at] + len(GAP) for at in shown) - len(GAP) <= width:
            break
        shown.remove(table.columns.index(title))
    lines = []
    for row in cells:
        line = []
        for at in shown:
            space = " " * (widths[at] - columns(row[at]))
            line.append(space + row[at] if table.columns[at] in table.right else row[at] + space)
        lines.append(GAP.join(line).rstrip())
    return [lines[0], "-" * max(map(columns, lines)), *lines[1:]]


def _markdown_lines(block: Block) -> list[str]:
    match block:
        case Table():
            rules = ["---:" if title in block.right else "---" for title in block.columns]
            rows = (map(_markdown_cell, row) for row in block.rows)
            cells = (map(markdown, block.columns), rules, *rows)
            return [f"| {' | '.join(row)} |" for row in cells]
        case Facts():
            return [f"* **{name}**: {_markdown_cell(value)}" for name, value in block.pairs]
        case Items():
            return list(map(_markdown_item, block.lines))
    return [_excerpt(text) if "\n" in text else _markdown_item(text) for text in block.texts]


def _markdown_cell(text: str) -> str:
    return markdown(_on_one_line(text))


def _markdown_item(text: str) -> str:
    return f"* {markdown(_on_one_line(text), begins=True)}"


def _excerpt(text: str) -> str:
    # An excerpt of the policy needs its line breaks, and its carets their columns.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def finding_json(finding: Diagnostic) -> FindingEntry:
    """The diagnostic as a JSON object; file, line and column are null without a place."""
    file, line, column = place_of(finding)
    return entry_of(FindingEntry, finding, file=file, line=line, column=column)


def place_of(finding: Diagnostic) -> tuple[str | None, int | None, int | None]:
    """File, line and column of a diagnostic; None without a place."""
    return finding.span.place if finding.span else (None, None, None)
