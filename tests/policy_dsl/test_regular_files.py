"""Files of strangers: regular ones are read, all else is an error in words, never a wait."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from policy_dsl.diagnostics import PolicyError
from policy_dsl.regular_files import file_stat, opened, read_first, read_range, read_whole

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")


def _folder(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    # The name of a socket may be no longer than a hundred bytes.
    listener = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        listener.bind(path.name)
    finally:
        os.chdir(here)
        listener.close()


def _nowhere(path: Path) -> None:
    path.symlink_to("gone")


def _circle(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_folder, "it is a folder"),
        (_pipe, "it is a pipe, not a file"),
        (_link_to_pipe, "it is a pipe, not a file"),
        (_device, "it is a device, not a file"),
        (_socket, "it is a socket, not a file"),
        (_nowhere, "No such file"),
        (_circle, "[Ss]ymbolic link"),
    ],
)
@pytest.mark.parametrize(
    "read",
    [
        file_stat,
        lambda path: opened(path).__enter__(),
        lambda path: read_whole(path, most=10),
        lambda path: read_range(path, 0, 1),
        lambda path: read_first(path, 10, given=True),
    ],
)
def test_what_is_not_a_file_is_named(
    make: Callable[[Path], None], reason: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    make(tmp_path / "x.json")
    with pytest.raises(PolicyError, match=reason) as caught:
        read(tmp_path / "x.json")
    assert [found.code for found in caught.value.diagnostics] == ["unreadable-file"]


def test_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    assert read_whole(path, most=100) == bytes(100)
    with pytest.raises(PolicyError, match="it has 100 bytes, over the limit of 99"):
        read_whole(path, most=99)


def test_a_huge_file_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PolicyError, match="it has 1,099,511,627,776 bytes, over the limit"):
        read_whole(path, most=1 << 20)


def test_a_part_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    assert read_range(path, 3, 7) == b"3456"
    assert read_range(path, 4, 4) == b""
    with pytest.raises(PolicyError, match="it became shorter"):
        read_range(path, 8, 11)


def test_what_the_shell_passes_may_be_a_pipe() -> None:
    receiver, sender = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(sender, b"text"), os.close(sender)))
    writer.start()
    try:
        assert read_first(Path(f"/dev/fd/{receiver}"), 100, given=True) == b"text"
    finally:
        os.close(receiver)
        writer.join()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/fd/../zero", "/dev/fd", "/dev/stdin/../x"])
def test_what_only_looks_as_if_the_shell_passed_it(path: str) -> None:
    with pytest.raises(PolicyError, match="cannot read"):
        read_first(Path(path), 10, given=True)


def _policyc(*arguments: str, folder: Path, given: bytes = b"") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "policyc", *arguments]
    receiver, sender = os.pipe()
    os.write(sender, given)
    # What waits for the pipe's end waits for ever, unless something was given.
    if given:
        os.close(sender)
    try:
        return subprocess.run(
            command,
            stdin=receiver,
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=60,
            check=False,
        )
    finally:
        os.close(receiver)
        if not given:
            os.close(sender)


@pytest.mark.parametrize("base", ["/dev/stdin", "base.qpol", "link.qpol", "/dev/fd/0"])
def test_what_a_policy_extends_is_a_file(tmp_path: Path, base: str) -> None:
    (tmp_path / "p.qpol").write_text(f'extends "{base}"\n')
    os.mkfifo(tmp_path / "base.qpol")
    (tmp_path / "link.qpol").symlink_to("/dev/stdin")
    run = _policyc("check", "p.qpol", folder=tmp_path)
    assert (run.returncode, "it is a pipe, not a file" in run.stdout) == (1, True)


def test_a_policy_of_the_command_line_may_come_from_a_pipe(tmp_path: Path) -> None:
    text = b"target mlx_affine\nall: 4bit\n"
    for path in ("/dev/stdin", "/dev/fd/0"):
        run = _policyc("fmt", "--to", "yaml", path, folder=tmp_path, given=text)
        assert (run.returncode, "all: 4bit" in run.stdout) == (0, True)
