"""Where a bundle goes that nobody gave a place: a folder of the current one, or nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from policy_dsl.cli import main

TINY = Path(__file__).parents[3] / "examples" / "tiny-minimax-m2"


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
