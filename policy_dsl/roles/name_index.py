"""The names of a model's tensors, to be looked through by name patterns in a short time."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator

from policy_dsl.selectors import Glob, Regex

WILDCARDS = frozenset("*?[")
# What may make a part of a regular expression optional, or a choice.
_CHOICES = frozenset("|()[")
_UNIT = re.compile(r"(\\.|.)([*+?]+|\{[^}]*\}[?+]?|)", re.DOTALL)


class NameIndex:
    """Names in their order; what a pattern matches is looked up once."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = dict.fromkeys(names)
        self._known: dict[Glob | Regex, frozenset[str]] = {}
        # One text is searched in a hundredth of the time that 100,000 names take.
        self._text = "\n".join(("", *self._names, ""))
        self._is_whole = self._text.count("\n") == len(self._names) + 1

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def matching(self, pattern: Glob | Regex) -> frozenset[str]:
        """The names that the pattern matches whole."""
        known = self._known.get(pattern)
        if known is None:
            known = self._known[pattern] = frozenset(self._matching(pattern))
        return known

    def _matching(self, pattern: Glob | Regex) -> Iterator[str]:
        text = pattern.pattern
        if isinstance(pattern, Glob) and not WILDCARDS & set(text):
            return iter([text] if text in self._names else [])
        return filter(full_match(pattern), self._holding(_literal(pattern)))

    def _holding(self, literal: str) -> Iterator[str]:
        """The names that hold a text."""
        if not literal or not self._is_whole:
            yield from self._names
            return
        at = self._text.find(literal)
        while at >= 0:
            start, end = self._text.rfind("\n", 0, at) + 1, self._text.find("\n", at)
            yield self._text[start:end]
            at = self._text.find(literal, end)


def full_match(pattern: Glob | Regex) -> Callable[[str], object]:
    """Whether the pattern matches a whole name, as something true or not."""
    text = pattern.pattern
    expression = text if isinstance(pattern, Regex) else fnmatch.translate(text)
    return re.compile(expression).fullmatch


def _literal(pattern: Glob | Regex) -> str:
    """The longest text that every name has which the pattern matches; empty if not known."""
    text = pattern.pattern
    if isinstance(pattern, Glob):
        return max(re.split(r"[*?]", text.partition("[")[0]), key=len)
    if _CHOICES & set(text) or "\\" in re.sub(r"\\[.d_-]", "", text):
        return ""
    pieces = [""]
    for unit, repeat in _UNIT.findall(text):
        char = unit[-1] if unit != r"\d" else ""
        if repeat or not char or unit in (".", "^", "$"):
            pieces.append("")
        else:
            pieces[-1] += char
    return max(pieces, key=len)
