"""Formats are checked by their types, and one that nobody asked for is not imported."""

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
def test_a_changed_signature_is_an_error_in_the_format(reported: str, name: str) -> None:
    assert re.search(rf"^emitters/{name}/\w+\.py:\d+: error: Argument", reported, re.M)


def test_a_command_imports_the_format_that_it_is_about_and_no_other(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for words in (
        ["check", "config_i"],
        ["build", "config_i", "--model", "examples/tiny-minimax-m2", "-o", out, "-q"],
        ["verify", out],
    ):
        program = (
            f"import sys\nfrom policyc.cli import main\nmain({words})\n"
            f"print([n for n in {[f'emitters.{name}' for name in CHANGES]} if n in sys.modules])"
        )
        run = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert run.stdout.splitlines()[-1] == "['emitters.mlx_affine']", words
