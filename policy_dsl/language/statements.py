"""DSL text cut into statements and comments, before any of it is understood.

Statements end with `;` or a newline; `#` starts a comment; `on <target> {` and `}` open and
close a block. Quoted texts and `/…/` may hold any of these characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from policy_dsl.diagnostics import Diagnostic, Span, diagnostic
from policy_dsl.language.fragments import Fragment

_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"?|\$\{[^}\n]*\}?|[#;{}\n/()\[\],]|[^\s"$#;{}/()\[\],]+|\$')
_CLOSED = re.compile(r'"(?:[^"\\]|\\.)*"')
_REGEX = re.compile(r"/(?:[^/\\\n]|\\.)+/")
_BLOCK = re.compile(r"\s*on\s+(\S+)\s*$")
# Where one of these stands before a slash, a regular expression begins; elsewhere it divides.
_BEFORE_REGEX = {None, ",", "(", "in", "and", "except", "test"}


@dataclass(frozen=True)
class Statement:
    """One statement without its end. `block` is the target of the `on` block around it."""

    body: Fragment
    block: str | None = None


@dataclass(frozen=True)
class Opening:
    """`on <target> {`; closing: its `}`."""

    target: Fragment
    closing: bool = False


@dataclass(frozen=True)
class Remark:
    """A comment's text with its `#`, or `` for blank lines; `trailing` as in Comment."""

    text: str
    trailing: bool
    span: Span | None = None


Piece = Statement | Opening | Remark


@dataclass
class Splitting:
    """The pieces of a text, in order, and what is wrong with its brackets and quotes."""

    pieces: list[Piece] = field(default_factory=list)
    findings: list[Diagnostic] = field(default_factory=list)


class _Splitter:
    """Walks over the tokens once, keeping the start of the open statement."""

    def __init__(self, fragment: Fragment) -> None:
        self._all = fragment
        self._out = Splitting()
        self._start = 0
        self._before: str | None = None
        self._depth = 0
        self._broken = False
        self._block: Fragment | None = None
        self._line_used = False
        self._blank = False

    def split(self) -> Splitting:
        for token, at in self._tokens():
            self._take(token, at)
            self._before = token
            if token in ("\n", ";") or self._start == at + len(token):
                self._before = None
        self._finish(len(self._all.text))
        if self._block is not None:
            self._out.findings.append(
                diagnostic("unclosed-block", self._block.span, target=self._block.text)
            )
        return self._out

    def _tokens(self) -> Iterator[tuple[str, int]]:
        text, at = self._all.text, 0
        while found := _TOKEN.search(text, at):
            start = found.start()
            token = found[0]
            # `where i < n // 8` holds slashes that divide.
            if token == "/" and self._before in _BEFORE_REGEX:
                regex = _REGEX.match(text, start)
                token = regex[0] if regex else token
            elif token == "#":
                end = text.find("\n", start)
                token = text[start : end if end >= 0 else len(text)]
            yield token, start
            at = start + len(token)

    def _take(self, token: str, at: int) -> None:
        if token == "\n":
            self._end_line(at)
        elif token == ";":
            self._finish(at)
            self._start = at + 1
        elif token[0] == "#":
            self._comment(token, at)
        elif token == "{":
            self._open(at)
        elif token == "}":
            self._close(at)
        elif token[0] == '"' and not _CLOSED.fullmatch(token):
            where = self._all.place(at, at + len(token))
            self._out.findings.append(diagnostic("unclosed-quote", where))
            self._broken = True

    def _end_line(self, at: int) -> None:
        self._finish(at)
        self._start = at + 1
        if not self._line_used:
            self._blank = True
        self._line_used = False

    def _comment(self, token: str, at: int) -> None:
        # Asked before the statement ends: a comment beside a rule belongs to that rule.
        trailing = self._line_used or bool(self._all.text[self._start : at].strip())
        self._finish(at)
        self._start = at + len(token)
        span = self._all.place(at, at + len(token))
        self._add(Remark(token.strip(), trailing, span))

    def _finish(self, at: int) -> None:
        body = self._all[self._start : at].strip()
        # A statement with an open quote has its finding; parsing it would add a second one.
        if body.text and not self._broken:
            self._add(Statement(body, self._block.text if self._block else None))
        self._depth, self._broken = 0, False

    def _open(self, at: int) -> None:
        block = _BLOCK.match(self._all.text, self._start, at)
        # Braces that open no block are left to the grammar, which names what it expected.
        if block is None or self._block is not None:
            self._depth += 1
            return
        self._block = self._all[block.start(1) : block.end(1)]
        self._add(Opening(self._block))
        self._start = at + 1

    def _close(self, at: int) -> None:
        if self._depth:
            self._depth -= 1
            return
        self._finish(at)
        self._start = at + 1
        brace = self._all[at : at + 1]
        if self._block is None:
            self._out.findings.append(diagnostic("stray-brace", brace.span))
            return
        self._add(Opening(self._block, closing=True))
        self._block = None

    def _add(self, piece: Piece) -> None:
        if self._blank and self._out.pieces:
            self._out.pieces.append(Remark("", False))
        self._blank = False
        self._line_used = True
        self._out.pieces.append(piece)


def split_statements(fragment: Fragment) -> Splitting:
    """The statements, blocks, comments and blank lines of a DSL text, in order."""
    return _Splitter(fragment).split()
