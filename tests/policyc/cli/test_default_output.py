"""Where a bundle goes that nobody gave a place: a folder of the current one, or nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from policyc.cli import main
from tests.models import TINY


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "outer" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", ["../../outside", "a/b", "..", "/tmp/x", "a\\b"])
def test_a_policy_whose_name_is_a_path_builds_nothing(
    here: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"name: {json.dumps(name)}\ntarget: mlx_affine\nrules:\n  - 'all: 8bit'\n"
    Path("p.yaml").write_text(text)
    before = sorted(here.parent.parent.rglob("*"))
    assert main(["check", "p.yaml"]) == 1
    assert "error[bad-policy-name]" in capsys.readouterr().out
    assert main(["build", "p.yaml", "--model", str(TINY)]) == 2
    assert "error[bad-policy-name]" in capsys.readouterr().err
    assert sorted(here.parent.parent.rglob("*")) == before


def test_a_model_whose_name_hides_a_folder_needs_a_place(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".hidden").symlink_to(TINY)
    Path("p.qpol").write_text("target mlx_affine\nall: 8bit\n")
    assert main(["build", "p.qpol", "--model", ".hidden"]) == 2
    assert "say where it goes" in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == [".hidden", "p.qpol"]


MODELS = [
    *("a/../b", "a/b@../../c", "a/b@/etc/passwd", "a//b", "x/../../minimax-m2.7"),
    *("../catalog/minimax-m2.7", "minimax-m2.7/../minimax-m2.7"),
]


@pytest.mark.parametrize("name", MODELS)
def test_names_of_models_are_no_ways_into_other_folders(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("p.qpol").write_text("target mlx_affine\nall: 8bit\n")
    assert main(["plan", "p.qpol", "--model", name]) == 2
    assert capsys.readouterr().err.startswith(("error[unknown-source]", "error[unreadable"))


@pytest.mark.parametrize("name", ["../mlx_affine", "mlx_affine/../gptq", "core", "."])
def test_names_of_targets_and_readers_are_no_ways_into_other_folders(
    here: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.qpol").write_text(f"target {json.dumps(name)}\nall: 8bit\n")
    assert main(["check", "p.qpol"]) == 1
    assert "error[unknown-target]" in capsys.readouterr().out
    Path("p.yaml").write_text(
        f"target: mlx_affine\nruntimes: [{json.dumps(name)}]\nrules: 'all: 8bit'\n"
    )
    assert main(["check", "p.yaml"]) == 0
    assert "warning[unknown-runtime]" in capsys.readouterr().out
