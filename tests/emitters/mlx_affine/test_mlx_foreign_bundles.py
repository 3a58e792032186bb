"""MLX bundles as other tools describe them: mlx-lm reads `quantization`, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emitters.core.build import build
from emitters.core.bundle_reading import bundle_outline
from emitters.core.verify import verify_bundle
from policy_dsl.diagnostics import PolicyError
from policy_dsl.sources.reference import open_source

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
DEFAULT = {"group_size": 64, "bits": 4, "mode": "affine"}
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def described(write_llama, planned, tmp_path):
    """Builds a bundle of 4 bits without a record, whose config is changed.

    Gives the codes of the findings against its source, and the bundle.
    """

    def make(change: Change) -> tuple[list[str], Path]:
        source, out = write_llama(), tmp_path / "out"
        plan, inventory = planned(source)
        build(plan, inventory, out=out, jobs=1)
        (out / "policyc.json").unlink()
        config = json.loads((out / "config.json").read_text())
        # One object: what is changed in one is changed in its copy.
        config["quantization_config"] = config["quantization"]
        change(config)
        (out / "config.json").write_text(json.dumps(config))
        report = verify_bundle(out, open_source(str(source)), jobs=1)
        return [one.code for one in report.findings if one.code != "no-record"], out

    return make


def _only(config: dict[str, Any]) -> None:
    config.pop("quantization_config")


def _beside_fp8(config: dict[str, Any]) -> None:
    config["quantization_config"] = FP8


def _default_alone(config: dict[str, Any]) -> None:
    config["quantization"] = config["quantization_config"] = DEFAULT


def _without_mode(config: dict[str, Any]) -> None:
    config["quantization"] = config["quantization_config"] = {"group_size": 64, "bits": 4}


def _true(config: dict[str, Any]) -> None:
    config["quantization"]["model.embed_tokens"] = True


def _null(config: dict[str, Any]) -> None:
    config["quantization"]["model.embed_tokens"] = {"group_size": None, "bits": 4}


def _short(config: dict[str, Any]) -> None:
    config["quantization"]["model.embed_tokens"] = {"bits": 4}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (_only, []),
        (_beside_fp8, ["metadata-elsewhere"]),
        (_default_alone, []),
        (_without_mode, []),
        (_true, []),
        (_null, []),
        (_short, []),
    ],
)
def test_what_mlx_lm_reads_is_read(change: Change, wanted: list[str], described):
    found, out = described(change)
    assert found == wanted
    treatments = {one.treatment for one in bundle_outline(out).modules if "proj" in one.name}
    assert treatments == {"4bit affine g64"}


def test_a_module_that_is_said_to_be_plain_and_is_not(described):
    def change(config: dict[str, Any]) -> None:
        config["quantization"]["lm_head"] = False

    found, _ = described(change)
    assert "width-disagrees" in found


def test_true_of_a_module_that_is_not_quantized(described):
    def change(config: dict[str, Any]) -> None:
        config["quantization"]["model.norm"] = True

    found, _ = described(change)
    assert set(found) == {"width-disagrees", "incomplete-module"}


def test_the_copy_alone_is_refused_with_a_cure(described):
    def change(config: dict[str, Any]) -> None:
        config.pop("quantization")

    found, out = described(change)
    assert found == ["bad-bundle-metadata"]
    with pytest.raises(PolicyError, match="where mlx-lm looks"):
        bundle_outline(out)
