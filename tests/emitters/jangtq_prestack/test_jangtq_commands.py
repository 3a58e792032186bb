"""What the command line says about the JANGTQ target: documents, findings, places."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from policyc.cli import main
from tests.models import TINY


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]):
    """Runs a command; returns what it prints to stdout, or to stderr where it fails."""

    def run(*arguments: object, code: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return run


def test_plans_fit_their_schema(said, tmp_path: Path) -> None:
    said("plan", "jangtq_k", "--model", TINY, "--save", tmp_path / "plan.json")
    saved = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    jsonschema.validate(saved, json.loads(said("schema", "plan")))
    kinds = {file["name"]: file["kind"] for file in saved["files"]}
    assert kinds["tokenizer_config.json"] == "edited"


USUAL = "target jangtq_prestack\nexperts: 2bit\nall except experts: 8bit\nrouter, norm: f16\n"


@pytest.mark.parametrize("layout", ["prestacked", "per_expert"])
def test_added_experts_are_told_and_are_no_parameters(said, tmp_path: Path, layout: str) -> None:
    policy = tmp_path / "p.qpol"
    policy.write_text(f"{USUAL}output layout {layout}\n", encoding="utf-8")
    said("build", policy, "--model", TINY, "-o", tmp_path / "out", "-q")
    source = json.loads(said("inspect", TINY, "--format", "json"))
    found = []
    for record in (tmp_path / "out" / "policyc.json", None):
        text = said("inspect", tmp_path / "out")
        assert "8 a layer, and 24 that only pad" in text
        assert ("none: names are shown as roles" in text) == (record is None)
        found.append(json.loads(said("inspect", tmp_path / "out", "--format", "json")))
        jsonschema.validate(found[-1], json.loads(said("schema", "inspect_bundle")))
        if record is not None:
            record.unlink()
    for one in found:
        assert (one["experts"], one["experts_added"]) == (8, 24)
        assert one["parameters"] == source["parameters"]


@pytest.mark.parametrize(
    ("layout", "name", "told", "added"),
    [
        ("prestacked", "switch_mlp.up_proj", "and 24 experts that only pad", 24),
        ("prestacked", "gate", "from 1 source tensor of F32, and 24 experts that only pad", 24),
        ("per_expert", "experts.7.w1", "(256x256 from 1 source tensor of F8_E4M3)", 0),
        ("per_expert", "experts.8.w1", "of the source: an expert that only pads", 256),
    ],
)
def test_added_experts_are_explained(
    said, tmp_path: Path, layout: str, name: str, told: str, added: int
) -> None:
    policy = tmp_path / "p.qpol"
    policy.write_text(f"{USUAL}output layout {layout}\n", encoding="utf-8")
    explain = "explain", policy, f"model.layers.3.block_sparse_moe.{name}", "--model", TINY
    assert told in said(*explain)
    document = json.loads(said(*explain, "--format", "json"))
    jsonschema.validate(document, json.loads(said("schema", "explain")))
    assert document["added"] == added
    assert document["layer"] == 3
