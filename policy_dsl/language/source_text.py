"""Checks of a text before it is read as a policy: its size and its characters."""

from __future__ import annotations

import re

from policy_dsl.diagnostics import SourceText, Span, fail

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
    if found := _CONTROLS.search(source.text):
        span, code = Span(source, found.start(), found.end()), f"{ord(found[0]):04x}"
        cure = f"between quotes it is written \\u{code}"
        raise fail("control-character", span, suggestion=cure, written=f"U+{code.upper()}")
    return source


def n_lines(text: str) -> int:
    """The lines and statements of a text, at most."""
    return 1 + sum(map(text.count, _ENDS))


def ensure_few(name: str, count: int) -> None:
    """Raises: PolicyError if so many lines and statements are more than policies may have."""
    if count > MAX_LINES:
        what, limit = "lines and statements", f"{MAX_LINES:,}"
        raise fail("too-many-parts", path=name, count=f"{count:,}", what=what, limit=limit)


def whole(source: SourceText) -> Span:
    """A span of the text's first characters, for defects of the text as such."""
    return Span(source, 0, min(1, len(source.text)))
