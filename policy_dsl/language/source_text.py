"""Checks of a text before it is read as a policy: its size and its characters."""

from __future__ import annotations

import re

from policy_dsl.diagnostics import SourceText, Span, fail

MAX_BYTES = 1 << 20
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_BOM = "\N{ZERO WIDTH NO-BREAK SPACE}"


def checked(source: SourceText) -> SourceText:
    """The text without a byte order mark.

    Raises: PolicyError if it is larger than 1 MiB or holds control characters.
    """
    if len(source.text) > MAX_BYTES:
        raise fail("too-large", path=source.name, size=len(source.text), limit=MAX_BYTES)
    if source.text.startswith(_BOM):
        source = SourceText(source.name, source.text.removeprefix(_BOM))
    if found := _UNPRINTABLE.search(source.text):
        span = Span(source, found.start(), found.end())
        raise fail("control-character", span, written=f"U+{ord(found[0]):04X}")
    return source


def whole(source: SourceText) -> Span:
    """A span of the text's first characters, for defects of the text as such."""
    return Span(source, 0, min(1, len(source.text)))
