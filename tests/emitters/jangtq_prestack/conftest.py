"""The recorded JANGTQ bundles, and the same ones built here from regenerated sources."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hash_sources import Recipe, write_source

from emitters import FORMATS
from emitters.core.build import build
from policy_dsl.language.load import load
from policy_dsl.planning.resolve import resolve
from policy_dsl.sources.reference import open_source

GOLDEN = Path(__file__).parents[2] / "golden" / "jangtq"
POLICIES = {"JANGTQ2": "jangtq_2", "JANGTQ4": "jangtq_4", "JANGTQ_K": "jangtq_k"}
PER_EXPERT = "output: {layout: per_expert}\n"
MICRO = Recipe(form="bf16", seed=1, H=64, I=64, E=32, L=1, V=64, heads=2, kv=1, hd=32)


class Built(NamedTuple):
    """A source and the bundle that policyc made of it."""

    source: Path
    bundle: Path


@pytest.fixture(scope="session")
def manifests() -> dict[str, Any]:
    """The recorded manifests of whole bundles, by name."""
    return dict(json.loads((GOLDEN / "bundles.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def built(
    manifests: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Built]:
    """Builds what a recorded bundle, by its name, was made from; each only once."""
    made: dict[str, Built] = {}

    def get(name: str) -> Built:
        if name not in made:
            base, apart, _ = name.partition("_perexpert")
            profile = next(profile for profile in POLICIES if base.endswith(profile))
            recorded = manifests.get(name)
            recipe = Recipe(**recorded["source"]) if recorded else MICRO
            folder = tmp_path_factory.mktemp(name)
            policy = folder / "policy.yaml"
            text = f"name: it\nextends: {POLICIES[profile]}\n"
            policy.write_text(text + (PER_EXPERT if apart else ""))
            source, out = write_source(folder / "source", recipe), folder / "bundle"
            inventory = open_source(str(source))
            build(resolve(load(policy), inventory, FORMATS), inventory, out=out)
            made[name] = Built(source, out)
        return made[name]

    return get
