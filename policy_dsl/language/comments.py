"""Comments tied to the statements, keys and items that they precede or are beside."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from yaml.nodes import MappingNode, Node, ScalarNode

from policy_dsl.policy import Comment


class Remarks:
    """Keeps comments until what they belong to turns up; `comments` are those that found it.

    head: what a blank line parts from the first statement is about the whole text.
    """

    def __init__(self, *, head: bool) -> None:
        self.comments: list[Comment] = []
        self.waiting: list[tuple[str, int]] = []
        self._head = head

    def wait(self, text: str, column: int = 0) -> None:
        """Takes a comment that belongs to what follows, or `` for a blank line."""
        self.waiting.append((text, column))

    def beside(self, anchor: str, text: str) -> None:
        """Takes a comment on the line of its statement."""
        self.comments.append(Comment(anchor, text, trailing=True))

    def belong(self, anchor: str, column: int = 0, block_end: str | None = None) -> None:
        """Gives what waits to the statement at this column, and what is deeper to `block_end`."""
        waiting = self.waiting
        texts = [text for text, _ in waiting]
        if self._head and "" in texts:
            cut = len(texts) - texts[::-1].index("")
            self.comments += [Comment("^", text) for text in texts[: cut - 1]]
            waiting = waiting[cut:]
        for text, at in waiting:
            self.comments.append(Comment((block_end if at > column else None) or anchor, text))
        self.waiting, self._head = [], False

    def end(self, anchor: str = "") -> list[Comment]:
        """All comments; what still waits belongs to the end of the text or block."""
        return self.comments + [Comment(anchor, text) for text, _ in self.waiting]


class Place(NamedTuple):
    """Where something is that comments may belong to: its offsets and its anchor.

    block_end: the anchor for deeper comments that follow it, None if it ends no block.
    """

    start: int
    stop: int
    anchor: str
    block_end: str | None = None


def place_of(first: Node, value: Node, anchor: str, block_end: str | None = None) -> Place:
    """The place of a value, or of a key (`first`) with its value."""
    stops = [stop for _, stop in _scalars("", value)]
    return Place(first.start_mark.index, max(stops, default=0), anchor, block_end)


class _Line(NamedTuple):
    start: int
    content: str
    comment: str | None
    column: int


def yaml_comments(text: str, root: Node, places: Sequence[Place]) -> list[Comment]:
    """Every comment of the text outside its scalars, and single blank lines as empty ones."""
    ahead = sorted(places, reverse=True)
    remarks = Remarks(head=True)
    last: Place | None = None
    for line in _lines(text, root):
        here = []
        while ahead and ahead[-1].start < line.start + len(line.content):
            here.append(ahead.pop())
        if line.content and here:
            block_end = last.block_end if last else None
            if block_end == here[0].block_end:
                block_end = None
            remarks.belong(here[0].anchor, line.column, block_end)
            last = here[-1]
        if line.comment is None:
            blank = bool(remarks.waiting) and not remarks.waiting[-1][0]
            if not line.content and not blank and (remarks.waiting or last):
                remarks.wait("", -1)
        elif line.content and here and last:
            remarks.beside(last.anchor, line.comment)
        elif last and line.start < last.stop:
            remarks.comments.append(Comment(last.anchor, line.comment))
        else:
            remarks.wait(line.comment, line.column)
    while remarks.waiting and not remarks.waiting[-1][0]:
        remarks.waiting.pop()
    end = last.block_end if last else None
    # What is not indented there is about the whole text.
    tail = [Comment((end if column else "") or "", text) for text, column in remarks.waiting]
    return remarks.comments + tail


def _scalars(text: str, node: Node) -> list[tuple[int, int]]:
    """Start and end of every scalar; a block text ends before the blank lines after it."""
    if isinstance(node, ScalarNode):
        start, end = node.start_mark.index, node.end_mark.index
        return [(start, start + len(text[start:end].rstrip()) if text else end)]
    children = node.value
    if isinstance(node, MappingNode):
        children = [part for pair in node.value for part in pair]
    return [span for child in children for span in _scalars(text, child)]


def _lines(text: str, root: Node) -> Iterator[_Line]:
    """The lines of a text, those inside a scalar left out: a `#` there begins no comment."""
    scalars = sorted(_scalars(text, root))
    starts = [start for start, _ in scalars]

    def inside(position: int) -> bool:
        index = bisect_right(starts, position) - 1
        start, end = scalars[index] if index >= 0 else (0, 0)
        if not start <= position < end:
            return False
        # The header line of a block text may end in a comment.
        return text[start] not in "|>" or text.find("\n", start, position + 1) >= 0

    at = 0
    for raw in text.splitlines(keepends=True):
        end = at + len(raw)
        if not inside(at - 1) or not inside(at):
            cut = text.find("#", at, end)
            while cut >= 0 and ((cut > at and text[cut - 1] not in " \t") or inside(cut)):
                cut = text.find("#", cut + 1, end)
            content = text[at : cut if cut >= 0 else end].rstrip()
            comment = text[cut:end].strip() if cut >= 0 else None
            yield _Line(at, content, comment, len(raw) - len(raw.lstrip(" ")))
        at = end
