"""Diagnostics for programs: JSON objects, GitHub annotations, a SARIF log."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from policy_dsl.diagnostics import Diagnostic, catalogue
from policy_dsl.documents import FindingEntry
from policy_dsl.documents.reports import FindingsDocument
from policy_dsl.documents.values import entry_of

_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def finding_json(finding: Diagnostic) -> FindingEntry:
    """The diagnostic as a JSON object; file, line and column are null without a place."""
    file, line, column = _place(finding)
    return entry_of(FindingEntry, finding, file=file, line=line, column=column)


def findings_document(findings: Iterable[Diagnostic]) -> FindingsDocument:
    """Findings as JSON values."""
    return {
        "schema_version": 1,
        "kind": "findings",
        "findings": [finding_json(finding) for finding in findings],
    }


def github_line(finding: Diagnostic) -> str:
    """The diagnostic as a workflow command that GitHub shows beside the line.

    Source: GitHub Actions, workflow commands, `error` and `warning` with their properties.
    """
    file, line, column = _place(finding)
    # A finding without a place is shown on the summary page of the run.
    properties = [("file", file), ("line", line), ("col", column), ("title", finding.code)]
    shown = ",".join(f"{key}={_property(value)}" for key, value in properties if value is not None)
    text = "\n".join([finding.message, *filter(None, [finding.suggestion]), *finding.notes])
    return f"::{finding.severity} {shown}::{_command_text(text)}"


def sarif(findings: Iterable[Diagnostic], *, version: str) -> dict[str, Any]:
    """A SARIF 2.1.0 log with one run. version: that of policyc."""
    results = list(findings)
    # Only rules that fired: the log stays small.
    codes = sorted({finding.code for finding in results})
    driver = {"name": "policyc", "version": version, "rules": [_sarif_rule(code) for code in codes]}
    return {
        "$schema": _SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "results": [_sarif_result(each, codes.index(each.code)) for each in results],
                "columnKind": "unicodeCodePoints",
            }
        ],
    }


def _place(finding: Diagnostic) -> tuple[str | None, int | None, int | None]:
    if finding.span is None:
        return None, None, None
    line, column = finding.span.source.position(finding.span.start)
    return finding.span.source.name, line, column


def _command_text(text: str) -> str:
    # In this order: the percent signs of the other escapes must stay.
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: object) -> str:
    return _command_text(str(value)).replace(":", "%3A").replace(",", "%2C")


def _sarif_rule(code: str) -> dict[str, Any]:
    return {
        "id": code,
        "shortDescription": {"text": catalogue()[code].cause},
        "defaultConfiguration": {"level": catalogue()[code].severity},
    }


def _sarif_result(finding: Diagnostic, rule_index: int) -> dict[str, Any]:
    text = "\n".join([finding.message, *filter(None, [finding.suggestion]), *finding.notes])
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": rule_index,
        "level": finding.severity,
        "message": {"text": text},
    }
    file, line, column = _place(finding)
    if file is not None:
        place = {
            # URIs have forward slashes and no spaces on every system.
            "artifactLocation": {"uri": quote(file.replace("\\", "/"))},
            "region": {"startLine": line, "startColumn": column},
        }
        result["locations"] = [{"physicalLocation": place}]
    return result
