"""Bytes and rows of a checkpoint's shards, read at their places while memory stays small.

A file is opened for every read and compared with what it was when the build began, so that
a shard that is replaced under a running build is noticed, and no count of shards is too many.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emitters.numerics.value_types import VALUE_TYPES, Array
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.inventory import TensorInfo


class FileFacts(NamedTuple):
    """What tells two states of a file apart: bytes and modification time."""

    nbytes: int
    mtime_ns: int


def file_facts(root: Path, files: Iterable[str]) -> dict[str, FileFacts]:
    """Size and modification time of files in `root`, by name.

    Raises: PolicyError for the first one that is not there.
    """
    found = {}
    for name in sorted(set(files)):
        try:
            facts = (root / name).stat()
        except OSError as error:
            raise _unreadable(root / name, error) from error
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
        path = self.root / file
        content = np.empty(nbytes, np.uint8)
        try:
            with FileIO(path) as opened:
                # Of the opened file, so that a rename in between cannot deceive.
                facts = os.fstat(opened.fileno())
                opened.seek(start)
                filled = _fill(opened, content.data)
        except OSError as error:
            raise _unreadable(path, error) from error
        if filled < nbytes:
            raise fail("source-changed", file=file, reason="it became shorter")
        if FileFacts(facts.st_size, facts.st_mtime_ns) != self.facts[file]:
            raise fail("source-changed", file=file, reason="its size or time is another one")
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


def columns(shape: tuple[int, ...]) -> int:
    """Length of the last axis; 1 for a scalar."""
    return shape[-1] if shape else 1


def row_nbytes(tensor: TensorInfo) -> int:
    """Bytes of one row of a tensor viewed as [rows, last axis]."""
    return tensor.nbytes // max(1, prod(tensor.shape[:-1]))


def _fill(opened: FileIO, content: memoryview) -> int:
    """Bytes read: as many as `content` has, unless the file ends before."""
    filled = 0
    while filled < len(content):
        # One read gives 2 GiB at most, and less on some file systems.
        got = opened.readinto(content[filled:])
        if not got:
            break
        filled += got
    return filled


def _unreadable(path: Path, error: OSError) -> PolicyError:
    return fail("unreadable-file", path=str(path), reason=error.strerror or str(error))
