"""Lines of printed text with the comments that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from policy_dsl.policy import Comment

# YAML ends lines at these, DSL does not.
_LINE_BREAKS = re.compile("[\r\x85\u2028\u2029]")


class Lines:
    """Collects lines; `line` puts an anchor's comments before and beside its line."""

    def __init__(self, comments: Iterable[Comment]) -> None:
        self._lines: list[str] = []
        self._opened = False
        self._leading: dict[str, list[str]] = {}
        self._trailing: dict[str, list[str]] = {}
        for comment in comments:
            kind = self._trailing if comment.trailing else self._leading
            text = _LINE_BREAKS.sub(" ", comment.text).strip()
            kind.setdefault(comment.anchor, []).append(text)

    def head(self) -> None:
        """Prints the comments about the whole text and a blank line after them."""
        self.lead("^")
        self._add("")

    def has_comments(self, *anchors: str) -> bool:
        """Whether comments wait for one of these anchors."""
        return any(each in self._leading or each in self._trailing for each in anchors)

    def lead(self, *anchors: str, indent: str = "") -> None:
        """Prints all comments of these anchors, for lines that this notation does not have."""
        for anchor in anchors:
            texts = self._leading.pop(anchor, []) + self._trailing.pop(anchor, [])
            for text in texts:
                self._add(f"{indent}{text}" if text else "")

    def line(self, text: str, *anchors: str, indent: str = "") -> None:
        """Prints a line with the comments of its anchors; one stands beside it."""
        beside = [each for anchor in anchors for each in self._trailing.pop(anchor, [])]
        self.lead(*anchors, indent=indent)
        for extra in beside[1:]:
            self._add(f"{indent}{extra}")
        self._add(f"{indent}{text}" + (f"  {beside[0]}" if beside else ""))

    def open(self, text: str, *anchors: str, indent: str = "") -> None:
        """Prints a line that opens a block; no blank line follows it."""
        self.line(text, *anchors, indent=indent)
        self._opened = True

    def inner(self, line: str) -> None:
        """Prints a line of a block text, blank ones too."""
        self._lines.append(line)
        self._opened = False

    def text(self) -> str:
        """Everything printed, and the comments whose anchors never came."""
        for anchor in [*self._leading, *self._trailing]:
            if anchor:
                self.lead(anchor)
        self.lead("")
        return "\n".join(self._lines).rstrip("\n") + "\n"

    def _add(self, line: str) -> None:
        if line or (self._lines and self._lines[-1] and not self._opened):
            self._lines.append(line)
            self._opened = False
