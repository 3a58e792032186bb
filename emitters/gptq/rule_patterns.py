"""Which of a configuration's patterns decides each module, in bounded time.

The patterns are a stranger's. Readers match them with Python's `re` (vLLM, auto-round) or with
PCRE2 (GPTQModel). What one of them may read otherwise than RE2 does is not guessed.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import takewhile
from operator import attrgetter
from typing import Any, NamedTuple

from emitters.gptq.spec import Width
from policy_dsl.linear_patterns import Pattern, PatternError, Where, regular_expression
from policy_dsl.policy import Regex
from policy_dsl.roles.name_index import NameIndex, is_plain
from policy_dsl.treatments import Unread

# Characters and steps of one pattern, characters of all of them.
_LONGEST, _MOST_STEPS = 10_000, 5_000
MOST_TEXT = 2**20
# Of a processor, for all patterns and modules; looked at after each so many bytes of names.
MOST_SECONDS = 2
_SLICE = 2**16
_LONGEST_NAME = 1000
# `re.escape(name)$`, which is looked up.
_NAME = re.compile(r"\^?((?:\\[^\w\s]|[\w-])+)\$", re.ASCII)
_UP_TO = re.compile(r"\{,[0-9]*\}")
_NO_MATCH = "no pattern is matched with a name that is not of printable ASCII, or too long"


class Rule(NamedTuple):
    """A pattern, its sign, `-:` or empty, and what differs for the modules it matches."""

    sign: str
    pattern: str
    entry: Mapping[str, Any]


class _UnreadRule(NamedTuple):
    """A rule whose pattern is not read; says: a width, None, or what equals nothing."""

    at: int
    reason: str
    says: object


class Verdicts:
    """What the first rule that matches says of each module, as far as that is known."""

    def __init__(
        self,
        rules: Sequence[Rule],
        names: Collection[str],
        where: Where,
        says: Callable[[Rule], Width | None],
    ) -> None:
        """where: of a name a pattern matches. says: what a rule does, or ValueError.

        Raises: ValueError if the patterns are too long, or take too long.
        """
        self._rules, self._says, self._where = rules, says, where
        self._first: dict[str, int] = {}
        self._unread: list[_UnreadRule] = []
        self._usual = {name for name in names if len(name) <= _LONGEST_NAME and is_plain(name)}
        self._stop = time.thread_time() + MOST_SECONDS
        self._match_all()
        alike = takewhile(lambda rule: rule.says == self._unread[0].says, self._unread)
        self._n_alike = len(list(alike))

    def of(self, name: str, otherwise: Width | None) -> Width | Unread | None:
        """The width of a module; otherwise: if no rule matches it. Raises: ValueError."""
        if not self._rules:
            return otherwise
        if name not in self._usual:
            return Unread(_NO_MATCH)
        first = self._first.get(name, len(self._rules))
        known = self._says(self._rules[first]) if name in self._first else otherwise
        before = bisect_left(self._unread, first, key=attrgetter("at"))
        # It does not matter whether a rule matches that says the same.
        same = self._n_alike if self._unread and self._unread[0].says == known else 0
        return known if before <= same else Unread(self._unread[same].reason)

    def _match_all(self) -> None:
        if sum(len(rule.pattern) for rule in self._rules) > MOST_TEXT:
            raise ValueError(f"its patterns have more than {MOST_TEXT:,} characters")
        index = NameIndex(self._usual)
        for at, rule in enumerate(self._rules):
            self._check_time()
            try:
                for name in self._matching(rule.pattern, index):
                    self._first.setdefault(name, at)
            except PatternError as error:
                reason = f"{rule.sign}{rule.pattern:.80}: {error}"
                try:
                    says: object = self._says(rule)
                except ValueError:
                    says = object()
                self._unread.append(_UnreadRule(at, reason, says))

    def _matching(self, text: str, index: NameIndex) -> Iterator[str]:
        """The names that readers match. Raises: PatternError; ValueError."""
        named = _NAME.fullmatch(text)
        if named and (self._where == "start" or text[0] == "^"):
            name = re.sub(r"\\(.)", r"\1", named[1])
            yield from {name} & self._usual
            return
        pattern = _read_alike(text, self._where)
        for lines in _slices(index.holding(Regex(text))):
            self._check_time()
            yield from pattern.among(lines)

    def _check_time(self) -> None:
        if time.thread_time() > self._stop:
            about = f"{len(self._rules):,} patterns and {len(self._usual):,} modules"
            raise ValueError(f"{about} take more than {MOST_SECONDS} seconds")


def _read_alike(text: str, where: Where) -> Pattern:
    """The pattern as all readers read it. Raises: PatternError if they may not."""
    if not text.isascii():
        raise PatternError("it has characters that are not ASCII")
    if _UP_TO.search(text):
        raise PatternError("{,n} is up to n times to some readers, and itself to others")
    pattern = regular_expression(text, where=where, longest=_LONGEST, most_steps=_MOST_STEPS)
    # Python is stricter in a few places. What RE2 has read is nothing that takes it long.
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise PatternError(f"Python refuses it: {error}") from None
    return pattern


def _slices(lines: bytes) -> Iterator[bytes]:
    """The lines in slices, with none cut."""
    start = 0
    while start < len(lines):
        end = lines.find(b"\n", start + _SLICE)
        yield lines[start : end if end >= 0 else len(lines)]
        start = end + 1 if end >= 0 else len(lines)
