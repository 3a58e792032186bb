"""Diagnostics for programs: JSON objects, GitHub annotations, a SARIF log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote

from policy_dsl.codes import code_of
from policy_dsl.diagnostics import Diagnostic, errors

_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def finding_json(found: Diagnostic) -> dict[str, Any]:
    """The diagnostic as a JSON object; file, line and column are null without a place."""
    file, line, column = _place(found)
    return {
        "code": found.code,
        "severity": found.severity,
        "message": found.message,
        "file": file,
        "line": line,
        "column": column,
        "suggestion": found.suggestion,
        "notes": list(found.notes),
    }


def count_text(findings: Sequence[Diagnostic]) -> str:
    """`2 errors, 1 warning`, `no findings`."""
    n_errors = len(errors(findings))
    counts = ((n_errors, "error"), (len(findings) - n_errors, "warning"))
    parts = [f"{count} {word}{'s' if count != 1 else ''}" for count, word in counts if count]
    return ", ".join(parts) or "no findings"


def github_line(found: Diagnostic) -> str:
    """The diagnostic as a workflow command that GitHub shows beside the line.

    Source: GitHub Actions, workflow commands, `error` and `warning` with their properties.
    """
    file, line, column = _place(found)
    # A finding without a place is shown on the summary page of the run.
    properties = [("file", file), ("line", line), ("col", column), ("title", found.code)]
    shown = ",".join(f"{key}={_property(value)}" for key, value in properties if value is not None)
    text = "\n".join([found.message, *filter(None, [found.suggestion]), *found.notes])
    return f"::{found.severity} {shown}::{_command_text(text)}"


def sarif(findings: Iterable[Diagnostic], *, version: str) -> dict[str, Any]:
    """A SARIF 2.1.0 log with one run. version: that of policyc."""
    found = list(findings)
    # Only rules that fired: the log stays small.
    codes = sorted({one.code for one in found})
    driver = {"name": "policyc", "version": version, "rules": [_sarif_rule(code) for code in codes]}
    results = [_sarif_result(one, codes.index(one.code)) for one in found]
    return {
        "$schema": _SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [
            {"tool": {"driver": driver}, "results": results, "columnKind": "unicodeCodePoints"}
        ],
    }


def _place(found: Diagnostic) -> tuple[str | None, int | None, int | None]:
    if found.span is None:
        return None, None, None
    line, column = found.span.source.position(found.span.start)
    return found.span.source.name, line, column


def _command_text(text: str) -> str:
    # In this order: the percent signs of the other escapes must stay.
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: object) -> str:
    return _command_text(str(value)).replace(":", "%3A").replace(",", "%2C")


def _sarif_rule(code: str) -> dict[str, Any]:
    return {
        "id": code,
        "shortDescription": {"text": code_of(code).cause},
        "defaultConfiguration": {"level": code_of(code).severity},
    }


def _sarif_result(found: Diagnostic, rule_index: int) -> dict[str, Any]:
    text = "\n".join([found.message, *filter(None, [found.suggestion]), *found.notes])
    result: dict[str, Any] = {
        "ruleId": found.code,
        "ruleIndex": rule_index,
        "level": found.severity,
        "message": {"text": text},
    }
    file, line, column = _place(found)
    if file is not None:
        place = {
            # URIs have forward slashes and no spaces on every system.
            "artifactLocation": {"uri": quote(file.replace("\\", "/"))},
            "region": {"startLine": line, "startColumn": column},
        }
        result["locations"] = [{"physicalLocation": place}]
    return result
