"""What is wrong with a policy whatever the model: unknown words, impossible treatments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from policy_dsl.diagnostics import Diagnostic, PolicyError
from policy_dsl.formats import Format, FormatSpec
from policy_dsl.planning.fill import fill
from policy_dsl.planning.matching import nodes
from policy_dsl.planning.naming import family_defect, name_defect
from policy_dsl.planning.settings import choose_target, setting_findings
from policy_dsl.policy import Family, Name, Policy, Rule

_CLASSES = ("matrix", "experts", "embed")


def lint(
    policy: Policy, formats: Mapping[str, Format], *, target: str | None = None
) -> tuple[Diagnostic, ...]:
    """Findings that need no model: names, families; treatments and settings by target."""
    found: list[Diagnostic] = []
    for rule in policy.rules:
        found += _name_findings(rule)
    for wanted in (target,) if target else policy.targets:
        try:
            spec = formats[choose_target(policy, formats, wanted)].spec
        except PolicyError as error:
            found += error.diagnostics
        else:
            found += _treatment_findings(policy, spec)
            found += setting_findings(policy, spec, formats)
    return tuple(dict.fromkeys(found))


def _name_findings(rule: Rule) -> Iterator[Diagnostic]:
    spans = dict(rule.name_spans)
    for node in nodes(rule.selector):
        defect = None
        if isinstance(node, Name):
            defect = name_defect(node.text)
        elif isinstance(node, Family):
            defect = family_defect(node.name)
        if defect is not None:
            yield replace(defect, span=spans.get(node, rule.selector_span))


def _treatment_findings(policy: Policy, spec: FormatSpec) -> Iterator[Diagnostic]:
    for rule in policy.rules:
        if rule.target not in (None, spec.name):
            continue
        # What one class of tensors cannot hold another may: only what none can is wrong.
        outcomes = [fill(rule.treatment, each, policy.defaults, spec) for each in _CLASSES]
        defects = [one for one in outcomes if isinstance(one, Diagnostic)]
        if len(defects) == len(outcomes):
            yield replace(defects[0], span=rule.treatment_span or rule.span)
