r"""Regular expressions and globs of users and of strangers' files, matched in linear time.

The one place that compiles them, by RE2. Taken is what both RE2 and Python's `re` read, and
read alike in text of printable ASCII. Elsewhere `\d`, `\w`, `\s` and `\b` know ASCII alone.
"""

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

import re2

from policy_dsl import packaged_table, room

Where = Literal["whole", "start", "anywhere"]
WILDCARDS = frozenset("*?[")
# No name is longer, and matching takes the longer the more steps a pattern has.
LONGEST = 1000
MOST_STEPS = 1000
# For the automaton; what needs more is matched without one, and linearly too.
_MEMORY = 2**20
_ESCAPED = r"\\(?:[dDwWsSanrtfv]|x[0-9a-fA-F]{2}|[^a-zA-Z0-9])"
_TOKEN = re.compile(
    r"(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])"
    rf"|(?P<same>{_ESCAPED}|\\[bB]|\((?!\?)|\(\?[ims]*(?:-[is]+)?:)"
    r"|(?P<named>\(\?P<[A-Za-z_][A-Za-z0-9_]*>)"
    r"|\\[AZ]"
    r"|(?P<up_to>\{,[0-9]*\})"
    r"|(?P<other>[^\\\[(])",
    re.DOTALL,
)
_FLAGS = re.compile(r"\(\?[ims]+\)")
_SET = re.compile(rf"\[\^?\]?(?:{_ESCAPED}|[^\\])*\]", re.DOTALL)
# Other readers take these for sets in a set.
_IN_SET = re.compile(r"(?<=.)(?<!\\)\[|--|&&|~~|\|\|")
_PLACES = frozenset({"^", "$", r"\A", r"\Z", r"\b", r"\B"})
_EDGES = {r"\A": "^", r"\Z": "$"}
_REPEAT = re.compile(r"[*+?]|\{(?:[0-9]+(?:,[0-9]*)?|,[0-9]*)\}")
_BESIDE = {"whole": ("", ""), "start": ("", "(?s:.*)"), "anywhere": ("(?s:.*)", "(?s:.*)")}
_GLOB = re.compile(r"\[(?:(!)|(?!!))(\][^\]]*|[^\]]+)\]|(\*+)|.", re.DOTALL)


class PatternError(ValueError):
    """A pattern is not taken, and why. cure: what to write instead, if that is known."""

    def __init__(self, reason: str, cure: str | None = None) -> None:
        super().__init__(reason)
        self.cure = cure


class Pattern:
    """A compiled pattern. steps: at most so many are taken for each byte of a text."""

    def __init__(self, text: str, read: Callable[[], str], longest: int, most: int) -> None:
        """read: gives the text as RE2 takes it. most: steps that it may take.

        Raises: PatternError.
        """
        if len(text) > longest:
            raise PatternError(f"it is longer than {longest:,} characters")
        self._expression = f"(?:{read()})"
        self._plain = _compiled(self._expression)
        self.steps = int(self._plain.programsize)
        if self.steps > most:
            reason = f"it takes {self.steps:,} steps for a character, more than {most:,}"
            raise PatternError(reason, "repeat less often")

    def matches(self, text: str) -> bool:
        """Whether the pattern matches a whole text."""
        if text.isascii():
            return self._plain.fullmatch(text.encode()) is not None
        return self._unicode.fullmatch(text.encode("utf-8", "surrogatepass")) is not None

    def among(self, lines: bytes) -> Iterator[str]:
        """The lines, of ASCII and not empty, that the pattern matches whole, in their order."""
        by_line = _compiled(f"(?m:^{self._expression}$)", never_newline=True)
        return (found[0].decode() for found in by_line.finditer(lines) if found[0])

    @cached_property
    def _unicode(self) -> Any:
        return _compiled(self._expression, is_ascii=False)


def regular_expression(
    text: str, *, where: Where = "whole", longest: int = LONGEST, most_steps: int = MOST_STEPS
) -> Pattern:
    """The pattern of a regular expression.

    where: what it matches of a text, as Python's `fullmatch`, `match` or `search`.
    Raises: PatternError if RE2 and Python do not read it alike, or it is too long or takes long.
    """
    before, after = _BESIDE[where]
    return Pattern(text, lambda: f"{before}(?:{_translated(text)}){after}", longest, most_steps)


def glob(text: str) -> Pattern:
    """The pattern of a glob, as `fnmatch` reads it. Raises: PatternError if it is too long."""
    return Pattern(text, lambda: f"(?s:{_GLOB.sub(_glob_part, text)})", LONGEST, MOST_STEPS)


def _error(kind: str, text: str) -> PatternError:
    """What is wrong, by a table of what RE2 says or of beginnings that are not taken."""
    for beginning, reason, cure in packaged_table(room("grammar") / "patterns.yaml")[kind]:
        if found := re.match(beginning, text, re.DOTALL):
            return PatternError(reason.format(found[found.lastindex or 0]).strip(), cure)
    return PatternError(text)


def _translated(text: str) -> str:
    """The expression as RE2 reads it. Raises: PatternError if it reads it otherwise."""
    flags = _FLAGS.match(text)
    parts, at = [flags[0] if flags else ""], flags.end() if flags else 0
    depth = 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise _error("refused", text[at:])
        part, at = token[0], token.end()
        if token.lastgroup == "set" and (not _SET.fullmatch(part) or _IN_SET.search(part)):
            cure = r"escape it: \[ or \-"
            raise PatternError(f"{part:.40} is not read alike by all readers", cure)
        others = {"named": "(", "up_to": f"{{0{part[1:]}"}
        parts.append(others.get(token.lastgroup or "", _EDGES.get(part, part)))
        depth += part.startswith("(") - (part == ")")
        # Before it is compiled: what is put around it would close it.
        if depth < 0:
            raise _error("re2", "unexpected )")
        if part in _PLACES and (repeat := _REPEAT.match(text, at)):
            raise PatternError(f"{repeat[0]} has nothing to repeat", "a place is there once")
    return "".join(parts)


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
        raise _error("re2", error.args[0].decode("utf-8", "replace")) from None


def _glob_part(found: re.Match[str]) -> str:
    inverted, inside, star = found.groups()
    if star:
        return ".*"
    if inside is None:
        return "." if found[0] == "?" else _literal(found[0])
    # Ranges that count backwards hold nothing.
    ranges = [(item[0], item[-1]) for item in re.findall(r".-.|.", inside, re.DOTALL)]
    shown = "".join(f"{_literal(a)}-{_literal(z)}" for a, z in ranges if a <= z)
    nothing = "." if inverted else r"\b\B"
    return f"[{'^' * bool(inverted)}{shown}]" if shown else nothing


def _literal(character: str) -> str:
    # What is beyond Latin-1 is a character of UTF-8, and no escape of a byte.
    as_it_is = character.isalnum() or character > "\xff"
    return character if as_it_is else rf"\x{{{ord(character):x}}}"
