r"""Regular expressions and globs of users and of strangers' files, matched in linear time.

The one place that compiles them, by RE2. Taken is what both RE2 and Python's `re` read, and
read alike in text of printable ASCII. Elsewhere `\d`, `\w`, `\s` and `\b` know ASCII alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import re2

Where = Literal["whole", "start", "anywhere"]
WILDCARDS = frozenset("*?[")
# No name is longer, and matching takes the longer the more steps a pattern has.
LONGEST = 1000
MOST_STEPS = 1000
# For the automaton; what needs more is matched without one, and linearly too.
_MEMORY = 2**20
_AROUND = '"{0}" looks around, which takes more than linear time'
_ATOMIC = '"{0}" forbids other ways to match, which takes more than linear time'
_BACK = '"{0}" repeats what a group matched, which takes more than linear time'
_FLAG = '"{0}" changes how the expression is read'
_UNKNOWN = '"{0}" is not known here'
_JOIN = "match the whole name by one expression, or join two by `and`"
_LEAVE_OUT = "match more, and take the rest away with `except`"
_SPELL_OUT = "spell out what it can be"
# What Python reads and RE2 does not, the longest beginnings first.
_REFUSED = {
    "(?=": (_AROUND, _JOIN),
    "(?<=": (_AROUND, _JOIN),
    "(?!": (_AROUND, _LEAVE_OUT),
    "(?<!": (_AROUND, _LEAVE_OUT),
    "(?P=": (_BACK, _SPELL_OUT),
    "(?(": (_BACK, _SPELL_OUT),
    "(?>": (_ATOMIC, "write (?:…)"),
    "(?#": ('"{0}" is a comment', "a comment of a policy is after #"),
    "(?<": ('"{0}" names a group in another notation', "write (?P<name>…)"),
    "(?": (_FLAG, "(?i) and (?s) go at the beginning; leave other flags out"),
    r"\z": (_UNKNOWN, r"write \Z or $"),
    "[": ("a [ is not closed", r"a literal bracket is written \["),
}
_ESCAPED = r"\\(?:[dDwWsSanrtfv]|x[0-9a-fA-F]{2}|[^a-zA-Z0-9])"
_TOKEN = re.compile(
    r"(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    rf"|(?P<same>{_ESCAPED}|\\[bB]|\((?!\?)|\(\?[ims]*(?:-[is]+)?:)"
    r"|(?P<named>\(\?P<[A-Za-z_][A-Za-z0-9_]*>)"
    r"|(?P<edge>\\[AZ])"
    r"|(?P<up_to>\{,[0-9]*\})"
    r"|(?P<other>[^\\\[(])",
    re.DOTALL,
)
_OPENING = re.compile(r"[^)]{0,20}\)?")
_FLAGS = re.compile(r"\(\?[ims]+\)")
_SET = re.compile(rf"\[\^?\]?(?:{_ESCAPED}|[^\\])*\]", re.DOTALL)
# Other readers take these for sets in a set.
_IN_SET = re.compile(r"(?<=.)(?<!\\)\[|--|&&|~~|\|\|")
_PLACES = frozenset({"^", "$", r"\A", r"\Z", r"\b", r"\B"})
_REPEAT = re.compile(r"[*+?]|\{(?:[0-9]+(?:,[0-9]*)?|,[0-9]*)\}")
_NO_ARGUMENT = "{0} has nothing to repeat"
_RE2_REASONS = {
    "missing )": ("a ( is not closed", r"a literal parenthesis is written \("),
    "unexpected )": ("a ) has no (", r"a literal parenthesis is written \)"),
    "missing ]": ("a [ is not closed", r"a literal bracket is written \["),
    "trailing \\": (r"nothing is after its last \ ", r"a literal backslash is written \\"),
    "no argument for repetition operator": (_NO_ARGUMENT, "any text is .*"),
    "bad repetition operator": ("{0} repeats a repeat", "put what is repeated in (?:…)"),
    "invalid repetition size": (
        "{0} repeats more than 1,000 times, nested repeats multiplied, or counts backwards",
        "repeat less often",
    ),
    "invalid character class range": (
        "the range {0} counts backwards",
        "write the lower end first",
    ),
}
_BESIDE = {"whole": ("", ""), "start": ("", "(?s:.*)"), "anywhere": ("(?s:.*)", "(?s:.*)")}
_GLOB = re.compile(r"\[(?:(!)|(?!!))(\][^\]]*|[^\]]+)\]|(\*+)|.", re.DOTALL)


class PatternError(ValueError):
    """A pattern is not taken, and why. cure: what to write instead, if that is known."""

    def __init__(self, reason: str, cure: str | None = None) -> None:
        super().__init__(reason)
        self.cure = cure


class Pattern:
    """A compiled pattern. steps: at most so many are taken for each byte of a text."""

    def __init__(self, expression: str) -> None:
        """expression: as RE2 reads it. Raises: PatternError."""
        self._expression = f"(?:{expression})"
        self._plain = _compiled(self._expression)
        self.steps = int(self._plain.programsize)

    def matches(self, text: str) -> bool:
        """Whether the pattern matches a whole text."""
        if text.isascii():
            return self._plain.fullmatch(text.encode()) is not None
        return self._unicode.fullmatch(text.encode("utf-8", "surrogatepass")) is not None

    def among(self, lines: bytes) -> Iterator[str]:
        """The lines, of ASCII and not empty, that the pattern matches whole, in their order."""
        found = (match.group() for match in self._by_line.finditer(lines))
        return (line.decode() for line in found if line)

    @cached_property
    def _unicode(self) -> Any:
        return _compiled(self._expression, is_ascii=False)

    @cached_property
    def _by_line(self) -> Any:
        return _compiled(f"(?m:^{self._expression}$)", never_newline=True)


def regular_expression(
    text: str, *, where: Where = "whole", longest: int = LONGEST, most_steps: int = MOST_STEPS
) -> Pattern:
    """The pattern of a regular expression.

    where: what it matches of a text, as Python's `fullmatch`, `match` or `search`.
    Raises: PatternError if RE2 and Python do not read it alike, or it is too long, or takes
    too many steps.
    """
    _ensure_short(text, longest)
    before, after = _BESIDE[where]
    return _bounded(f"{before}(?:{_translated(text)}){after}", most_steps)


def glob(text: str) -> Pattern:
    """The pattern of a glob, as `fnmatch` reads it. Raises: PatternError if it is too long."""
    _ensure_short(text, LONGEST)
    parts = "".join(map(_glob_part, _GLOB.finditer(text)))
    return _bounded(f"(?s:{parts})", MOST_STEPS)


def _ensure_short(text: str, longest: int) -> None:
    if len(text) > longest:
        raise PatternError(f"it is longer than {longest:,} characters")


def _bounded(expression: str, most_steps: int) -> Pattern:
    pattern = Pattern(expression)
    if pattern.steps > most_steps:
        reason = f"it takes {pattern.steps:,} steps for a character, more than {most_steps:,}"
        raise PatternError(reason, "repeat less often")
    return pattern


def _translated(text: str) -> str:
    """The expression as RE2 reads it. Raises: PatternError if it reads it otherwise."""
    flags = _FLAGS.match(text)
    parts, at = [flags[0] if flags else ""], flags.end() if flags else 0
    depth = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise _refused(text[at:])
        parts.append(_read(token))
        at = token.end()
        depth += token[0].startswith("(") - (token[0] == ")")
        # Before it is compiled: what is put around it would close it.
        if depth < 0:
            raise _re2_refused("unexpected )")
        if token[0] in _PLACES and (repeat := _REPEAT.match(text, at)):
            raise PatternError(_NO_ARGUMENT.format(repeat[0]), "a place is there once")
    return "".join(parts)


def _read(token: re.Match[str]) -> str:
    text = token[0]
    match token.lastgroup:
        case "named":
            return "("
        case "edge":
            return "^" if text == r"\A" else "$"
        case "up_to":
            return f"{{0{text[1:]}"
        case "set" if not _SET.fullmatch(text) or _IN_SET.search(text):
            cure = r"escape it: \[ or \-"
            raise PatternError(f"{text:.40} is not read alike by all readers", cure)
    return text


def _refused(rest: str) -> PatternError:
    for start, (reason, cure) in _REFUSED.items():
        if rest.startswith(start):
            return PatternError(reason.format("".join(_OPENING.findall(rest)[:1])), cure)
    escape = rest[:2]
    if escape[1:].isdigit():
        return PatternError(_BACK.format(escape), _SPELL_OUT)
    reason, cure = _RE2_REASONS["trailing \\"]
    return PatternError(reason.strip() if len(rest) == 1 else _UNKNOWN.format(escape), cure)


def _compiled(expression: str, *, never_newline: bool = False, is_ascii: bool = True) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.never_nl = never_newline
    options.max_mem = _MEMORY
    # A byte is a step there, and a character of UTF-8 is many.
    if is_ascii and expression.isascii():
        options.encoding = re2.Options.Encoding.LATIN1
    try:
        return re2.compile(expression.encode("utf-8", "surrogatepass"), options)
    except re2.error as error:
        raise _re2_refused(error.args[0].decode("utf-8", "replace")) from None


def _re2_refused(message: str) -> PatternError:
    for start, (reason, cure) in _RE2_REASONS.items():
        if message.startswith(start):
            piece = message.removeprefix(start).removeprefix(": ")
            return PatternError(reason.format(f"{piece:.40}").strip(), cure)
    if "too large" in message:
        return PatternError("it takes too many steps for a character", "repeat less often")
    return PatternError(message)


def _glob_part(found: re.Match[str]) -> str:
    inverted, inside, star = found.groups()
    if star:
        return ".*"
    if inside is None:
        return "." if found[0] == "?" else _literal(found[0])
    # Ranges that count backwards hold nothing.
    ranges = [(item[0], item[-1]) for item in re.findall(r".-.|.", inside, re.DOTALL)]
    shown = "".join(f"{_literal(a)}-{_literal(z)}" for a, z in ranges if a <= z)
    if not shown:
        return "." if inverted else r"\b\B"
    return f"[{'^' if inverted else ''}{shown}]"


def _literal(character: str) -> str:
    # What is beyond Latin-1 is a character of UTF-8, and no escape of a byte.
    as_it_is = character.isalnum() or character > "\xff"
    return character if as_it_is else rf"\x{{{ord(character):x}}}"
