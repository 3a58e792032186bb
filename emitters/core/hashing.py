"""SHA-256 of written files and of the tensors in them, in one pass over each file."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from emitters.core.progress import Progress
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import PlannedTensor
from policy_dsl.regular_files import file_stat, opened

# Small enough for the caches: both digests read a chunk while it is there.
_CHUNK_NBYTES = 2**20


class FileHashes(NamedTuple):
    """Bytes of a file, and the hex digests of all of it and of each tensor in it."""

    nbytes: int
    sha256: str
    tensors: dict[str, str]


def hash_files(
    folder: Path,
    names: Iterable[str],
    tensors: Iterable[TensorInfo | PlannedTensor],
    progress: Progress,
    *,
    jobs: int,
) -> dict[str, FileHashes]:
    """The hashes of files of a folder, by name, and of these tensors in them, `jobs` at a time.

    Raises: PolicyError if a file cannot be read.
    """
    lock, held = Lock(), defaultdict(list)
    for tensor in tensors:
        held[tensor.file].append(tensor)

    def hashed(name: str) -> FileHashes:
        whole, parts = sha256(), {}
        buffer = memoryview(bytearray(_CHUNK_NBYTES))
        with opened(folder / name) as file:

            def read(nbytes: int) -> str:
                # Both digests from one reading: a second would cost the disk more than the CPU.
                part = sha256()
                while nbytes > 0 and (got := file.readinto(buffer[:nbytes])):
                    whole.update(buffer[:got])
                    part.update(buffer[:got])
                    nbytes -= got
                    with lock:
                        progress.advance(got)
                return part.hexdigest()

            for tensor in sorted(held[name], key=attrgetter("start", "nbytes")):
                read(tensor.start - file.tell())
                parts[tensor.name] = read(tensor.nbytes)
            read(sys.maxsize)
            return FileHashes(file.tell(), whole.hexdigest(), parts)

    names = list(names)
    progress.begin("hash", sum(file_stat(folder / name).st_size for name in names), 0)
    try:
        with ThreadPoolExecutor(jobs, "hash") as workers:
            return dict(zip(names, workers.map(hashed, names), strict=True))
    finally:
        progress.end()
