"""Bytes and rows of a checkpoint's shards, read at their places while memory stays small.

A file is opened for every read and compared with what it was when the build began, so that
a shard that is replaced under a running build is noticed, and no count of shards is too many.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emitters.numerics.value_types import VALUE_TYPES, Array
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.inventory import TensorInfo
from policy_dsl.regular_files import file_stat, opened

# The cure where files change under a build.
CHANGED = "run the same command again, once nothing writes to the file"


class FileFacts(NamedTuple):
    """What tells two states of a file apart: bytes and modification time."""

    nbytes: int
    mtime_ns: int


def file_facts(root: Path, files: Iterable[str]) -> dict[str, FileFacts]:
    """Size and modification time of files in `root`, by name.

    Raises: PolicyError for the first one that is not there, or not a regular file.
    """
    found = {}
    for name in sorted(set(files)):
        facts = file_stat(root / name)
        found[name] = FileFacts(facts.st_size, facts.st_mtime_ns)
    return found


class Source(NamedTuple):
    """A checkpoint folder and the state in which its files must stay. Plain data."""

    root: Path
    facts: Mapping[str, FileFacts]

    def read(self, file: str, start: int, nbytes: int) -> Array:
        """uint8 [nbytes] of a file, from the byte `start`.

        Raises: PolicyError if the file is gone, unreadable, or not what it was.
        """
        return self.lines(file, start, (1, nbytes), nbytes).reshape(-1)

    def lines(self, file: str, start: int, shape: tuple[int, int], stride: int) -> Array:
        """uint8 [lines, nbytes] of a file: the first of each `stride` bytes, from `start`.

        Raises: PolicyError as `read` does.
        """
        path = self.root / file
        content = np.empty(shape, np.uint8)
        with opened(path) as stream:
            # Of the opened file, so that a rename in between cannot deceive.
            facts = os.fstat(stream.fileno())
            filled = 0
            for number, line in enumerate(content):
                stream.seek(start + number * stride)
                filled += _fill(stream, line.data)
        if filled < content.nbytes:
            raise _changed(file, "it became shorter")
        if FileFacts(facts.st_size, facts.st_mtime_ns) != self.facts[file]:
            raise _changed(file, "its size or time is different now")
        return content

    def rows(self, tensor: TensorInfo, first: int, count: int) -> Array:
        """`count` rows of a tensor viewed as [rows, last axis], from row `first`.

        BF16 comes as uint16 bit patterns, F16 and F32 as themselves, all else as its bytes.
        Raises: PolicyError as `read` does.
        """
        width = row_nbytes(tensor)
        file = tensor.file or ""
        content = self.read(file, tensor.start + first * width, count * width)
        known = VALUE_TYPES.get(tensor.dtype)
        typed = content.view(known.storage) if known else content
        return typed.reshape(count, -1)


def picked_rows(
    read: Callable[[int, int], Array],
    tensor: TensorInfo,
    picked: Sequence[int],
    span: tuple[int, int],
) -> Array:
    """The rows of a span, counted among those that are picked, or among all if none are.

    read(first, count) -> rows of the tensor. span: first and count.
    """
    first, count = span
    if not picked:
        return read(first, count)
    if n_rows(tensor) == 1:
        return read(0, 1)[:, list(picked)]
    stretches: list[list[int]] = []
    for row in picked[first : first + count]:
        if stretches and row == sum(stretches[-1]):
            stretches[-1][1] += 1
        else:
            stretches.append([row, 1])
    # Neighbours are read at once: a router keeps most of its rows.
    return np.concatenate([read(start, length) for start, length in stretches])


def columns(shape: tuple[int, ...]) -> int:
    """Length of the last axis; 1 for a scalar."""
    return shape[-1] if shape else 1


def n_rows(tensor: TensorInfo) -> int:
    """Rows of a tensor viewed as [rows, last axis]; an empty one counts as one."""
    return max(1, prod(tensor.shape[:-1]))


def row_nbytes(tensor: TensorInfo) -> int:
    """Bytes of one row of a tensor viewed as [rows, last axis]."""
    return tensor.nbytes // n_rows(tensor)


def _fill(stream: FileIO, content: memoryview) -> int:
    """Bytes read: as many as `content` has, unless the file ends before."""
    filled = 0
    while filled < len(content):
        # One read gives 2 GiB at most, and less on some file systems.
        got = stream.readinto(content[filled:])
        if not got:
            break
        filled += got
    return filled


def _changed(file: str, reason: str) -> PolicyError:
    return fail("source-changed", suggestion=CHANGED, file=file, reason=reason)
