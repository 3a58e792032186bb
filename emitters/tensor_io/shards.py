"""Files of tensors written in any order: header first, tensors at their offsets.

A file has its full length from the start; a file is opened for every write, so a write needs
nothing but a path and a place.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from emitters.numerics.value_types import Array
from policy_dsl.diagnostics import DiskError, PolicyError, diagnostic
from policy_dsl.plan import PlannedTensor

try:
    import fcntl
except ImportError:  # Windows, which plans but does not build.
    fcntl = None  # type: ignore[assignment]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What file systems answer that cannot empty a disk's cache, most network shares among them.
_NO_FULL_SYNC = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS}
_CLOSED_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
# Not through a link that somebody put in the place of a shard or of the journal. No O_CREAT: a
# shard that somebody deleted must not come back without its header.
_WRITE = os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0) | _CLOSED_ON_EXEC


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which an OSError becomes the PolicyError that says why `path` failed."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


def write_failure(path: Path, error: OSError) -> PolicyError:
    """The error of an output that could not be written: no room, or not permitted."""
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        cure = "free some space and run the same command again: it resumes where it stopped"
        return DiskError([diagnostic("disk-full", suggestion=cure, path=str(path), reason=reason)])
    return DiskError([diagnostic("unwritable-output", path=str(path), reason=reason)])


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    with writing(path):
        opened = os.open(path, flags)
        try:
            yield opened
        finally:
            os.close(opened)


def create_file(path: Path, header: bytes, tensors: Iterable[PlannedTensor], nbytes: int) -> None:
    """Write a file of `nbytes` bytes with its header; its tensors are zeros but for tails.

    Raises: PolicyError if it cannot be written.
    """
    with writing(path), path.open("xb") as opened:
        opened.write(header)
        # The rest is a hole: blocks are allocated as rows arrive, in any order.
        opened.truncate(nbytes)
        for tensor in tensors:
            if tensor.tail:
                opened.seek(tensor.start + tensor.nbytes - len(tensor.tail))
                opened.write(tensor.tail)


def write_at(path: Path, start: int, content: Array, *, stride: int = 0) -> int:
    """Write an array's bytes into an existing file from the byte `start`; returns their count.

    stride: bytes from one line of an array [lines, …] to the next, where they are apart.
    Raises: PolicyError if they cannot be written.
    """
    together = not stride or stride * len(content) == content.nbytes
    lines = content.reshape(1 if together else len(content), -1).view("uint8")
    with _opened(path, _WRITE) as opened:
        for number, line in enumerate(lines):
            _write_all(opened, start + number * stride, line.data)
    return content.nbytes


def _write_all(opened: int, start: int, left: memoryview) -> None:
    while left:
        written = os.pwrite(opened, left, start)
        left, start = left[written:], start + written


def append(path: Path, content: bytes) -> None:
    """Add bytes to the end of a file; they are on the disk when this returns.

    Raises: PolicyError if they do not get there.
    """
    with _opened(path, _WRITE | os.O_APPEND) as opened:
        left = memoryview(content)
        while left:
            left = left[os.write(opened, left) :]
        _sync(opened)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk.

    Raises: PolicyError if they do not get there.
    """
    with _opened(path, os.O_RDONLY | _CLOSED_ON_EXEC) as opened:
        _sync(opened)


def make_folder(path: Path) -> None:
    """Make a folder, and those that it is in; their names are on the disk when this returns.

    Raises: OSError if one cannot be made, PolicyError if its name does not get there.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush(path.parent)


def _sync(opened: int) -> None:
    # On macOS fsync ends when the disk's cache has the bytes, which power loss empties.
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:
        try:
            fcntl.fcntl(opened, full_sync)
            return
        except OSError as error:
            if error.errno not in _NO_FULL_SYNC:
                raise
    is_folder = stat.S_ISDIR(os.fstat(opened).st_mode)
    # fdatasync leaves out times alone, and is missing on some systems.
    (os.fsync if is_folder else getattr(os, "fdatasync", os.fsync))(opened)
