"""Files of tensors, read and written at their places while memory stays small.

A file is opened for every read and write: no count of shards is too many, and each read notices
a shard that was replaced since the build began.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emitters.numerics import VALUE_TYPES, Array
from policy_dsl.diagnostics import DiskError, diagnostic, fail
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import PlannedTensor
from policy_dsl.regular_files import file_stat, opened

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
_PIECE_NBYTES = 4 * 2**20
# The cure where files change under a build.
CHANGED = "run the same command again, once nothing writes to the file"


class FileFacts(NamedTuple):
    """What distinguishes two states of a file: bytes and modification time."""

    nbytes: int
    mtime_ns: int


def file_facts(root: Path, files: Iterable[str]) -> dict[str, FileFacts]:
    """Files in `root` by name. Raises: PolicyError for the first that is not a regular file."""
    found = {name: file_stat(root / name) for name in sorted(set(files))}
    return {name: FileFacts(facts.st_size, facts.st_mtime_ns) for name, facts in found.items()}


class Source(NamedTuple):
    """A checkpoint folder and the state in which its files must stay. Plain data."""

    root: Path
    facts: Mapping[str, FileFacts]

    def read(self, file: str, start: int, nbytes: int) -> Array:
        """uint8 [nbytes] from byte `start`. Raises: PolicyError if the file is gone or changed."""
        return self.lines(file, start, (1, nbytes), nbytes).reshape(-1)

    def whole(self, names: Iterable[str]) -> dict[str, bytes]:
        """The files of these names that it has. Raises: PolicyError as `read` does."""
        held = [name for name in names if name in self.facts]
        return {name: self.read(name, 0, self.facts[name].nbytes).tobytes() for name in held}

    def pieces(self, file: str) -> Iterator[memoryview]:
        """All bytes of a file, a few MiB at a time. Raises: PolicyError as `read` does."""
        nbytes = self.facts[file].nbytes
        for start in range(0, nbytes, _PIECE_NBYTES):
            yield self.read(file, start, min(_PIECE_NBYTES, nbytes - start)).data

    def lines(self, file: str, start: int, shape: tuple[int, int], stride: int) -> Array:
        """uint8 [lines, nbytes], one every `stride` bytes from `start`. Raises as `read` does."""
        content, missing = np.empty(shape, np.uint8), 0
        with opened(self.root / file) as stream:
            # Of the opened file, so that a rename in between cannot deceive.
            facts = os.fstat(stream.fileno())
            for number, line in enumerate(content):
                stream.seek(start + number * stride)
                left = line.data
                # One read gives 2 GiB at most, and less on some file systems.
                while left and (count := stream.readinto(left)):
                    left = left[count:]
                missing += len(left)
        if missing or FileFacts(facts.st_size, facts.st_mtime_ns) != self.facts[file]:
            reason = "it became shorter" if missing else "its size or time is different now"
            raise fail("source-changed", suggestion=CHANGED, file=file, reason=reason)
        return content

    def rectangle(self, tensor: TensorInfo, rows: range, columns: range) -> Array:
        """[rows, columns] of a tensor viewed as [rows, last axis]; both follow each other.

        BF16 comes as uint16 bit patterns, F16 and F32 as themselves, all else as its bytes.
        """
        width, stride = prod(tensor.shape[-1:]), tensor.nbytes // max(1, prod(tensor.shape[:-1]))
        size = stride // max(1, width)
        start = tensor.start + rows.start * stride + columns.start * size
        # Whole rows are one line.
        whole = len(columns) == width
        shape = (1, len(rows) * stride) if whole else (len(rows), len(columns) * size)
        content = self.lines(tensor.file or "", start, shape, stride).reshape(-1)
        known = VALUE_TYPES.get(tensor.dtype)
        return (content.view(known.storage) if known else content).reshape(len(rows), -1)


def columns(shape: tuple[int, ...]) -> int:
    """Length of the last axis; 1 for a scalar."""
    return shape[-1] if shape else 1


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which an OSError becomes the PolicyError that says why `path` failed."""
    try:
        yield
    except OSError as error:
        raise write_failure(path, error) from error


def write_failure(path: Path, error: OSError) -> DiskError:
    """The error of an output that could not be written: no room, or not permitted."""
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        cure = "free some space and run the same command again: it resumes where it stopped"
        return DiskError([diagnostic("disk-full", suggestion=cure, path=str(path), reason=reason)])
    return DiskError([diagnostic("unwritable-output", path=str(path), reason=reason)])


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    with writing(path):
        opened = os.open(path, flags)
        try:
            yield opened
        finally:
            os.close(opened)


def create_file(path: Path, header: bytes, tensors: Iterable[PlannedTensor], nbytes: int) -> None:
    """Write a file of `nbytes` bytes: its header, then zeros but for tails. Raises: PolicyError."""
    with writing(path), path.open("xb") as file:
        file.write(header)
        # The rest is a hole: blocks are allocated as rows arrive, in any order.
        file.truncate(nbytes)
        for tensor in [tensor for tensor in tensors if tensor.tail]:
            file.seek(tensor.start + tensor.nbytes - len(tensor.tail))
            file.write(tensor.tail)


def write_at(path: Path, start: int, content: Array, *, stride: int = 0) -> None:
    """Write an array's bytes into an existing file from the byte `start`.

    stride: bytes from one line of an array [lines, …] to the next, where they are apart.
    Raises: PolicyError if they cannot be written.
    """
    together = not stride or stride * len(content) == content.nbytes
    lines = content.reshape(1 if together else len(content), -1).view("uint8")
    with _descriptor(path, _WRITE) as file:
        for number, line in enumerate(lines):
            at, left = start + number * stride, line.data
            while left:
                written = os.pwrite(file, left, at)
                at, left = at + written, left[written:]


def append(path: Path, content: bytes) -> None:
    """Add bytes to the end of a file; on return they are on the disk. Raises: PolicyError."""
    with _descriptor(path, _WRITE | os.O_APPEND) as file:
        left = memoryview(content)
        while left:
            left = left[os.write(file, left) :]
        _sync(file)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk, or raise PolicyError."""
    with _descriptor(path, os.O_RDONLY | _CLOSED_ON_EXEC) as file:
        _sync(file)


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
    try:
        if full_sync is not None:
            fcntl.fcntl(opened, full_sync)
            return
    except OSError as error:
        if error.errno not in _NO_FULL_SYNC:
            raise
    is_folder = stat.S_ISDIR(os.fstat(opened).st_mode)
    # fdatasync leaves out times alone, and is missing on some systems.
    (os.fsync if is_folder else getattr(os, "fdatasync", os.fsync))(opened)
