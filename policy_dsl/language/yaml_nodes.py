"""YAML text -> composed nodes that know their place, and comments; nothing is constructed.

Anchors, aliases, tags and deep nesting are refused while composing, before anything expands.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from policy_dsl.diagnostics import Diagnostic, PolicyError, SourceText, Span, diagnostic, fail
from policy_dsl.language.parsing import MAX_NESTING, Fragment, mistakes
from policy_dsl.language.read_dsl import Remarks
from policy_dsl.policy import Comment

# The library takes some 50 microseconds for each.
MAX_VALUES = 50_000
_NULLS = ("", "~", "null", "Null", "NULL")
# What may mean one visible character, in double quotes, in single quotes and elsewhere.
_UNITS = {
    '"': re.compile(
        r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|\r?\n\s*|.)|\S", re.DOTALL
    ),
    "'": re.compile(r"''|\S"),
    "": re.compile(r"\S"),
}
# A `#` begins a comment at the start of a line, and after a space.
_COMMENT = re.compile(r"(?:^|(?<=[ \t\r]))#", re.MULTILINE)
_SPACE_ESCAPES = set("ntrvf _NLP\n\r")


class _Loader(yaml.SafeLoader):
    """Composes nodes, refusing what a policy has no use for."""

    depth = 0
    count = 0

    def __init__(self, source: SourceText) -> None:
        super().__init__(source.text)
        self._source = source

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        span = Span(self._source, event.start_mark.index, event.end_mark.index)
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            cure = "a text that begins with * or & must be quoted"
            raise fail("yaml-alias", span, suggestion=cure)
        if getattr(event, "tag", None) is not None:
            raise fail("yaml-tag", span, tag=event.tag)
        if self.depth >= MAX_NESTING:
            raise fail("nested-too-deeply", span, limit=MAX_NESTING)
        self.count += 1
        if self.count > MAX_VALUES:
            path, limit = self._source.name, f"{MAX_VALUES:,}"
            count = f"more than {limit}"
            raise fail("too-many-parts", path=path, count=count, what="values", limit=limit)
        self.depth += 1
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def compose(source: SourceText) -> Node | None:
    """The root node of a YAML text; None if it is empty.

    Raises: PolicyError if it is not YAML, or YAML that policies do not use.
    """
    loader = _Loader(source)
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as failure:
        raise PolicyError([_explain(source, failure)]) from None
    except (yaml.YAMLError, ValueError, OverflowError, IndexError) as failure:
        reason = str(failure).splitlines()[0]
        raise fail("bad-yaml", Span(source, 0, 1), reason=reason) from None
    finally:
        loader.dispose()


def span_of(source: SourceText, node: Node) -> Span:
    """Where a node is; of a mapping or list that spans lines, its first line."""
    start, end = node.start_mark.index, node.end_mark.index
    if not isinstance(node, ScalarNode) or node.style in ("|", ">"):
        end = start + len(source.text[start:end].partition("\n")[0])
    return Span(source, start, max(end, start))


def kind_of(node: Node) -> str:
    """What a node is, in the users' words."""
    if isinstance(node, SequenceNode):
        return "a list"
    if isinstance(node, MappingNode):
        return "a mapping"
    return "nothing" if is_null(node) else f'"{node.value}"'


def is_null(node: Node) -> bool:
    """Whether a node is an empty value."""
    return isinstance(node, ScalarNode) and node.style is None and node.value in _NULLS


def scalar_fragment(source: SourceText, node: ScalarNode) -> Fragment:
    """The value of a scalar, each character with its place in the file.

    Indentation, folding and escapes change white space only: the rest corresponds one to one.
    """
    start, quoted = node.start_mark.index, node.style in ("'", '"')
    # A block text begins on the next line.
    below = source.text.find("\n", start) + 1 or len(source.text)
    at = before = below if node.style in ("|", ">") else start + quoted
    units = list(_visible(source.text, at, node.end_mark.index - quoted, node.style or ""))
    if len(units) != sum(not char.isspace() for char in node.value):
        return Fragment.all_at(node.value, span_of(source, node))
    ahead, places = iter(units), list[tuple[int, int]]()
    for char in node.value:
        places.append((before, before) if char.isspace() else next(ahead))
        before = places[-1][1]
    starts, ends = [start for start, _ in places], [end for _, end in places]
    return Fragment(node.value, source, starts, ends, at)


