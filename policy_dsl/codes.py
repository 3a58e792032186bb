"""The catalogue of findings: each code with its severity, message, cause and fix.

A code names the defect, never the cure. The texts are in findings/<area>.yaml; docs/errors.md is
made of them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

Severity = Literal["error", "warning"]
FINDINGS = Path(__file__).with_name("findings")


class Code(NamedTuple):
    """A kind of defect: severity, message template, what is behind it, and what helps.

    each: the fact that names the tensor, module or file, if many of them can have the defect.
    """

    severity: Severity
    message: str
    cause: str
    fix: str = ""
    each: str = ""


def code_of(name: str) -> Code:
    """The entry of one code. Raises: KeyError if the catalogue has none."""
    return catalogue()[name]


@cache
def catalogue() -> dict[str, Code]:
    """Every code of every area."""
    return {
        name: code
        for path in sorted(FINDINGS.glob("*.yaml"))
        for name, code in area_codes(path.stem).items()
    }


def area_codes(area: str) -> dict[str, Code]:
    """The codes of one area, such as `language`."""
    # Most runs have nothing to report and need no catalogue.
    import yaml  # noqa: PLC0415

    text = (FINDINGS / f"{area}.yaml").read_text(encoding="utf-8")
    # libyaml reads all areas in 4 ms, pure Python in 60.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries: dict[str, dict[str, Any]] = yaml.load(text, Loader=loader)
    return {name: Code(**{"severity": "error", **entry}) for name, entry in entries.items()}
