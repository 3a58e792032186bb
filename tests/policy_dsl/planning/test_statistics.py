"""Files of statistics of a plan: those that methods need, and those that only help them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emitters import FORMATS
from policy_dsl.formats import Method
from policy_dsl.language.load import parse_policy
from policy_dsl.plan import Plan
from policy_dsl.planning.resolve import resolve
from policy_dsl.sources.reference import open_source

NEEDED = {"rtn": Method(needs="imatrix")}
OPTIONAL = {"rtn": Method(uses="imatrix")}
WRITTEN = 'calibration imatrix "x.gguf"\n'


def planned(text: str, methods: dict[str, Method], **given: str) -> Plan:
    """The plan for a target whose method looks at inputs."""
    known = FORMATS["mlx_affine"]
    spec = replace(known.spec, settings=(*known.spec.settings, "calibration.imatrix"))
    known = replace(known, spec=spec, methods=methods)
    policy, _ = parse_policy(f"{text}target mlx_affine\nall: 4bit g32", "p.qpol")
    inventory = open_source("examples/tiny-minimax-m2")
    return resolve(policy, inventory, {known.name: known}, statistics=given)


def test_only_what_a_method_needs_is_pending() -> None:
    (cure,) = planned("", NEEDED).pending
    assert "llama-imatrix" in cure
    assert planned("", OPTIONAL).pending == ()
    assert planned("", OPTIONAL).statistics == ()


@pytest.mark.parametrize("changed", [NEEDED, OPTIONAL])
def test_a_file_that_is_named_is_used(changed: dict[str, Method]) -> None:
    for plan in (planned(WRITTEN, changed), planned("", changed, imatrix="x.gguf")):
        (file,) = plan.statistics
        assert (file.name, file.path) == ("imatrix", "x.gguf")
        assert (plan.pending, plan.findings) == ((), ())


def test_a_file_that_would_help_another_method_is_not_read() -> None:
    other = {"awq": Method(uses="imatrix")}
    for plan in (planned(WRITTEN, other), planned("", other, imatrix="x.gguf")):
        assert plan.statistics == ()
        assert [one.code for one in plan.findings] == ["unused-statistics"]
