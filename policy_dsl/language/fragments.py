"""Pieces of source text that know where each of their characters stands.

A Fragment may be a stretch of the file, the value of a YAML scalar (indentation and escapes
gone), or a text in which variables are replaced: carets always land on what the user wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from policy_dsl.diagnostics import Diagnostic, SourceText, Span, diagnostic, did_you_mean
from policy_dsl.policy import Scalar

# `$${` is a literal `${`; anything after a lone `${` must be a name and a closing brace.
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}\n]*)(\}?)")
IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)


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

    def __getitem__(self, part: slice) -> Fragment:
        start, stop, _ = part.indices(len(self.text))
        at = self.starts[start] if start < len(self.starts) else self._end
        return Fragment(
            self.text[start:stop], self.source, self.starts[start:stop], self.ends[start:stop], at
        )

    @property
    def _end(self) -> int:
        return self.ends[-1] if self.ends else self.at

    @property
    def span(self) -> Span:
        """Where all of it stands."""
        return self.place(0, len(self.text))

    def place(self, start: int, stop: int) -> Span:
        """Where the characters `start` up to `stop` stand; a point if there are none."""
        if start < stop <= len(self.text):
            return Span(self.source, self.starts[start], max(self.ends[start:stop]))
        point = self.starts[start] if start < len(self.starts) else self._end
        return Span(self.source, point, point)

    def strip(self) -> Fragment:
        """The same without white space at both ends."""
        left = len(self.text) - len(self.text.lstrip())
        return self[left : max(left, len(self.text.rstrip()))]


def join(parts: Iterable[Fragment | str]) -> Fragment:
    """One fragment of several; a plain text stands where the fragment before it ends.

    The first part must be a Fragment.
    """
    text, starts, ends = "", list[int](), list[int]()
    source, at = None, 0
    for part in parts:
        if isinstance(part, str):
            # Text that nobody wrote stands at a point: a caret there is one column wide.
            point = ends[-1] if ends else at
            starts += [point] * len(part)
            ends += [point] * len(part)
            text += part
            continue
        source, at = source or part.source, at if starts else part.at
        starts += part.starts
        ends += part.ends
        text += part.text
    if source is None:
        raise ValueError("no fragment to join")
    return Fragment(text, source, starts, ends, at)


def mentions_variable(text: str) -> bool:
    """Whether `${` stands in a text, as a variable or escaped."""
    return "${" in text


def escape_variables(text: str) -> str:
    """The text written so that reading it finds no variable: `${` becomes `$${`."""
    return text.replace("${", "$${")


def filled_length(text: str, values: Mapping[str, Scalar]) -> int:
    """The characters that a text has at most once its variables are replaced."""
    if not mentions_variable(text):
        return len(text)
    names = (found[1] for found in _VARIABLE.finditer(text))
    return len(text) + sum(len(str(values.get(name, ""))) for name in names if name)


def substitute(
    fragment: Fragment, values: Mapping[str, Scalar]
) -> tuple[Fragment, tuple[Diagnostic, ...]]:
    """The fragment with every `${name}` replaced, and what is wrong with its variables."""
    if not mentions_variable(fragment.text):
        return fragment, ()
    parts: list[Fragment] = []
    findings: list[Diagnostic] = []
    done = 0
    for found in _VARIABLE.finditer(fragment.text):
        parts.append(fragment[done : found.start()])
        done = found.end()
        span = fragment.place(found.start(), found.end())
        if found[1] is None:
            value: Scalar = "${"
        elif defect := _defect(found[1], bool(found[2]), values, span):
            findings.append(defect)
            # Any value will do: the finding is kept, and the rest is still checked.
            value = "0"
        else:
            value = values[found[1]]
        # Truth values as policies write them, not as Python does.
        text = str(value).lower() if isinstance(value, bool) else str(value)
        parts.append(_placed(text, span))
    return join([*parts, fragment[done:]]), tuple(findings)


def _defect(name: str, closed: bool, values: Mapping[str, Scalar], span: Span) -> Diagnostic | None:
    if not closed or not IDENTIFIER.fullmatch(name):
        return diagnostic("malformed-variable", span, written="${" + name + "}" * closed)
    if name not in values:
        cure = did_you_mean(name, values)
        return diagnostic("unknown-variable", span, suggestion=cure, name=name)
    return None


def _placed(text: str, span: Span) -> Fragment:
    length = len(text)
    return Fragment(text, span.source, [span.start] * length, [span.end] * length, span.start)
