"""What both printers say alike: the policy's parts as statements and named values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from policy_dsl.language.selector_text import print_ranges, print_selector
from policy_dsl.language.treatment_words import print_treatment
from policy_dsl.policy import Part, Policy, Prune, Rule
from policy_dsl.treatments import Written

TEXT_KEYS = ("name", "description", "model")


def says_name(policy: Policy) -> bool:
    """Whether the name is printed: not if it is only that of the file."""
    return policy.source is None or any(key == "name" for key, _ in policy.key_spans)


def rule_text(rule: Rule) -> str:
    """A rule as a statement, with the variables that its author wrote."""
    if rule.template is not None:
        return rule.template
    optional = " optional" if rule.optional else ""
    return f"{print_selector(rule.selector)}: {print_treatment(rule.treatment)}{optional}"


def prune_text(prune: Prune) -> str:
    """A transform as a statement."""
    if prune.keep:
        return f"prune {prune.component} keep {print_ranges(prune.keep)}"
    return f"prune {prune.component} to {prune.to} by {prune.by}"


def said_fields(part: Part) -> Iterator[tuple[str, Any]]:
    """The fields of a section that hold something, in order; treatments as their words."""
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, Written):
            yield name, print_treatment(value)
        elif value is not None:
            yield name, value


def templates(policy: Policy) -> Mapping[str, Any]:
    """Key path -> the value as written, for values with variables."""
    return dict(policy.templates)


def rules_of(policy: Policy, target: str | None) -> list[tuple[str, Rule]]:
    """The rules for all targets, or those for one alone, with their anchors."""
    numbered = enumerate(policy.rules)
    return [(f"rules[{index}]", rule) for index, rule in numbered if rule.target == target]
