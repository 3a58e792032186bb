"""The text of a policy: its bounds, pieces that know their place, and their syntax trees.

A Fragment may be a part of the file, the value of a YAML scalar (indentation and escapes
gone), or a text in which variables are replaced: carets always point at what the user wrote.
What the grammar does not take becomes a message in the users' words.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedToken

from policy_dsl import packaged_table, room
from policy_dsl.diagnostics import Diagnostic, SourceText, Span, diagnostic, did_you_mean, fail
from policy_dsl.policy import KEYS, Scalar, Values

MAX_BYTES = 1 << 20
# A statement takes a tenth of a millisecond, and a comment a hundredth.
MAX_LINES = 10_000
# Controls, marks that turn the direction of writing, byte order marks inside, ends of lines
# that editors do not show: with them the text is not what its readers see.
_CONTROLS = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    "|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
# `$${` is a literal `${`; anything after a lone `${` must be a name and a closing brace.
VARIABLE = re.compile(r"\$\$\{|\$\{([^}\n]*)(\}?)")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)
# Deeper nesting than this cannot be meant; the trees are walked recursively.
MAX_NESTING = 32
MAX_STATEMENT = 20_000
Syntax = Tree[Token]
_FIRST_WORDS = ("otherwise", "prune", "clear", *(key.word.strip() for key in KEYS if key.word))
# The words of statements whose values are filled with variables one by one.
_VALUE_WORDS = ("TEXT_KEY", "LIST_KEY", "FIELD_KEY", "_CLEAR", "_VAR", "_METADATA")
_END = "the end of the statement"
# As JavaScript and Perl write them: `/…/i`.
_FLAGS = re.compile(r"[is]{1,2}$")
_WORD_THERE = re.compile(r'\s*("(?:[^"\\\n]|\\.)*"|[\w.+*?$@!-]+|\S|$)')
TRUTH = {"true": True, "false": False}
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,999})")
_FLOAT = re.compile(r"-?[0-9]+(?:\.[0-9]+(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)")


def checked(source: SourceText) -> SourceText:
    """The text without a byte order mark.

    Raises: PolicyError if it is larger than 1 MiB, has more than 10,000 lines and statements,
    or holds control characters.
    """
    ensure_short(source.name, source.text)
    if source.text.startswith(_BOM):
        source = SourceText(source.name, source.text.removeprefix(_BOM))
    if odd := _CONTROLS.search(source.text):
        span, written = Span(source, *odd.span()), f"U+{ord(odd[0]):04X}"
        cure = f"between quotes it is written \\u{ord(odd[0]):04x}"
        raise fail("control-character", span, suggestion=cure, written=written)
    return source


def ensure_short(name: str, *texts: str) -> None:
    """Raises: PolicyError if these are more characters, or lines, than policies may have."""
    if sum(map(len, texts)) > MAX_BYTES:
        raise fail("too-large", path=name, limit=f"{MAX_BYTES:,}")
    # At most so many lines and statements: what ends them, or a block.
    count = sum(1 + sum(map(text.count, "\n;}")) for text in texts)
    if count > MAX_LINES:
        what, limit = "lines and statements", f"{MAX_LINES:,}"
        raise fail("too-many-parts", path=name, count=f"{count:,}", what=what, limit=limit)


@dataclass(frozen=True)
class Fragment:
    """A text; character k of it is characters `starts[k]` up to `ends[k]` of `source`."""

    text: str
    source: SourceText
    starts: Sequence[int]
    ends: Sequence[int]
    at: int = 0

    @classmethod
    def whole(cls, source: SourceText) -> "Fragment":
        """All of a source text."""
        length = len(source.text)
        return cls(source.text, source, range(length), range(1, length + 1))

    @classmethod
    def all_at(cls, text: str, span: Span) -> "Fragment":
        """A text that replaces what is at `span`: each of its characters points there."""
        length = len(text)
        return cls(text, span.source, [span.start] * length, [span.end] * length, span.start)

    def __getitem__(self, part: slice) -> "Fragment":
        start, stop, _ = part.indices(len(self.text))
        starts, ends = self.starts[start:stop], self.ends[start:stop]
        return Fragment(self.text[start:stop], self.source, starts, ends, self._point(start))

    def _point(self, start: int) -> int:
        if start < len(self.starts):
            return self.starts[start]
        return self.ends[-1] if self.ends else self.at

    @property
    def span(self) -> Span:
        """Where all of it is."""
        return self.place(0, len(self.text))

    def place(self, start: int, stop: int) -> Span:
        """Where the characters `start` up to `stop` are; a point if there are none."""
        first = self._point(start)
        inside = start < stop <= len(self.text)
        return Span(self.source, first, max(self.ends[start:stop]) if inside else first)

    def strip(self) -> "Fragment":
        """The same without white space at both ends."""
        left = len(self.text) - len(self.text.lstrip())
        return self[left : max(left, len(self.text.rstrip()))]


def join(*parts: Fragment | str) -> Fragment:
    """One fragment of several; a plain text is where the one before ends, or the first begins."""
    first = next(part for part in parts if isinstance(part, Fragment))[0:0]
    text, starts, ends, at = "", list[int](), list[int](), first.at
    for part in parts:
        # Text that nobody wrote is at a point: a caret there is one column wide.
        point = ends[-1] if ends else at
        here = Span(first.source, point, point)
        piece = Fragment.all_at(part, here) if isinstance(part, str) else part
        at = at if starts else piece.at
        text += piece.text
        starts += piece.starts
        ends += piece.ends
    return Fragment(text, first.source, starts, ends, at)


def plain_scalar(text: str) -> Scalar:
    """A bare word as the value it looks like: a truth value, a number, or text."""
    if text in TRUTH:
        return TRUTH[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def substitute(fragment: Fragment, values: Values) -> tuple[Fragment, list[Diagnostic]]:
    """The fragment with every `${name}` replaced, and what is wrong with its variables."""
    parts: list[Fragment] = []
    findings: list[Diagnostic] = []
    done = 0
    for written in VARIABLE.finditer(fragment.text):
        span, name = fragment.place(*written.span()), written[1]
        # After a finding any value will do.
        value = "${" if name is None else values.get(name, "")
        if name is not None and not (written[2] and IDENTIFIER.fullmatch(name)):
            findings.append(diagnostic("malformed-variable", span, written=written[0]))
        elif name is not None and name not in values:
            cure = did_you_mean(name, values)
            findings.append(diagnostic("unknown-variable", span, suggestion=cure, name=name))
        # Truth values as policies write them, not as Python does.
        text = str(value).lower() if isinstance(value, bool) else str(value)
        parts += [fragment[done : written.start()], Fragment.all_at(text, span)]
        done = written.end()
    return join(*parts, fragment[done:]) if parts else fragment, findings


def quote(text: str) -> str:
    """The text in double quotes on one line, as DSL and YAML both read it back."""
    return f'"{"".join(map(_escaped, text))}"'


def unquote(quoted: str) -> str:
    """The text that double quotes hold; an unknown escape means its character."""
    return _ESCAPE.sub(_unescaped, quoted[1:-1])


def short_escapes(text: str) -> str:
    """A JSON text with `\\U…`, which JSON does not know, as the characters themselves."""
    return _ESCAPE.sub(lambda found: _unescaped(found) if found[1][0] == "U" else found[0], text)


def _escaped(char: str) -> str:
    if char.isprintable() or char in _ESCAPES:
        return _ESCAPES.get(char, char)
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else f"\\U{ord(char):08x}"


def _unescaped(found: re.Match[str]) -> str:
    code = found[1]
    if len(code) == 1:
        return _NAMED.get(code, code)
    number = int(code[1:], 16)
    return chr(number) if number <= 0x10FFFF else "\N{REPLACEMENT CHARACTER}"


def mistakes() -> Mapping[str, Any]:
    """What people write that the language does not take, and what to write instead."""
    return packaged_table(room("grammar") / "mistakes.yaml")


@cache
def _parser() -> Lark:
    grammar = (room("grammar") / "policy.lark").read_text(encoding="utf-8")
    starts = ["statement", "expression"]
    return Lark(grammar, parser="lalr", start=starts, propagate_positions=True)


@cache
def value_statement() -> re.Pattern[str]:
    """How statements begin into whose values variables are filled, not into the whole text."""
    terminals = map(_parser().get_terminal, _VALUE_WORDS)
    return re.compile("|".join(terminal.pattern.to_regexp() for terminal in terminals))


def parse(fragment: Fragment, start: str = "statement") -> Syntax | Diagnostic:
    """The syntax tree of a statement (or `expression`), or the defect that prevents it.

    Positions in the tree are those in `fragment.text`.
    """
    if len(fragment.text) > MAX_STATEMENT:
        return diagnostic("statement-too-long", fragment.place(0, 1), limit=MAX_STATEMENT)
    for open_at in _parentheses(fragment.text):
        if len(open_at) > MAX_NESTING:
            where = fragment.place(open_at[-1], open_at[-1] + 1)
            return diagnostic("nested-too-deeply", where, limit=MAX_NESTING)
    try:
        return _parser().parse(fragment.text, start=start)
    except (UnexpectedToken, UnexpectedCharacters) as failure:
        return _explain(fragment, failure)


def place(fragment: Fragment, node: Syntax | Token) -> Span:
    """Where a node of the tree is in the user's text."""
    if isinstance(node, Token):
        return fragment.place(node.start_pos or 0, node.end_pos or 0)
    meta = node.meta
    return fragment.span if meta.empty else fragment.place(meta.start_pos, meta.end_pos)


