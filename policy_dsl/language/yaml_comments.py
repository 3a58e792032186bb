"""The comments of a YAML text, tied to the keys and items they stand before or beside."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from yaml.nodes import MappingNode, Node, ScalarNode

from policy_dsl.policy import Comment


class Place(NamedTuple):
    """Where something stands that comments may belong to: its offsets and its anchor.

    block_end: the anchor for deeper comments that follow it, None if it ends no block.
    """

    start: int
    stop: int
    anchor: str
    block_end: str | None = None


class _Line(NamedTuple):
    start: int
    content: str
    comment: str | None
    column: int


def place_of(first: Node, value: Node, anchor: str, *, block_end: str | None = None) -> Place:
    """The place of a value, or of a key (`first`) with its value."""
    stops = [stop for _, stop in _scalars("", value)]
    return Place(first.start_mark.index, max(stops, default=0), anchor, block_end)


def yaml_comments(text: str, root: Node, places: Sequence[Place]) -> list[Comment]:
    """Every comment of the text outside its scalars, and single blank lines as empty ones."""
    collector = _Collector(sorted(places))
    for line in _Text(text, root).lines():
        collector.take(line)
    return collector.end()


class _Collector:
    """Walks over the lines, keeping comments until the place they belong to turns up."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = list(places)
        self._waiting: list[tuple[str, int]] = []
        self._found: list[Comment] = []
        self._last: Place | None = None
        self._head = True

    def take(self, line: _Line) -> None:
        here = self._starting_in(line)
        if not line.content and line.comment is None:
            self._blank()
        elif not line.content:
            self._alone(line.comment or "", line)
        elif here:
            self._belong(here[0], line.column)
            self._last = here[-1]
        if line.content and line.comment is not None:
            self._beside(line, bool(here))

    def end(self) -> list[Comment]:
        while self._waiting and not self._waiting[-1][0]:
            self._waiting.pop()
        block_end = self._last.block_end if self._last else None
        for text, column in self._waiting:
            self._found.append(Comment((block_end if column else None) or "", text))
        return self._found

    def _starting_in(self, line: _Line) -> list[Place]:
        here = []
        end = line.start + len(line.content)
        while self._places and self._places[0].start < end:
            here.append(self._places.pop(0))
        return here

    def _blank(self) -> None:
        something = self._waiting or self._last
        if something and not (self._waiting and not self._waiting[-1][0]):
            self._waiting.append(("", -1))

    def _beside(self, line: _Line, starts_here: bool) -> None:
        comment = line.comment or ""
        if starts_here and self._last is not None:
            self._found.append(Comment(self._last.anchor, comment, True))
        else:
            self._alone(comment, line)

    def _alone(self, comment: str, line: _Line) -> None:
        if self._last is not None and line.start < self._last.stop:
            self._found.append(Comment(self._last.anchor, comment))
        else:
            self._waiting.append((comment, line.column))

    def _belong(self, place: Place, column: int) -> None:
        waiting = self._waiting
        texts = [text for text, _ in waiting]
        if self._head and "" in texts:
            cut = len(texts) - texts[::-1].index("")
            self._found += [Comment("^", text) for text in texts[: cut - 1]]
            waiting = waiting[cut:]
        block_end = self._last.block_end if self._last else None
        if block_end == place.block_end:
            block_end = None
        for text, at in waiting:
            deeper = block_end if at > column else None
            self._found.append(Comment(deeper or place.anchor, text))
        self._waiting, self._head = [], False


def _scalars(text: str, node: Node) -> list[tuple[int, int]]:
    if isinstance(node, ScalarNode):
        start, end = node.start_mark.index, node.end_mark.index
        # A block text ends before the blank lines that follow it.
        return [(start, start + len(text[start:end].rstrip()) if text else end)]
    children = node.value
    if isinstance(node, MappingNode):
        children = [each for pair in node.value for each in pair]
    return [span for child in children for span in _scalars(text, child)]


class _Text:
    """A text whose scalars are known: a `#` inside one begins no comment."""

    def __init__(self, text: str, root: Node) -> None:
        self._text = text
        self._scalars = sorted(_scalars(text, root))
        self._starts = [start for start, _ in self._scalars]

    def lines(self) -> Iterator[_Line]:
        """The text's lines, those inside a scalar left out."""
        at = 0
        for raw in self._text.splitlines(keepends=True):
            end = at + len(raw)
            if not self._covers(at - 1) or not self._covers(at):
                yield self._split(at, end)
            at = end

    def _split(self, at: int, end: int) -> _Line:
        raw = self._text[at:end]
        hash_at = self._comment_start(at, end)
        content = self._text[at : hash_at if hash_at >= 0 else end].rstrip()
        column = len(raw) - len(raw.lstrip(" "))
        comment = self._text[hash_at:end].strip() if hash_at >= 0 else None
        return _Line(at, content, comment, column)

    def _comment_start(self, at: int, end: int) -> int:
        position = self._text.find("#", at, end)
        while position >= 0:
            spaced = position == at or self._text[position - 1] in " \t"
            if spaced and not self._covers(position):
                return position
            position = self._text.find("#", position + 1, end)
        return -1

    def _covers(self, position: int) -> bool:
        index = bisect_right(self._starts, position) - 1
        start, end = self._scalars[index] if index >= 0 else (0, 0)
        if not start <= position < end:
            return False
        # The header line of a block text may end in a comment.
        return self._text[start] not in "|>" or self._text.find("\n", start, position + 1) >= 0
