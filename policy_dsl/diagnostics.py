"""Defects in user input as values: where, what, and how to cure it; text only in `render`.

A code names the defect, never the cure; findings/<area>.yaml has them all.
"""

import difflib
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from policy_dsl import packaged_table
from policy_dsl.escaping import LONGEST_VALUE, columns, escaped, escaped_json, replaced
from policy_dsl.quantities import counted

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
FINDINGS = Path(__file__).with_name("findings")
# What differs between messages about one kind of defect: quoted text, shapes, names, numbers.
# A name is only looked for where it begins, and a shape up to the next, in linear time.
_VARYING = re.compile(r'"[^"]*"|\[[^\[\]]*\]|(?<![\w*-])[\w*-]+(?:\.[\w*-]+){2,}|[0-9][0-9,]*')
_MOST_EXAMPLES = 3
# Strangers may make any number: what is more becomes one, whatever else differs.
MOST_KINDS = 100
_COUNTED = "in all "


class Code(NamedTuple):
    """A kind of defect: message template, what is behind it, what helps, and severity.

    each: the fact that names the tensor, module or file, if many of them can have the defect.
    """

    message: str
    cause: str
    fix: str = ""
    each: str = ""
    severity: Severity = "error"


@cache
def catalogue() -> dict[str, Code]:
    """Every code of every area."""
    tables = map(packaged_table, sorted(FINDINGS.glob("*.yaml")))
    return {name: Code(**entry) for table in tables for name, entry in table.items()}


@cache
def codes_of(*areas: str) -> frozenset[str]:
    """The codes of these areas, which are files of findings."""
    return frozenset(chain(*(packaged_table(FINDINGS / f"{area}.yaml") for area in areas)))


def json_text(value: object, *, indent: int | None = None) -> str:
    """A JSON value as text in which all can be seen; bytes of a file's name become an escape."""
    return escaped_json(json.dumps(value, ensure_ascii=False, indent=indent))


