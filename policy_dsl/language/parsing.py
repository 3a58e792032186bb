"""DSL text cut into statements and comments; one statement's text as its syntax tree.

Statements end with `;` or a newline; `#` starts a comment; `on <target> {` and `}` open and
close a block. Quoted texts and `/…/` may hold any of these characters. What the grammar does
not take becomes a message in the users' words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from policy_dsl import room
from policy_dsl.diagnostics import Diagnostic, Span, diagnostic, did_you_mean
from policy_dsl.language.fragments import Fragment
from policy_dsl.language.keys import KEYS, mistakes
from policy_dsl.policy import Comment

Syntax = Tree[Token]
# Deeper nesting than this cannot be meant; the trees are walked recursively.
MAX_NESTING = 32
MAX_STATEMENT = 20_000
_TOKEN = re.compile(r'"(?:[^"\\\n]|\\.)*"?|\$\{[^}\n]*\}?|[#;{}\n/()\[\],]|[^\s"$#;{}/()\[\],]+|\$')
_CLOSED = re.compile(r'"(?:[^"\\]|\\.)*"')
_REGEX = re.compile(r"/(?:[^/\\\n]|\\.)+/")
_BLOCK = re.compile(r"\s*on\s+(\S+)\s*$")
# A regular expression begins at a slash after one of these; after anything else it divides.
_BEFORE_REGEX = {None, ",", "(", "in", "and", "except", "test"}
_FIRST_WORDS = ("otherwise", "prune", "clear", *(key.word.strip() for key in KEYS if key.word))
# The words of statements whose values are filled with variables one by one.
_VALUE_WORDS = ("TEXT_KEY", "LIST_KEY", "FIELD_KEY", "_CLEAR", "_VAR", "_METADATA")

_END = "the end of the statement"
# As JavaScript and Perl write them: `/…/i`.
_FLAGS = re.compile(r"[is]{1,2}$")
_WORD_THERE = re.compile(r'\s*("(?:[^"\\\n]|\\.)*"|[\w.+*?$@!-]+|\S|$)')


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


class Splitting:
    """The pieces of a text, in order, and what is wrong with its brackets and quotes."""

    def __init__(self, fragment: Fragment) -> None:
        self.pieces: list[Piece] = []
        self.findings: list[Diagnostic] = []
        self._all = fragment
        # Where the open statement starts, the token before, and how deep its braces are.
        self._start = 0
        self._before: str | None = None
        self._depth = 0
        self._broken = False
        self._block: Fragment | None = None
        self._line_used = False
        self._blank = False
        for token, at in self._tokens():
            self._take(token, at)
            ended = token in ("\n", ";") or self._start == at + len(token)
            self._before = None if ended else token
        self._finish(len(fragment.text))
        if self._block is not None:
            self._report("unclosed-block", self._block, target=self._block.text)

    def _tokens(self) -> Iterator[tuple[str, int]]:
        text, at = self._all.text, 0
        while found := _TOKEN.search(text, at):
            start, token = found.start(), found[0]
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
        after = at + len(token)
        if token == "\n":
            self._finish(at, after)
            self._blank = self._blank or not self._line_used
            self._line_used = False
        elif token == ";":
            self._finish(at, after)
        elif token[0] == "#":
            # Asked before the statement ends: a comment beside a rule belongs to that rule.
            trailing = self._line_used or bool(self._all.text[self._start : at].strip())
            self._finish(at, after)
            self._add(Remark(token.strip(), trailing, self._all.place(at, after)))
        elif token == "{":
            self._open(at)
        elif token == "}":
            self._close(at)
        elif token[0] == '"' and not _CLOSED.fullmatch(token):
            self._report("unclosed-quote", self._all[at:after])
            self._broken = True

    def _finish(self, at: int, start: int = 0) -> None:
        """Ends the open statement; the next one begins at `start`."""
        body = self._all[self._start : at].strip()
        # A statement with an open quote has its finding; parsing it would add a second one.
        if body.text and not self._broken:
            self._add(Statement(body, self._block.text if self._block else None))
        self._start, self._depth, self._broken = start, 0, False

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
        self._finish(at, at + 1)
        if self._block is None:
            self._report("stray-brace", self._all[at : at + 1])
        else:
            self._add(Opening(self._block, closing=True))
        self._block = None

    def _add(self, piece: Piece) -> None:
        if self._blank and self.pieces:
            self.pieces.append(Remark("", False))
        self._blank, self._line_used = False, True
        self.pieces.append(piece)

    def _report(self, code: str, where: Fragment, **facts: Any) -> None:
        self.findings.append(diagnostic(code, where.span, **facts))


@cache
def _parser() -> Lark:
    grammar = (room("grammar") / "policy.lark").read_text(encoding="utf-8")
    starts = ["statement", "expression"]
    return Lark(grammar, parser="lalr", start=starts, propagate_positions=True)


@cache
def _value_words() -> re.Pattern[str]:
    terminals = map(_parser().get_terminal, _VALUE_WORDS)
    return re.compile("|".join(terminal.pattern.to_regexp() for terminal in terminals))


def holds_values(statement: str) -> bool:
    """Whether variables are filled into the values of a statement, not into its text."""
    return _value_words().match(statement) is not None


def parse(fragment: Fragment, start: str = "statement") -> Syntax | Diagnostic:
    """The syntax tree of a statement (or `expression`), or the defect that prevents it.

    Positions in the tree are those in `fragment.text`.
    """
    if defect := _too_much(fragment):
        return defect
    try:
        return _parser().parse(fragment.text, start=start)
    except UnexpectedInput as failure:
        return _explain(fragment, failure)


def place(fragment: Fragment, node: Syntax | Token) -> Span:
    """Where a node of the tree is in the user's text."""
    if isinstance(node, Token):
        return fragment.place(node.start_pos or 0, node.end_pos or 0)
    if node.meta.empty:
        return fragment.span
    return fragment.place(node.meta.start_pos, node.meta.end_pos)


