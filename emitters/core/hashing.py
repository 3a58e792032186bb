"""SHA-256 of written files and of the tensors in them, in one pass over each file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from policy_dsl.regular_files import opened

# Small enough for the caches: both digests read a chunk while it is there.
_CHUNK_NBYTES = 2**20

# Name -> (start, stop) of the tensors of a file, in bytes from its beginning.
Places = Mapping[str, tuple[int, int]]


class FileHashes(NamedTuple):
    """Bytes of a file, and the hex digests of all of it and of each tensor in it."""

    nbytes: int
    sha256: str
    tensors: dict[str, str]


def hash_files(
    files: Mapping[Path, Places], *, jobs: int, advance: Callable[[int], None]
) -> dict[Path, FileHashes]:
    """The hashes of files, `jobs` at a time.

    advance: called with bytes as they are read, from several threads.
    Raises: PolicyError if a file cannot be read.
    """
    with ThreadPoolExecutor(jobs, "hash") as workers:
        hashed = workers.map(lambda path: _hash_file(path, files[path], advance), files)
        return dict(zip(files, hashed, strict=True))


def _hash_file(path: Path, places: Places, advance: Callable[[int], None]) -> FileHashes:
    # Both digests from one reading: a second one would cost the disk more than the CPU.
    whole = hashlib.sha256()
    tensors: dict[str, str] = {}
    with opened(path) as file:
        for name, start, stop in _stretches(places, os.fstat(file.fileno()).st_size):
            part = hashlib.sha256()
            for chunk in _chunks(file, start, stop):
                whole.update(chunk)
                if name is not None:
                    part.update(chunk)
                advance(len(chunk))
            if name is not None:
                tensors[name] = part.hexdigest()
        return FileHashes(file.tell(), whole.hexdigest(), tensors)


def _stretches(places: Places, nbytes: int) -> Iterator[tuple[str | None, int, int]]:
    """All bytes of a file in order: those of a tensor with its name, the others without."""
    at = 0
    for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        if start > at:
            yield None, at, start
        yield name, start, stop
        at = stop
    if at < nbytes:
        yield None, at, nbytes


def _chunks(file: FileIO, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes from start to stop, piece by piece in one buffer."""
    buffer = memoryview(bytearray(min(_CHUNK_NBYTES, stop - start)))
    while start < stop:
        got = file.readinto(buffer[: stop - start])
        # The file became shorter: the sizes are compared afterwards.
        if not got:
            return
        yield buffer[:got]
        start += got
