"""Files of tensors written in any order: header first, tensors at their offsets.

A file has its full length from the start; a file is opened for every write, so a write needs
nothing but a path and a place.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from emitters.numerics.value_types import Array
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.plan import PlannedTensor

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# fdatasync is missing on some systems; fsync does the same and more.
_sync = getattr(os, "fdatasync", os.fsync)


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
        cure = "free some space and run the same command again: it goes on where it stopped"
        return fail("disk-full", path=str(path), reason=reason, suggestion=cure)
    return fail("unwritable-output", path=str(path), reason=reason)


def create_file(
    path: Path, header: bytes, tensors: Iterable[PlannedTensor], nbytes: int
) -> None:
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

    stride: bytes from one line of an array [lines, …] to the next, where they lie apart.
    Raises: PolicyError if they cannot be written.
    """
    together = not stride or stride * len(content) == content.nbytes
    lines = content.reshape(1 if together else len(content), -1).view("uint8")
    with writing(path):
        # No O_CREAT: a shard that somebody deleted must not come back without its header.
        opened = os.open(path, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            for number, line in enumerate(lines):
                _write_all(opened, start + number * stride, line.data)
        finally:
            os.close(opened)
    return content.nbytes


def _write_all(opened: int, start: int, left: memoryview) -> None:
    while left:
        written = os.pwrite(opened, left, start)
        left, start = left[written:], start + written


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk.

    Raises: PolicyError if they do not get there.
    """
    with writing(path):
        opened = os.open(path, os.O_RDONLY)
        try:
            (os.fsync if path.is_dir() else _sync)(opened)
        finally:
            os.close(opened)
