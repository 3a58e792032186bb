"""Bytes and rows of a checkpoint's shards, read at their places while memory stays small.

A file is opened for every read and compared with what it was when the build began, so that
a shard that is replaced under a running build is noticed, and no count of shards is too many.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emitters.numerics.value_types import VALUE_TYPES, Array
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.inventory import TensorInfo
from policy_dsl.regular_files import file_stat, opened

_PIECE_NBYTES = 4 * 2**20
# The cure where files change under a build.
CHANGED = "run the same command again, once nothing writes to the file"


class FileFacts(NamedTuple):
    """What distinguishes two states of a file: bytes and modification time."""

    nbytes: int
    mtime_ns: int


def file_facts(root: Path, files: Iterable[str]) -> dict[str, FileFacts]:
    """Size and modification time of files in `root`, by name.

    Raises: PolicyError for the first one that is not there, or not a regular file.
    """
    found = {name: file_stat(root / name) for name in sorted(set(files))}
    return {name: FileFacts(facts.st_size, facts.st_mtime_ns) for name, facts in found.items()}


class Source(NamedTuple):
    """A checkpoint folder and the state in which its files must stay. Plain data."""

    root: Path
    facts: Mapping[str, FileFacts]

    def read(self, file: str, start: int, nbytes: int) -> Array:
        """uint8 [nbytes] of a file, from the byte `start`.

        Raises: PolicyError if the file is gone, unreadable, or not what it was.
        """
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
        """uint8 [lines, nbytes] of a file: the first of each `stride` bytes, from `start`.

        Raises: PolicyError as `read` does.
        """
        content = np.empty(shape, np.uint8)
        with opened(self.root / file) as stream:
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

    def rectangle(self, tensor: TensorInfo, rows: range, columns: range) -> Array:
        """[rows, columns] of a tensor viewed as [rows, last axis]; both follow each other.

        BF16 comes as uint16 bit patterns, F16 and F32 as themselves, all else as its bytes.
        Raises: PolicyError as `read` does.
        """
        file, width = tensor.file or "", tensor.shape[-1] if tensor.shape else 1
        stride = tensor.nbytes // max(1, prod(tensor.shape[:-1]))
        size = stride // max(1, width)
        start = tensor.start + rows.start * stride + columns.start * size
        if len(columns) == width:
            content = self.read(file, start, len(rows) * stride)
        else:
            content = self.lines(file, start, (len(rows), len(columns) * size), stride)
        known = VALUE_TYPES.get(tensor.dtype)
        typed = content.reshape(-1).view(known.storage) if known else content
        return typed.reshape(len(rows), -1)


def _fill(stream: FileIO, left: memoryview) -> int:
    """Bytes read: as many as there is room for, unless the file ends before."""
    filled = 0
    # One read gives 2 GiB at most, and less on some file systems.
    while left and (count := stream.readinto(left)):
        left, filled = left[count:], filled + count
    return filled


def _changed(file: str, reason: str) -> PolicyError:
    return fail("source-changed", suggestion=CHANGED, file=file, reason=reason)


def columns(shape: tuple[int, ...]) -> int:
    """Length of the last axis; 1 for a scalar."""
    return shape[-1] if shape else 1