@dataclass(frozen=True)
class SourceText:
    """A text the user wrote: `name` is its path or how to call it, `text` all of it."""

    name: str
    text: str

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *(i + 1 for i, char in enumerate(self.text) if char == "\n")]

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of a character offset, both counted from 1."""
        line = bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def line(self, number: int) -> str:
        """The text of a line, counted from 1, without its end."""
        return self.text[self._starts[number - 1] :].split("\n", 1)[0].rstrip("\r")


@dataclass(frozen=True)
class Span:
    """Characters `start` up to `end` of a source text."""

    source: SourceText
    start: int
    end: int

    @property
    def place(self) -> tuple[str, int, int]:
        """File, line and column of the first character, both counted from 1."""
        return self.source.name, *self.source.position(self.start)

    @property
    def location(self) -> str:
        """`file:line:column` of the first character."""
        return ":".join(map(str, self.place))


@dataclass(frozen=True)
class Diagnostic:
    """One defect: its code, its message, where it appears, and how to cure it.

    kind: equal for defects that differ only in what has them; empty if nothing else can.
    examples: the first things that have the defect. count: how many have it.
    """

    code: str
    message: str
    span: Span | None = None
    suggestion: str | None = None
    notes: tuple[str, ...] = ()
    kind: str = field(default="", compare=False, repr=False)
    examples: tuple[str, ...] = field(default=(), compare=False, repr=False)
    count: int = field(default=1, compare=False, repr=False)

    @property
    def severity(self) -> Severity:
        """`error`, `warning` or `note`, a property of the code."""
        return catalogue()[self.code].severity


class PolicyError(Exception):
    """Raised once by a stage, with every defect that it found, one for each kind."""

    def __init__(self, diagnostics: Iterable[Diagnostic]) -> None:
        self.diagnostics: tuple[Diagnostic, ...] = tuple(grouped(diagnostics))
        # The arguments are what pickle makes it again from.
        super().__init__(self.diagnostics)

    def __str__(self) -> str:
        """The diagnostics as text."""
        return render(self.diagnostics)


class DiskError(PolicyError):
    """The system did not read or write a file; it may do so the next time."""


class PermanentError(PolicyError):
    """The same policy and source lead to it again: unfinished work is of no use."""


class UnreadableError(DiskError):
    """Files are missing or cannot be read; nothing is wrong with what could be read."""


def diagnostic(
    code: str,
    span: Span | None = None,
    *,
    suggestion: str | None = None,
    notes: Sequence[str] = (),
    of: str = "",
    **facts: object,
) -> Diagnostic:
    """A Diagnostic whose message is the code's template filled with `facts`.

    of: what in the message has the defect, if many can and no fact of the code names it alone.
    All that is quoted is on one line, escaped and of bounded length.
    Raises: KeyError if the code is not in the catalogue or a fact is missing.
    """
    # A fact that is missing is a defect of the program, and fails loudly here.
    known = catalogue()[code]
    facts = {
        name: escaped(fact, longest=LONGEST_VALUE) if isinstance(fact, str) else fact
        for name, fact in facts.items()
    }
    message = escaped(known.message.format(**facts))
    of = escaped(of)
    example = of or escaped(str(facts.get(known.each, "")))
    same = known.message.format(**{**facts, known.each: "…"})
    if of:
        same = re.sub(rf"(?<!\w){re.escape(of)}(?!\w)", "…", message)
    return Diagnostic(
        code,
        message,
        span,
        suggestion and escaped(suggestion),
        tuple(map(escaped, notes)),
        kind=f"{code}: {_VARYING.sub('…', same)}" if example else "",
        examples=(example,) if example else (),
    )


def grouped(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """The defects in order, those of one kind as one: the first, with a count and examples.

    Of a code, a hundred kinds are shown, and the first of the others with the count of these.
    What was grouped before can be grouped again.
    """
    groups: dict[object, Diagnostic] = {}
    kinds: Counter[str] = Counter()
    for defect in diagnostics:
        # Defects without a kind stay as they are, also when they are equal.
        alike = (defect.kind, defect.span, defect.suggestion)
        key: object = alike if defect.kind else id(defect)
        if key not in groups and defect.kind and defect.span is None:
            kinds[defect.code] += 1
            key = key if kinds[defect.code] <= MOST_KINDS else defect.code
        first = groups.get(key)
        if first is None:
            groups[key] = defect
        else:
            examples = (*first.examples, *defect.examples)[:_MOST_EXAMPLES]
            groups[key] = replace(first, examples=examples, count=first.count + defect.count)
    return [_counted(defect) if defect.count > 1 else defect for defect in groups.values()]


def _counted(defect: Diagnostic) -> Diagnostic:
    notes = (note for note in defect.notes if not note.startswith(_COUNTED))
    more = ", …" if defect.count > len(defect.examples) else ""
    count = f"{_COUNTED}{defect.count:,}: {', '.join(defect.examples)}{more}"
    return replace(defect, notes=(*notes, count))


def fail(code: str, span: Span | None = None, **facts: Any) -> PolicyError:
    """A PolicyError with one `diagnostic` of these, ready to be raised."""
    return PolicyError([diagnostic(code, span, **facts)])


def errors(diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
    """Those diagnostics whose severity is error."""
    return [defect for defect in diagnostics if defect.severity == "error"]


def count_text(findings: Sequence[Diagnostic]) -> str:
    """`2 errors, 1 warning, 1 note`, `no findings`."""
    counts = Counter(finding.severity for finding in findings)
    parts = [counted(counts[word], word) for word in SEVERITIES if counts[word]]
    return ", ".join(parts) or "no findings"


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word`, or None if nothing is close."""
    # Sorted: between two words as close, the same one is offered every time.
    return next(iter(difflib.get_close_matches(word, sorted(set(candidates)), n=1)), None)


def did_you_mean(word: str, candidates: Iterable[str]) -> str | None:
    """The suggestion `did you mean "x"?`, or None if nothing is close."""
    close = nearest(word, candidates)
    return close and f'did you mean "{close}"?'


def render(diagnostics: Iterable[Diagnostic]) -> str:
    """The diagnostics as text, one blank line between them, no trailing newline."""
    shown = []
    for defect in diagnostics:
        lines = [f"{defect.severity}[{defect.code}]: {escaped(defect.message)}"]
        cure, notes = defect.suggestion or "", defect.notes
        if defect.span is not None:
            lines += _excerpt(defect.span, escaped(cure))
        elif cure:
            notes = (cure, *notes)
        shown.append("\n".join([*lines, *(f"  = {escaped(note)}" for note in notes)]))
    return "\n\n".join(shown)


def _excerpt(span: Span, suggestion: str, width: int = 160) -> list[str]:
    _, number, column = span.place
    line = span.source.line(number)
    # A 10 MB line must not become a 10 MB message.
    cut = max(0, column - 1 - width // 2) if len(line) > width else 0
    # What cannot be seen is one character of the text, and must be one column here.
    shown = replaced(line[cut : cut + width])
    start = column - 1 - cut
    marked = shown[start : start + max(1, span.end - span.start)]
    carets = "^" * max(1, columns(marked))
    gutter = " " * len(str(number))
    return [
        f"  --> {escaped(span.location)}",
        f"{number} | {shown}",
        f"{gutter} | {' ' * columns(shown[:start])}{carets} {suggestion}".rstrip(),
    ]
