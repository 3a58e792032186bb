"""The text of a policy: its bounds, and pieces of it that know where each character is.

A Fragment may be a part of the file, the value of a YAML scalar (indentation and escapes
gone), or a text in which variables are replaced: carets always point at what the user wrote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from policy_dsl.diagnostics import Diagnostic, SourceText, Span, diagnostic, did_you_mean, fail
from policy_dsl.policy import Values

MAX_BYTES = 1 << 20
# A statement takes a tenth of a millisecond, and a comment a hundredth.
MAX_LINES = 10_000
# What ends a line, a statement or a block.
_ENDS = "\n;}"
# Controls, marks that turn the direction of writing, byte order marks inside, ends of lines
# that editors do not show: with them the text is not what its readers see.
_CONTROLS = re.compile(
    "[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    "|[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]"
)
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"
# `$${` is a literal `${`; anything after a lone `${` must be a name and a closing brace.
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}\n]*)(\}?)")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)


def checked(source: SourceText) -> SourceText:
    """The text without a byte order mark.

    Raises: PolicyError if it is larger than 1 MiB, has more than 10,000 lines and statements,
    or holds control characters.
    """
    if len(source.text) > MAX_BYTES:
        raise fail("too-large", path=source.name, limit=f"{MAX_BYTES:,}")
    ensure_few(source.name, n_lines(source.text))
    if source.text.startswith(_BOM):
        source = SourceText(source.name, source.text.removeprefix(_BOM))
    if odd := _CONTROLS.search(source.text):
        code = f"{ord(odd[0]):04x}"
        cure = f"between quotes it is written \\u{code}"
        written = f"U+{code.upper()}"
        raise fail("control-character", Span(source, *odd.span()), suggestion=cure, written=written)
    return source


def n_lines(text: str) -> int:
    """The lines and statements of a text, at most."""
    return 1 + sum(map(text.count, _ENDS))


def ensure_few(name: str, count: int) -> None:
    """Raises: PolicyError if so many lines and statements are more than policies may have."""
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
    def of(cls, source: SourceText, start: int, end: int) -> Fragment:
        """The characters `start` up to `end` of a source text, as they are."""
        text = source.text[start:end]
        return cls(text, source, range(start, end), range(start + 1, end + 1), start)

    @classmethod
    def all_at(cls, text: str, span: Span) -> Fragment:
        """A text that replaces what is at `span`: each of its characters points there."""
        length = len(text)
        return cls(text, span.source, [span.start] * length, [span.end] * length, span.start)

    def __getitem__(self, part: slice) -> Fragment:
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

    def strip(self) -> Fragment:
        """The same without white space at both ends."""
        left = len(self.text) - len(self.text.lstrip())
        return self[left : max(left, len(self.text.rstrip()))]


def join(first: Fragment, *parts: Fragment | str) -> Fragment:
    """One fragment of several; a plain text is where the fragment before it ends."""
    text, starts, ends, at = first.text, [*first.starts], [*first.ends], first.at
    for part in parts:
        if isinstance(part, str):
            # Text that nobody wrote is at a point: a caret there is one column wide.
            point = [ends[-1] if ends else at] * len(part)
            text += part
            starts += point
            ends += point
            continue
        at = at if starts else part.at
        text += part.text
        starts += part.starts
        ends += part.ends
    return Fragment(text, first.source, starts, ends, at)


def mentions_variable(text: str) -> bool:
    """Whether a text contains `${`, as a variable or escaped."""
    return "${" in text


def escape_variables(text: str) -> str:
    """The text written so that reading it finds no variable: `${` becomes `$${`."""
    return text.replace("${", "$${")


def filled_length(text: str, values: Values) -> int:
    """The characters that a text has at most once its variables are replaced."""
    names = (written[1] for written in _VARIABLE.finditer(text))
    return len(text) + sum(len(str(values.get(name, ""))) for name in names if name)


def substitute(fragment: Fragment, values: Values) -> tuple[Fragment, tuple[Diagnostic, ...]]:
    """The fragment with every `${name}` replaced, and what is wrong with its variables."""
    if not mentions_variable(fragment.text):
        return fragment, ()
    parts: list[Fragment] = []
    findings: list[Diagnostic] = []
    done = 0
    for written in _VARIABLE.finditer(fragment.text):
        span, name = fragment.place(*written.span()), written[1]
        # After a finding any value will do: it is kept, and the rest is still checked.
        value = "${" if name is None else values.get(name, "0")
        if name is not None and not (written[2] and IDENTIFIER.fullmatch(name)):
            findings.append(diagnostic("malformed-variable", span, written=written[0]))
        elif name is not None and name not in values:
            cure = did_you_mean(name, values)
            findings.append(diagnostic("unknown-variable", span, suggestion=cure, name=name))
        # Truth values as policies write them, not as Python does.
        text = str(value).lower() if isinstance(value, bool) else str(value)
        parts += [fragment[done : written.start()], Fragment.all_at(text, span)]
        done = written.end()
    return join(*parts, fragment[done:]), tuple(findings)


def quote(text: str) -> str:
    """The text in double quotes on one line, as DSL and YAML both read it back."""
    return '"' + "".join(_escaped(char) for char in text) + '"'


def unquote(quoted: str) -> str:
    """The text that double quotes hold; an unknown escape means its character."""
    return _ESCAPE.sub(lambda found: _unescaped(found[1]), quoted[1:-1])


def short_escapes(text: str) -> str:
    """A JSON text with `\\U…`, which JSON does not know, as the characters themselves."""
    return _ESCAPE.sub(lambda found: _unescaped(found[1]) if found[1][0] == "U" else found[0], text)


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else f"\\U{ord(char):08x}"


def _unescaped(code: str) -> str:
    if len(code) == 1:
        return _NAMED.get(code, code)
    number = int(code[1:], 16)
    return chr(number) if number <= 0x10FFFF else "\N{REPLACEMENT CHARACTER}"
