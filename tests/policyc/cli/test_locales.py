"""What is written to files and pipes is UTF-8, whatever the locale."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import IMATRIX, TINY

ROOT = Path(__file__).parents[3]
TEXT = "größer — 大"
POLICY = f"""\
description: {TEXT}
extends: hipfire_mq2
calibration: {{imatrix: é.gguf}}
rules: |
  embed, lm_head: q8
  "{TEXT}": keep optional
"""
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LOCALES = {"ascii": PLAIN, "latin-1 streams": {**PLAIN, "PYTHONIOENCODING": "latin-1"}}


@pytest.fixture(params=["ascii", pytest.param("latin-1 streams", marks=pytest.mark.slow)])
def policyc(request: pytest.FixtureRequest, tmp_path: Path):
    """Runs the program in a locale, in a folder with a policy é.yaml; its two outputs."""
    (tmp_path / "é.yaml").write_text(POLICY, encoding="utf-8")
    shutil.copy(IMATRIX, tmp_path / "é.gguf")
    kept = {key: value for key, value in os.environ.items() if key[:3] not in ("LC_", "LAN")}

    def run(*words: str, code: int = 0) -> tuple[str, str]:
        ran = subprocess.run(
            [sys.executable, "-m", "policyc", *words],
            cwd=tmp_path,
            env={**kept, "PYTHONPATH": str(ROOT), **LOCALES[request.param]},
            capture_output=True,
            check=False,
        )
        assert ran.returncode == code, ran.stderr
        return ran.stdout.decode(), ran.stderr.decode()

    return run


def test_formatted_policies(policyc) -> None:
    shown, _ = policyc("fmt", "é.yaml", "--to", "dsl")
    assert f'description "{TEXT}"' in shown


def test_formatted_files(policyc, tmp_path: Path) -> None:
    policyc("fmt", "é.yaml")
    assert TEXT in (tmp_path / "é.yaml").read_text(encoding="utf-8")


def test_findings_on_stderr(policyc, tmp_path: Path) -> None:
    (tmp_path / "é.yaml").write_text(POLICY.replace("q8", "größe"), encoding="utf-8")
    _, findings = policyc("plan", "é.yaml", "--model", str(TINY), code=2)
    assert "--> é.yaml:5:" in findings
    assert "größe" in findings
    _, findings = policyc("plan", "é.yaml", "--model", str(TINY), "--format", "json", code=2)
    assert json.loads(findings)["findings"][0]["file"] == "é.yaml"


def test_plans_on_stdout_and_in_files(policyc, tmp_path: Path) -> None:
    shown, _ = policyc("plan", "é.yaml", "--model", str(TINY), "--save", "ö.json")
    assert "é.yaml:5" in shown
    saved = (tmp_path / "ö.json").read_text(encoding="utf-8")
    assert "é.yaml:5" in saved
    shown, _ = policyc("plan", "é.yaml", "--model", str(TINY), "--format", "json")
    assert json.loads(shown)["policy"]["name"] == "é"


def test_bundles_and_their_records(policyc, tmp_path: Path) -> None:
    words = ["--model", str(TINY), "--imatrix", "é.gguf", "-o", "ü"]
    shown, progress = policyc("build", "é.yaml", *words, "--progress", "json")
    assert "by é, for hipfire_hfq" in shown
    assert all(json.loads(line) for line in progress.splitlines())
    record = json.loads((tmp_path / "ü" / "policyc.json").read_text(encoding="utf-8"))
    assert (record["policy"]["name"], record["policy"]["text"]) == ("é", POLICY)
    assert record["statistics"]["imatrix"]["file"] == "é.gguf"
    shown, _ = policyc("verify", "ü", "--source", str(TINY))
    assert "ü" in shown
    shown, _ = policyc("inspect", "ü")
    assert "é" in shown


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_of_statistics_that_are_not_utf8(policyc, tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff.gguf")
    shutil.copy(IMATRIX, tmp_path / odd)
    shown, _ = policyc("plan", "é.yaml", "--model", str(TINY), "--imatrix", odd)
    assert "\\xff.gguf" in shown
