"""What clones and downloads leave in place of a file: a pointer, a page, an error, nothing."""

from __future__ import annotations

import re

from policy_dsl.diagnostics import fail

# All that is looked at of a file; pointers are shorter.
LOOKED_AT_NBYTES = 512

_POINTER = re.compile(rb"version https?://[^\n]*(?:git-lfs|hawser)[^\n]*\n(?s:.*)\nsize (\d{1,19})")
_PAGE = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|\?xml)\b", re.IGNORECASE)
# What web servers answer instead of a file, as its only line.
_ANSWER = re.compile(
    rb"\s*((?:404:? ?)?(?:entry|repository|page|revision|file)? ?not found"
    rb"|forbidden|access denied|unauthorized|bad gateway|internal server error"
    rb"|invalid username or password"
    rb"|(?:invalid credentials|invalid rev id|access to model )[^\n]*"
    rb")\.?\s*",
    re.IGNORECASE,
)
_PAGES = (".html", ".htm", ".xml")
# Anything else may well be empty.
_NEVER_EMPTY = (".json", ".safetensors", ".model", ".spm", ".tiktoken")


def refuse_placeholder(file: str, first: bytes, nbytes: int) -> None:
    """Raises: PolicyError if a file is certainly not what its name says.

    first: its first bytes, 512 or more, or all; nbytes: of the whole file.
    """
    what = _what(file, first[:LOOKED_AT_NBYTES], nbytes)
    if what is not None:
        pulled = what.startswith("a Git LFS")
        cure = "run `git lfs pull` in its folder" if pulled else "download it again"
        raise fail("not-the-file", file=file, what=what, suggestion=cure)


def _what(file: str, first: bytes, nbytes: int) -> str | None:
    if not nbytes:
        return "empty" if file.endswith(_NEVER_EMPTY) else None
    pointer = _POINTER.match(first)
    if pointer:
        return f"a Git LFS pointer of {int(pointer[1]):,} bytes"
    if _PAGE.match(first) and not file.endswith(_PAGES):
        return "an XML page" if b"<?xml" in first.lower() else "an HTML page"
    answer = _ANSWER.fullmatch(first) if nbytes <= LOOKED_AT_NBYTES else None
    return f'the text "{answer[1].decode("ascii", "replace")}"' if answer else None