def _visible(text: str, at: int, end: int, style: str) -> Iterator[tuple[int, int]]:
    """Start and end of everything in the file that means one visible character."""
    for unit in _UNITS.get(style, _UNITS[""]).finditer(text, at, end):
        code = unit[0][1:] if style == '"' else ""
        coded = len(code) > 1 and code[0] in "xuU"
        if not (chr(int(code[1:], 16)).isspace() if coded else code[:1] in _SPACE_ESCAPES):
            yield unit.span()


def _explain(source: SourceText, failure: yaml.MarkedYAMLError) -> Diagnostic:
    mark, problem = failure.problem_mark or failure.context_mark, failure.problem or "not YAML"
    at = max(min(mark.index if mark else 0, len(source.text) - 1), 0)
    span = Span(source, at, at + 1)
    line = source.line(span.place[1]).strip()
    if "mapping values are not allowed" in problem and line.startswith(("- ", "rules:")):
        text = line.removeprefix("rules:").strip().removeprefix("- ")
        shown = [f"  {part}" for part in map(str.strip, text.split(";")) if part]
        notes = ["write them as a text:", "rules: |", *shown]
        return diagnostic("several-statements", span, notes=notes)
    if "expected a single document" in (failure.context or ""):
        return diagnostic("several-documents", span)
    for pattern, words in mistakes()["yaml"].items():
        if match := re.search(pattern, problem):
            return diagnostic("bad-yaml", span, reason=words.format(*match.groups()))
    return diagnostic("bad-yaml", span, reason=problem)


class Place(NamedTuple):
    """Where something is that comments may belong to: its offsets and its anchor.

    block_end: the anchor for deeper comments that follow it, None if it ends no block.
    """

    start: int
    stop: int
    anchor: str
    block_end: str | None = None


def yaml_comments(text: str, root: Node, places: Sequence[Place]) -> list[Comment]:
    """Every comment of the text outside its scalars, and single blank lines as empty ones."""
    ahead = sorted(places, reverse=True)
    remarks, blank = Remarks(head=True), ("", -1)
    last = Place(-1, -1, "")
    for start, content, comment, column in _lines(text, root):
        here = []
        while ahead and ahead[-1].start < start + len(content):
            here.append(ahead.pop())
        begins = bool(content and here)
        if begins:
            block_end = last.block_end if last.block_end != here[0].block_end else None
            remarks.belong(here[0].anchor, column, block_end)
            last = here[-1]
        if comment is None:
            begun = remarks.waiting or last.anchor
            if not content and begun and remarks.waiting[-1:] != [blank]:
                remarks.waiting.append(blank)
        elif begins or start < last.stop:
            remarks.comments.append(Comment(last.anchor, comment, trailing=begins))
        else:
            remarks.waiting.append((comment, column))
    if remarks.waiting[-1:] == [blank]:
        remarks.waiting.pop()
    # What is not indented there is about the whole text.
    end = last.block_end or ""
    return remarks.comments + [Comment(end * bool(at), text) for text, at in remarks.waiting]


def scalar_spans(text: str, node: Node) -> list[tuple[int, int]]:
    """Start and end of every scalar; a block text ends before the blank lines after it."""
    if isinstance(node, ScalarNode):
        start, end = node.start_mark.index, node.end_mark.index
        return [(start, start + len(text[start:end].rstrip()) if text else end)]
    children = chain(*node.value) if isinstance(node, MappingNode) else node.value
    return [span for child in children for span in scalar_spans(text, child)]


def _lines(text: str, root: Node) -> Iterator[tuple[int, str, str | None, int]]:
    """Start, content, comment and column of each line that is not inside a scalar."""
    scalars = [(0, 0), *sorted(scalar_spans(text, root))]
    starts = [start for start, _ in scalars]

    def inside(position: int) -> bool:
        start, end = scalars[bisect_right(starts, position) - 1]
        # The header line of a block text may end in a comment.
        below = text.find("\n", start, position + 1) >= 0
        return start <= position < end and (below or text[start] not in "|>")

    at = 0
    for raw in text.splitlines(keepends=True):
        end = at + len(raw)
        if not inside(at - 1) or not inside(at):
            marks = (found.start() for found in _COMMENT.finditer(text, at, end))
            cut = next((mark for mark in marks if not inside(mark)), end)
            comment = text[cut:end].strip() or None
            yield at, text[at:cut].rstrip(), comment, len(raw) - len(raw.lstrip(" "))
        at = end
