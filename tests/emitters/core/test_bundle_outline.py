"""A built bundle has the outline of its plan: the same treatments, bytes and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from emitters.core.build import build
from emitters.core.bundle_reading import bundle_outline
from policy_dsl.planning.outline import OutlineModule, outline

MLX = "target: mlx_affine\nrules: 'all: 4bit'\n"
PADDED = "target: jangtq_prestack\nrules: 'all: f16; experts: 2bit'\n"
APART = PADDED + "output: {layout: per_expert}\n"


@pytest.mark.parametrize("policy", [MLX, PADDED, APART], ids=["mlx", "padded", "apart"])
def test_a_bundle_has_the_outline_of_its_plan(
    demo: Path, tmp_path: Path, planned: Callable[..., tuple], policy: str
) -> None:
    plan, inventory = planned(demo, policy)
    build(plan, inventory, out=tmp_path / "bundle", jobs=1)
    built, meant = bundle_outline(tmp_path / "bundle"), outline(plan)
    assert (built.nbytes, built.parameters, built.bpw) == (
        meant.nbytes,
        meant.parameters,
        meant.bpw,
    )
    assert sorted(map(bare, built.modules)) == sorted(map(bare, meant.modules))


def bare(module: OutlineModule) -> str:
    """What both know of a module: the plan alone knows rules and casts."""
    return repr(replace(module, rule="", treatment=module.stored))