def children(node: Syntax) -> list[Syntax]:
    """The subtrees of a node, tokens left out."""
    return [child for child in node.children if isinstance(child, Tree)]


def tokens(node: Syntax) -> list[Token]:
    """The tokens directly under a node."""
    return [child for child in node.children if isinstance(child, Token)]


def _parentheses(text: str) -> Iterator[list[int]]:
    """Where parentheses are open, after each one that no quotes hold."""
    open_at: list[int] = []
    for found in re.finditer(r'"(?:[^"\\\n]|\\.)*"|[()]', text):
        if found[0] == "(":
            open_at.append(found.start())
        elif found[0] == ")":
            del open_at[-1:]
        yield open_at


def _explain(fragment: Fragment, failure: UnexpectedToken | UnexpectedCharacters) -> Diagnostic:
    text, at = fragment.text, failure.pos_in_stream or 0
    if isinstance(failure, UnexpectedToken):
        accepted = set(failure.accepts or failure.expected)
        at = len(text) if failure.token.type == "$END" else at
    else:
        accepted = set(failure.allowed)
    there = _WORD_THERE.match(text, at)
    start, end = there.span(1) if there else (at, at)
    word, odd = text[start:end], text[at : at + 1]
    if odd.isspace() and not odd.isascii():
        start, end, word = at, at + 1, f"U+{ord(odd):04X}, which is not a plain space"
    if word in ("", ":") and "RPAR" in accepted:
        *_, open_at = [[0], *_parentheses(text)]
        at = [0, *open_at][-1]
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
    close = did_you_mean(before, _FIRST_WORDS) if "COLON" in accepted else None
    if close and before not in _FIRST_WORDS:
        return close
    for kinds, pattern, cure in mistakes()["cures"]:
        if accepted.intersection(kinds.split()) and re.match(pattern, word):
            return str(cure.format(word=word))
    missing = "COLON" in accepted and ":" not in text and word and not before.endswith(")")
    return 'a ":" comes before the treatment' if missing else None
