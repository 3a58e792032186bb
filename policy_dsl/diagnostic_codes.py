"""The catalogue of diagnostic codes: severity, message template, and what it means.

A code names the defect, never the cure. `docs/errors.md` is checked against this table.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]


class Code(NamedTuple):
    """A kind of defect: its severity, message template, and a sentence of explanation."""

    severity: Severity
    message: str
    about: str


def _error(message: str, about: str) -> Code:
    return Code("error", message, about)


def _warning(message: str, about: str) -> Code:
    return Code("warning", message, about)


CODES: dict[str, Code] = {
    # reading text
    "unreadable-file": _error(
        "cannot read {path}: {reason}", "The file is missing, a folder, or not permitted."
    ),
    "not-utf8": _error(
        "{path} is not UTF-8: byte {byte} at offset {offset}", "Policies are UTF-8 text."
    ),
    "too-large": _error(
        "{path} has {size} bytes; a policy has at most {limit}",
        "A policy is read whole; something this large is not a policy.",
    ),
    "empty-policy": _error("{path} holds no policy", "The file has no key and no statement."),
    # the vocabulary
    "unknown-role": _error(
        '{where} has no role "{role}"',
        "The name is no component, projection, role or alias of the architecture.",
    ),
}
