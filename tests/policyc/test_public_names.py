"""The public names: what the page about Python shows works, and names load when asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

import policyc
from tests.models import TINY

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there() -> None:
    assert [name for name in policyc.__all__ if not hasattr(policyc, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = policyc.nothing  # type: ignore[attr-defined]


def test_a_policy_is_planned_built_verified_and_compared(tmp_path: Path) -> None:
    plan = policyc.plan("config_i", model=TINY)
    report = policyc.build(plan, out=tmp_path / "bundle")
    assert sum(report.sizes.values()) == report.nbytes
    assert policyc.verify(tmp_path / "bundle", source=TINY).ok
    assert policyc.diff(plan, tmp_path / "bundle").is_empty
    with pytest.raises(policyc.PolicyError, match="output-exists"):
        policyc.build(plan, out=tmp_path / "bundle")


def test_policies_and_sources_can_be_read_before() -> None:
    policy = policyc.load("mlx_mixed_2_6", {"low": 3})
    plan = policyc.plan(policy, model=policyc.open_source(TINY))
    assert plan == policyc.plan("mlx_mixed_2_6", model=str(TINY), variables={"low": 3})
    assert not policyc.diff("config_i", plan).is_empty
