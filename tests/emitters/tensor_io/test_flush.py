"""What is flushed is on the disk itself, on systems where that takes more than fsync too."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from emitters.tensor_io.files import append, flush
from policy_dsl.diagnostics import PolicyError

# The number that macOS gives it; no other system has it.
F_FULLFSYNC = 51


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the system is asked to put on the disk, in order."""
    calls: list[str] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _, name=name: calls.append(name), raising=False)
    return calls


def full_sync(monkeypatch: pytest.MonkeyPatch, asked: list[str], error: int = 0) -> None:
    """A system that has F_FULLFSYNC; error: what its file system answers."""

    def answer(opened: int, command: int) -> int:
        os.fstat(opened)
        asked.append("full" if command == F_FULLFSYNC else str(command))
        if error:
            raise OSError(error, os.strerror(error))
        return 0

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", answer)


def flush_all(folder: Path) -> None:
    """Flushes a file, its folder, and a line appended to the file."""
    path = folder / "file"
    path.write_bytes(b"some")
    flush(path)
    flush(folder)
    append(path, b"more")
    assert path.read_bytes() == b"somemore"


def test_files_and_folders_are_synced(asked, tmp_path):
    flush_all(tmp_path)
    assert asked == ["fdatasync", "fsync", "fdatasync"]


def test_where_fdatasync_is_missing_fsync_does_it(asked, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "fdatasync")
    flush_all(tmp_path)
    assert asked == ["fsync"] * 3


def test_macos_empties_the_cache_of_the_disk(asked, monkeypatch, tmp_path):
    full_sync(monkeypatch, asked)
    flush_all(tmp_path)
    assert asked == ["full"] * 3


@pytest.mark.parametrize("code", ["ENOTSUP", "EINVAL", "ENOTTY", "EOPNOTSUPP"])
def test_a_file_system_that_cannot_is_asked_for_fsync(asked, monkeypatch, tmp_path, code):
    full_sync(monkeypatch, asked, getattr(errno, code))
    monkeypatch.delattr(os, "fdatasync")
    flush_all(tmp_path)
    assert asked == ["full", "fsync"] * 3


@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
def test_a_disk_that_fails_is_an_error_and_not_asked_again(asked, monkeypatch, tmp_path, code):
    full_sync(monkeypatch, asked, getattr(errno, code))
    with pytest.raises(PolicyError):
        flush(tmp_path)
    assert asked == ["full"]


def test_nothing_is_appended_to_a_file_that_is_gone(tmp_path):
    with pytest.raises(PolicyError, match="No such file"):
        append(tmp_path / "file", b"line")
    assert not (tmp_path / "file").exists()
