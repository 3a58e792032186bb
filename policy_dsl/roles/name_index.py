"""The names of a model's tensors, to be looked through by name patterns in a short time."""

import re
from collections.abc import Callable, Iterable, Iterator

from policy_dsl.diagnostics import fail
from policy_dsl.linear_patterns import WILDCARDS, Pattern, PatternError, glob, regular_expression
from policy_dsl.policy import Glob, Regex

# What may make a part of a regular expression optional, or a choice.
_CHOICES = frozenset("|()[")
_UNIT = re.compile(r"(\\.|.)([*+?]+|\{[0-9,]*\}[?+]?|)", re.DOTALL)
# All patterns together may do so much, in what finding one line takes; seconds at most.
_MOST_WORK = 6_000_000
# A name that is found is kept; of bytes times steps, so many are worth one line.
_WORK_OF_MATCH = 5
_STEPS_OF_WORK = 30_000
_STEPS_AT_LEAST = 64
# Characters that are looked through for a rare part of a pattern while one line is found.
_CHARACTERS_OF_WORK = 1_000


class NameIndex:
    """Names in their order; what a pattern matches is looked up once."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        self._known: dict[Glob | Regex, frozenset[str]] = {}
        plain = [name for name in self._names if is_plain(name)]
        # One text is searched in a hundredth of the time that 100,000 names take.
        self._text = "\n".join(("", *plain, ""))
        self._lines = self._text[1:-1].encode()
        self._others = tuple(self._names.keys() - plain)
        self._work = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def matching(self, pattern: Glob | Regex) -> frozenset[str]:
        """The names that the pattern matches whole.

        Raises: PatternError; PolicyError if all that was asked takes too long.
        """
        if pattern not in self._known:
            self._known[pattern] = frozenset(self._matching(pattern))
            self._add_work(_WORK_OF_MATCH * len(self._known[pattern]))
        return self._known[pattern]

    def _matching(self, pattern: Glob | Regex) -> Iterator[str]:
        text = pattern.pattern
        if not _has_choice(pattern):
            yield from [text] if text in self._names else []
            return
        compiled, held = _compiled(pattern), self.holding(pattern)
        steps = (len(held) + 1) * (compiled.steps + _STEPS_AT_LEAST) // _STEPS_OF_WORK
        looked_through = len(self._text) // _CHARACTERS_OF_WORK
        self._add_work(looked_through + held.count(b"\n") + len(self._others) + steps)
        yield from compiled.among(held)
        yield from filter(compiled.matches, self._others)

    def _add_work(self, more: int) -> None:
        self._work += more
        if self._work > _MOST_WORK:
            raise fail("too-much-to-match", names=f"{len(self._names):,}")

    def holding(self, pattern: Glob | Regex) -> bytes:
        """The names of printable ASCII that the pattern can match any part of, as lines."""
        literal = _literal(pattern)
        if not literal:
            return self._lines
        lines, end = [], 0
        while (at := self._text.find(literal, end)) >= 0:
            start, end = self._text.rfind("\n", 0, at) + 1, self._text.find("\n", at)
            lines.append(self._text[start:end])
        return "\n".join(lines).encode()


def full_match(pattern: Glob | Regex) -> Callable[[str], bool]:
    """Whether the pattern matches a whole name. Raises: PatternError."""
    return _compiled(pattern).matches if _has_choice(pattern) else pattern.pattern.__eq__


def pattern_defect(pattern: Glob | Regex) -> PatternError | None:
    """Why a selector's pattern is refused, or None."""
    try:
        full_match(pattern)
    except PatternError as error:
        return error
    return None


def is_plain(name: str) -> bool:
    """Whether a name is printable ASCII, which all regular expressions read alike."""
    return bool(name) and name.isascii() and name.isprintable()


def _has_choice(pattern: Glob | Regex) -> bool:
    """Whether it can match anything but itself."""
    return isinstance(pattern, Regex) or bool(WILDCARDS & set(pattern.pattern))


def _compiled(pattern: Glob | Regex) -> Pattern:
    if isinstance(pattern, Glob):
        return glob(pattern.pattern)
    if not pattern.pattern.isprintable():
        raise PatternError("it has a character that does not print")
    return regular_expression(pattern.pattern)


def _literal(pattern: Glob | Regex) -> str:
    """A text that every name has which the pattern matches, a rare one; empty if not known."""
    text = pattern.pattern
    if isinstance(pattern, Glob):
        return max(re.split(r"[*?]", text.partition("[")[0]), key=_rarity)
    if _CHOICES & set(text) or "\\" in re.sub(r"\\[.d_-]", "", text):
        return ""
    pieces = [""]
    for unit, repeat in _UNIT.findall(text):
        if repeat or unit in (".", "^", "$", r"\d"):
            pieces.append("")
        else:
            pieces[-1] += unit[-1]
    return max(pieces, key=_rarity)


def _rarity(piece: str) -> int:
    # Nearly all names say "layers", few have a certain number.
    return len(piece) + 3 * sum(map(str.isdigit, piece))
