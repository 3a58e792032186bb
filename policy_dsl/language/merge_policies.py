"""Policies that extend each other -> one policy: what comes later wins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from policy_dsl.policy import Part, Policy, Rule

_TEXTS = ("description", "model", "fp8_dequant")
_LISTS = ("transforms", "runtimes")
_SECTIONS = ("defaults", "calibration", "output")
_MAPPINGS = ("vars", "metadata")


def merge(policies: Sequence[Policy]) -> Policy:
    """One policy of several, the extended ones first; the last gives the name.

    Rules and tests of all are kept, base rules first; rules of one target follow those of all
    targets. Mappings merge field by field; of other lists and of texts the last one given
    holds. Of what a policy clears, nothing stays of those before.
    """
    merged = policies[0]
    for child in policies[1:]:
        merged = _extend(merged, child)
    comments = () if len(policies) > 1 else merged.comments
    return replace(merged, extends=(), cleared=(), comments=comments)


def _extend(base: Policy, child: Policy) -> Policy:
    base = _without(base, child.cleared)
    child = _numbered_after(child, len(base.tests))
    targets = _targets(base, child)
    changes: dict[str, Any] = {
        key: getattr(child, key) or getattr(base, key) for key in (*_TEXTS, *_LISTS)
    }
    for key in _SECTIONS:
        changes[key] = _overlay(getattr(base, key), getattr(child, key))
    for key in _MAPPINGS:
        changes[key] = _places(getattr(base, key), getattr(child, key), [])
    changes["tests"] = (*base.tests, *child.tests)
    replaced = [key for key in _LISTS if getattr(child, key)]
    for key in ("key_spans", "templates"):
        changes[key] = _places(getattr(base, key), getattr(child, key), replaced)
    return replace(
        child, targets=targets, rules=_rules((*base.rules, *child.rules), targets), **changes
    )


def _without(policy: Policy, cleared: tuple[str, ...]) -> Policy:
    """The policy as if it said nothing under these keys."""
    empty = Policy(name="")
    changes: dict[str, Any] = {key: getattr(empty, key) for key in cleared}
    for key in ("key_spans", "templates"):
        changes[key] = _places(getattr(policy, key), (), list(cleared))
    return replace(policy, **changes)


def _numbered_after(policy: Policy, n_tests: int) -> Policy:
    """The policy with the paths of its tests as if others stood before them."""
    changes: dict[str, Any] = {}
    for key in ("key_spans", "templates"):
        changes[key] = tuple((_moved(path, n_tests), value) for path, value in getattr(policy, key))
    return replace(policy, **changes)


def _moved(path: str, n_tests: int) -> str:
    found = re.fullmatch(r"tests\[(\d+)\]", path)
    return f"tests[{int(found[1]) + n_tests}]" if found else path


def _targets(base: Policy, child: Policy) -> tuple[str, ...]:
    if not child.targets:
        return base.targets
    ruled = {rule.target for rule in base.rules}
    more = [target for target in base.targets if target in ruled]
    return tuple(dict.fromkeys([*child.targets, *more]))


def _rules(rules: tuple[Rule, ...], targets: tuple[str, ...]) -> tuple[Rule, ...]:
    order: dict[str | None, int] = {None: 0}
    order |= {target: at for at, target in enumerate(targets, start=1)}
    return tuple(sorted(rules, key=lambda rule: order[rule.target]))


def _overlay(base: Part, child: Part) -> Part:
    said = {
        name: value
        for name in type(child).model_fields
        if (value := getattr(child, name)) is not None
    }
    return base.model_copy(update=said)


def _places(
    base: tuple[tuple[str, Any], ...], child: tuple[tuple[str, Any], ...], replaced: list[str]
) -> tuple[tuple[str, Any], ...]:
    kept = [
        (path, value) for path, value in base if path.split("[")[0].split(".")[0] not in replaced
    ]
    return tuple(dict([*kept, *child]).items())
