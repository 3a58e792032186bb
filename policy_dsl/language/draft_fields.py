"""The typed fields of `defaults`, `calibration` and `output`: text -> value, with defects."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from pydantic import ValidationError

from policy_dsl.diagnostics import Diagnostic, Span, diagnostic, did_you_mean
from policy_dsl.language.fragments import Fragment
from policy_dsl.policy import Calibration, Defaults, Output, Part
from policy_dsl.quantities import parse_size
from policy_dsl.vocabulary import METHODS, SCHEME_TARGETS

SECTIONS: Mapping[str, type[Part]] = {
    "defaults": Defaults,
    "calibration": Calibration,
    "output": Output,
}
_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?[0-9]{1,18}(\.[0-9]{1,40})?(e[-+]?[0-9]{1,3})?")
_BOOLEANS = {"true": True, "false": False}
# YAML 1.1 reads these words as truth values; people rarely mean to.
_YAML_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def read_field(
    part: type[Part], name: str, value: Fragment, findings: list[Diagnostic]
) -> Any | None:
    """The field's value of the type that `part` gives it; None after adding a defect."""
    kind = _kind(part, name)
    if kind is int:
        return read_integer(value, findings, where=name)
    if kind is float:
        return read_number(value, findings, where=name)
    if kind is bool:
        return read_boolean(value, findings, where=name)
    checker = _WORD_CHECKS.get(name, _any_text)
    if defect := checker(name, value):
        findings.append(defect)
        return None
    return value.text


def read_integer(value: Fragment, findings: list[Diagnostic], *, where: str) -> int | None:
    """The whole number that the text is; None after adding a defect."""
    if _INTEGER.fullmatch(value.text):
        return int(value.text)
    findings.append(_wrong(where, "a whole number", value))
    return None


def read_number(value: Fragment, findings: list[Diagnostic], *, where: str) -> float | None:
    """The number that the text is; None after adding a defect."""
    if _NUMBER.fullmatch(value.text):
        return float(value.text)
    findings.append(_wrong(where, "a number", value))
    return None


def read_boolean(value: Fragment, findings: list[Diagnostic], *, where: str) -> bool | None:
    """The truth value that the text is; None after adding a defect."""
    if value.text in _BOOLEANS:
        return _BOOLEANS[value.text]
    meant = _YAML_BOOLEANS.get(value.text.lower())
    cure = f"write {meant}" if meant else None
    findings.append(_wrong(where, "true or false", value, cure))
    return None


def validate_section(
    part: type[Part],
    values: Mapping[str, Any],
    spans: Mapping[str, Span],
    findings: list[Diagnostic],
) -> Part:
    """The section with these values; without them after adding what is out of range."""
    try:
        return part.model_validate(values)
    except ValidationError as failure:
        section = next(name for name, kind in SECTIONS.items() if kind is part)
        for error in failure.errors():
            field = str(error["loc"][0])
            findings.append(
                diagnostic(
                    "bad-value",
                    spans.get(f"{section}.{field}"),
                    key=f"{section}.{field}",
                    value=error["input"],
                    reason=_PREFIX.sub("", error["msg"]),
                )
            )
        return part()


def _kind(part: type[Part], name: str) -> type:
    annotation = part.model_fields[name].annotation
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if kinds and isinstance(kinds[0], type) else str


def _wrong(where: str, expected: str, value: Fragment, cure: str | None = None) -> Diagnostic:
    return diagnostic(
        "wrong-type",
        value.span,
        suggestion=cure,
        key=where,
        expected=expected,
        found=f'"{value.text}"' if value.text else "nothing",
    )


def _any_text(name: str, value: Fragment) -> Diagnostic | None:
    return None if value.text.strip() else diagnostic("empty-value", value.span, key=name)


def _scheme(_: str, value: Fragment) -> Diagnostic | None:
    if value.text in SCHEME_TARGETS:
        return None
    cure = did_you_mean(value.text, SCHEME_TARGETS)
    return diagnostic("unknown-scheme", value.span, suggestion=cure, scheme=value.text)


def _method(_: str, value: Fragment) -> Diagnostic | None:
    if value.text in METHODS:
        return None
    cure = did_you_mean(value.text, METHODS)
    return diagnostic("unknown-method", value.span, suggestion=cure, method=value.text)


def _size(name: str, value: Fragment) -> Diagnostic | None:
    if parse_size(value.text):
        return None
    return _wrong(name, "a size", value, "write a number with a unit, such as 5GiB or 5GB")


# What pydantic says before the reason.
_PREFIX = re.compile("Input should be |Value error, ")

_WORD_CHECKS: Mapping[str, Callable[[str, Fragment], Diagnostic | None]] = {
    "scheme": _scheme,
    "method": _method,
    "shard_size": _size,
}
