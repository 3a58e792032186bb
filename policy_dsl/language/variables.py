"""The values of a policy's variables: defaults, what extending policies say, `--set`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from policy_dsl.diagnostics import Diagnostic, PolicyError, Span, diagnostic, did_you_mean
from policy_dsl.language.draft import plain_scalar
from policy_dsl.policy import Policy, Scalar


def final_values(policies: Sequence[Policy], overrides: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """The value of every variable: a later policy's default wins, an override over all.

    policies: the extended ones first. overrides: texts are read as the default's type.
    Raises: PolicyError for an override without variable, and values of another type.
    """
    values: dict[str, Scalar] = {}
    findings: list[Diagnostic] = []
    for policy in policies:
        spans = dict(policy.key_spans)
        for name, value in policy.vars:
            default = values.get(name, value)
            if not _fits(value, default):
                findings.append(_wrong(name, default, value, spans.get(f"vars.{name}")))
            values[name] = value
    for name, given in overrides.items():
        if name not in values:
            cure = did_you_mean(name, values)
            findings.append(diagnostic("unknown-variable", suggestion=cure, name=name))
            continue
        value = _read(given, values[name])
        if not _fits(value, values[name]):
            findings.append(_wrong(name, values[name], given, None))
        values[name] = value
    if findings:
        raise PolicyError(findings)
    return values


def _read(given: Scalar, default: Scalar) -> Scalar:
    if isinstance(default, str):
        return str(given)
    return plain_scalar(given) if isinstance(given, str) else given


def _fits(value: Scalar, default: Scalar) -> bool:
    # A truth value is an int to Python, and no number to anybody else.
    wanted = (int, float) if isinstance(default, float) else (type(default),)
    return type(value) in wanted


def _wrong(name: str, default: Scalar, written: Scalar, span: Span | None) -> Diagnostic:
    kinds = {bool: "true or false", int: "a whole number", float: "a number"}
    expected = kinds.get(type(default), "a text")
    return diagnostic("wrong-variable-type", span, name=name, expected=expected, written=written)
