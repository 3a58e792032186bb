"""Diagnostics for programs: GitHub annotations, SARIF, GitLab code quality, JUnit."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from policy_dsl.diagnostics import Diagnostic, catalogue, render
from policyc.reports import place_of

_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_OF_GITLAB = {"error": "major", "warning": "minor", "note": "info"}
_IN_COMMANDS = str.maketrans({"%": "%25", "\r": "%0D", "\n": "%0A"})
_IN_PROPERTIES = _IN_COMMANDS | str.maketrans({":": "%3A", ",": "%2C"})


def github_line(finding: Diagnostic) -> str:
    """The diagnostic as a workflow command that GitHub shows beside the line.

    Source: GitHub Actions, workflow commands: `error`, `warning`, `notice`, and their properties.
    """
    file, line, column = place_of(finding)
    properties = {"file": file, "line": line, "col": column, "title": finding.code}
    # A finding without a place is shown on the summary page of the run.
    shown = ",".join(
        f"{key}={str(value).translate(_IN_PROPERTIES)}"
        for key, value in properties.items()
        if value is not None
    )
    command = "notice" if finding.severity == "note" else finding.severity
    return f"::{command} {shown}::{_text(finding).translate(_IN_COMMANDS)}"


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


def gitlab(checked: Iterable[tuple[str, Sequence[Diagnostic]]]) -> list[dict[str, Any]]:
    """The findings of each policy as GitLab shows them beside the changes of a merge request.

    Source: GitLab, Code Quality, the keys that it needs of a report.
    """
    entries: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for policy, findings in checked:
        for finding in findings:
            file, line, _ = place_of(finding)
            # Equal for the same finding of another commit, in whatever line it is then.
            marked = f"{file or policy}\0{finding.code}\0{finding.message}"
            seen[marked] = seen.get(marked, 0) + 1
            digest = hashlib.sha256(f"{marked}\0{seen[marked]}".encode(errors="replace"))
            entries.append(
                {
                    "description": _text(finding),
                    "check_name": finding.code,
                    "fingerprint": digest.hexdigest(),
                    "severity": _OF_GITLAB[finding.severity],
                    "location": {"path": file or policy, "lines": {"begin": line or 1}},
                }
            )
    return entries


def junit(checked: Iterable[tuple[str, Sequence[Diagnostic]]]) -> str:
    """Each policy as a suite of JUnit's XML, each error as a failed case, the rest as output."""
    root = ElementTree.Element("testsuites", name="policyc")
    for policy, findings in checked:
        errors = [one for one in findings if one.severity == "error"]
        counts = {"tests": str(len(errors) or 1), "failures": str(len(errors)), "errors": "0"}
        suite = ElementTree.SubElement(root, "testsuite", {"name": policy, **counts})
        for error in errors:
            case = ElementTree.SubElement(suite, "testcase", classname=policy, name=error.code)
            failure = ElementTree.SubElement(
                case, "failure", type=error.code, message=error.message
            )
            failure.text = render([error])
        if not errors:
            ElementTree.SubElement(suite, "testcase", classname=policy, name="check")
        if others := [one for one in findings if one.severity != "error"]:
            ElementTree.SubElement(suite, "system-out").text = render(others)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


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
