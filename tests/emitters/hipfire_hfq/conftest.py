"""What hipfire writes, built here from the same sources, and bundles of the embedded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from policyc.cli import main
from tests.models import IMATRIX, TINY

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "hipfire"
# As upstream: the exponent, and weights scaled by what is rounded only to be stored.
UPSTREAM = f"""\
calibration imatrix "{GOLDEN / "tiny-minimax-src" / "imatrix.gguf"}"
calibration awq_alpha 0.55
calibration awq_scales upstream
"""
TIERS = {
    "mq4": "hipfire_mq4",
    "mq3-lloyd": "hipfire_mq3_lloyd",
    "mq3": "hipfire_mq3",
    "mq2-lloyd": "hipfire_mq2_lloyd",
    "mq2": "hipfire_mq2",
}
# What upstream falls back to where 256 does not divide 384 columns, said outright.
DENSE = {
    "mq4": "all: mq4; embed: q8; down_proj: hfq4 g128; norm: f16",
    "mq6": "all: mq6; embed: q8; down_proj: hfq6; norm: f16",
    "hfq4": "all: hfq4; down_proj: hfq4 g128; norm: f16",
    "q8f16": "all: q8; norm: f16",
}
POLICIES = {
    **{f"tiny-minimax.{tier}": f"extends {name}\n{UPSTREAM}" for tier, name in TIERS.items()},
    **{f"tiny-llama.{form}": f"target hipfire_hfq\n{rules}\n" for form, rules in DENSE.items()},
}


def run(*arguments: object) -> None:
    """Runs a command that must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="session")
def manifests() -> dict[str, Any]:
    """What is recorded of every file of hipfire, by name."""
    found: dict[str, Any] = {}
    for path in GOLDEN.glob("*.manifest.json"):
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="session")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds the bundle that holds a recorded file, by its name; each only once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            policy = folder / "it.qpol"
            policy.write_text(f'output file_name "{name}"\n{POLICIES[name]}')
            source = GOLDEN / f"{name.partition('.')[0]}-src"
            run("build", policy, "--model", source, "-o", folder / "out", "-q")
            made[name] = folder / "out"
        return made[name]

    return get


@pytest.fixture(scope="session")
def demo_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds the embedded model by a bundled policy; each only once."""
    made: dict[str, Path] = {}

    def get(policy: str) -> Path:
        if policy not in made:
            out = tmp_path_factory.mktemp(policy) / "out"
            run("build", policy, "--model", TINY, "--imatrix", IMATRIX, "-o", out, "-q")
            made[policy] = out
        return made[policy]

    return get
