"""Files that commands write on request: what stands at their place stays what it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from policyc.cli import main
from policyc.cli.console import save_text


def save_headers(path: Path) -> int:
    return main(["inspect", "minimax_m2.7", "--save-headers", str(path)])


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old", encoding="utf-8")
    link.symlink_to(real)
    assert save_headers(link) == 0
    assert link.is_symlink()
    assert json.loads(real.read_text(encoding="utf-8"))


def test_a_link_at_the_unfinished_file_is_not_written_through(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine.txt", tmp_path / "saved.json.partial"
    mine.write_text("mine", encoding="utf-8")
    link.symlink_to(mine)
    assert save_headers(tmp_path / "saved.json") == 0
    assert json.loads((tmp_path / "saved.json").read_text(encoding="utf-8"))
    assert mine.read_text(encoding="utf-8") == "mine"
    assert sorted(os.listdir(tmp_path)) == ["mine.txt", "saved.json", "saved.json.partial"]


def test_a_link_to_itself_is_replaced(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(link)
    assert save_headers(link) == 0
    assert json.loads(link.read_text(encoding="utf-8"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_a_pipe_gets_the_text_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Opened for both, so that neither end waits for the other; the text is small enough.
    end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        save_text(pipe, "text")
        assert os.read(end, 10) == b"text"
    finally:
        os.close(end)
    assert pipe.is_fifo()


def test_a_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert save_headers(tmp_path) == 2
    assert "Is a directory" in capsys.readouterr().err
