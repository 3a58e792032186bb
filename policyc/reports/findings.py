"""Diagnostics for programs: GitHub annotations, a SARIF log."""

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from policy_dsl.diagnostics import Diagnostic, catalogue
from policyc.reports import place_of

_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_IN_COMMANDS = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_IN_PROPERTIES = _IN_COMMANDS | str.maketrans({":": "%3A", ",": "%2C"})


def github_line(finding: Diagnostic) -> str:
    """The diagnostic as a workflow command that GitHub shows beside the line.

    Source: GitHub Actions, workflow commands, `error` and `warning` with their properties.
    """
    file, line, column = place_of(finding)
    properties = {"file": file, "line": line, "col": column, "title": finding.code}
    # A finding without a place is shown on the summary page of the run.
    shown = ",".join(
        f"{key}={str(value).translate(_IN_PROPERTIES)}"
        for key, value in properties.items()
        if value is not None
    )
    return f"::{finding.severity} {shown}::{_text(finding).translate(_IN_COMMANDS)}"


def sarif(findings: Iterable[Diagnostic], *, version: str) -> dict[str, Any]:
    """A SARIF 2.1.0 log with one run. version: that of policyc."""
    results = list(findings)
    # Only rules that fired: the log stays small.
    codes = sorted({finding.code for finding in results})
    rules = [
        {
            "id": code,
            "shortDescription": {"text": catalogue()[code].cause},
            "defaultConfiguration": {"level": catalogue()[code].severity},
        }
        for code in codes
    ]
    run = {
        "tool": {"driver": {"name": "policyc", "version": version, "rules": rules}},
        "results": [_sarif_result(each, codes.index(each.code)) for each in results],
        "columnKind": "unicodeCodePoints",
    }
    return {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}


def _text(finding: Diagnostic) -> str:
    return "\n".join([finding.message, *filter(None, [finding.suggestion]), *finding.notes])


def _sarif_result(finding: Diagnostic, rule_index: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": rule_index,
        "level": finding.severity,
        "message": {"text": _text(finding)},
    }
    file, line, column = place_of(finding)
    if file is not None:
        place = {
            # URIs have forward slashes and no spaces on every system.
            "artifactLocation": {"uri": quote(file.replace("\\", "/"))},
            "region": {"startLine": line, "startColumn": column},
        }
        result["locations"] = [{"physicalLocation": place}]
    return result
