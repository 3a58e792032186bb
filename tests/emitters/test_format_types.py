"""A changed signature in one format is an error of the type checker: tried on a copy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# format -> its file, a signature there, and what it becomes
CHANGES = {
    "gptq": (
        "read_config.py",
        "def claims(files: FileContents, forms: Forms) ->",
        "def claims(forms: Forms, files: FileContents) ->",
    ),
    "mlx_affine": (
        "codec.py",
        "def encode(values: Array, dtype: str,",
        "def encode(values: Array, rows: int, dtype: str,",
    ),
    "hipfire_hfq": (
        "reader_checks.py",
        "forms: Forms) -> dict[str, Claim]:",
        "forms: Forms) -> list[int]:",
    ),
    "jangtq_prestack": ("config.py", "def metadata(plan: Plan)", "def metadata(plan: str)"),
}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mypy says about a copy in which each format has one signature changed."""
    copy = tmp_path_factory.mktemp("copy")
    for package in ("emitters", "policy_dsl"):
        shutil.copytree(ROOT / package, copy / package)
    shutil.copy(ROOT / "pyproject.toml", copy)
    for name, (file, signature, changed) in CHANGES.items():
        path = copy / "emitters" / name / file
        text = path.read_text()
        assert text.count(signature) == 1, (name, signature)
        path.write_text(text.replace(signature, changed))
    command = [sys.executable, "-m", "mypy", "--strict", "emitters"]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False).stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_signature_is_an_error_where_the_format_is_defined(
    reported: str, name: str
) -> None:
    assert re.search(rf"^emitters/{name}/__init__\.py:\d+: error: Argument", reported, re.M)
