"""What a diagnostic code is: its severity, its message, its explanation."""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning"]


class Code(NamedTuple):
    """A kind of defect: its severity, message template, and a sentence of explanation.

    each: the fact that names the tensor, module or file, if many of them can have the defect.
    """

    severity: Severity
    message: str
    about: str
    each: str = ""


def error(message: str, about: str, *, each: str = "") -> Code:
    """A code whose defect stops the work."""
    return Code("error", message, about, each)


def warning(message: str, about: str, *, each: str = "") -> Code:
    """A code whose defect is worth knowing."""
    return Code("warning", message, about, each)