def children(node: Syntax) -> list[Syntax]:
    """The subtrees of a node, tokens left out."""
    return [child for child in node.children if isinstance(child, Tree)]


def tokens(node: Syntax) -> list[Token]:
    """The tokens directly under a node."""
    return [child for child in node.children if isinstance(child, Token)]


def _too_much(fragment: Fragment) -> Diagnostic | None:
    if len(fragment.text) > MAX_STATEMENT:
        where = fragment.place(0, 1)
        return diagnostic("statement-too-long", where, limit=MAX_STATEMENT)
    for open_at in _parentheses(fragment.text):
        if len(open_at) > MAX_NESTING:
            where = fragment.place(open_at[-1], open_at[-1] + 1)
            return diagnostic("nested-too-deeply", where, limit=MAX_NESTING)
    return None


def _parentheses(text: str) -> Iterator[list[int]]:
    """Where parentheses are open, after each one that no quotes hold."""
    open_at: list[int] = []
    for found in re.finditer(r'"(?:[^"\\\n]|\\.)*"|[()]', text):
        if found[0] == "(":
            open_at.append(found.start())
        elif found[0] == ")":
            del open_at[-1:]
        yield open_at


def _explain(fragment: Fragment, failure: UnexpectedInput) -> Diagnostic:
    text = fragment.text
    at_end = isinstance(failure, UnexpectedToken) and failure.token.type == "$END"
    at = len(text) if at_end else failure.pos_in_stream or 0
    there = _WORD_THERE.match(text, at)
    start, end = there.span(1) if there else (at, at)
    word = text[start:end]
    odd = text[at : at + 1]
    if odd.isspace() and not odd.isascii():
        start, end, word = at, at + 1, f"U+{ord(odd):04X}, which is not a plain space"
    accepted = set[str]()
    if isinstance(failure, UnexpectedToken):
        accepted = set(failure.accepts or failure.expected)
    elif isinstance(failure, UnexpectedCharacters):
        accepted = set(failure.allowed)
    if word in ("", ":") and "RPAR" in accepted:
        *_, open_at = [[0], *_parentheses(text)]
        at = open_at[-1] if open_at else 0
        return diagnostic("unclosed-parenthesis", fragment.place(at, at + 1))
    if word == ":" and ":" in text[:start]:
        return diagnostic("second-colon", fragment.place(start, end))
    expected = mistakes()["expected"].items()
    return diagnostic(
        "syntax",
        fragment.place(start, end),
        suggestion=_cure(text, start, word, accepted),
        expected=next((words for kind, words in expected if kind in accepted), _END),
        found=word if word[:1] == '"' or " " in word else f'"{word}"' if word else _END,
    )


def _cure(text: str, start: int, word: str, accepted: set[str]) -> str | None:
    before = text[:start].strip()
    if before == "not":
        return f'write "all except {word}"'
    if _FLAGS.match(word) and text[:start].endswith("/"):
        return f'write "(?{word})" at the beginning of the regular expression'
    if "COLON" in accepted and before not in _FIRST_WORDS:
        close = did_you_mean(before, _FIRST_WORDS)
        if close:
            return close
    for kinds, pattern, cure in mistakes()["cures"]:
        if accepted.intersection(kinds.split()) and re.match(pattern, word):
            return str(cure.format(word=word))
    missing = "COLON" in accepted and ":" not in text and word and not before.endswith(")")
    return 'a ":" comes before the treatment' if missing else None
