"""What the command line says about the JANGTQ target: documents, findings, places."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from policy_dsl.cli import main

TINY = Path(__file__).parents[3] / "examples" / "tiny-minimax-m2"


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
