"""Where importance matrix files keep the numbers of an entry, and the older form, `.dat`."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from emitters.tensor_io.read import Source
from policy_dsl.escaping import shown

SUM_NBYTES = 4  # float32, counts likewise
# More than any model has; a file of nothing but tiny entries must not fill the memory.
MAX_ENTRIES = 20_000
_MAX_NAME = 1024


class Entry(NamedTuple):
    """Where the numbers of one matrix, or of a layer's experts, are in a file.

    n_sums float32 from the byte `sums_at`, n_counts float32 from `counts_at`; in a legacy file
    counts_at is None, and `calls` takes the place of one count.
    """

    sums_at: int
    n_sums: int
    n_counts: int = 1
    counts_at: int | None = None
    calls: int = 0


def legacy_entries(source: Source, file: str) -> dict[str, Entry]:
    """Entry by name. Calls are chunks of text, and sums are means times calls.

    Raises: ValueError, saying why, if the file is not such a file, whole and with nothing after
    its end; PolicyError if it cannot be read.
    Source: ggml-org/llama.cpp 006e7ef, tools/imatrix/imatrix.cpp, `save_imatrix_legacy`.
    """
    walk = _Walk(source, file, source.facts[file].nbytes)
    (count,) = walk.integers(1)
    if not 0 < count <= MAX_ENTRIES:
        raise ValueError("it begins neither as GGUF nor with a count of entries")
    entries: dict[str, Entry] = {}
    for number in range(count):
        try:
            name, entry = walk.entry()
        except ValueError as defect:
            raise ValueError(f"entry {number + 1} of {count}: {defect}") from None
        if name in entries:
            raise ValueError(f'there are two entries "{name}"')
        entries[name] = entry
    walk.end()
    return entries


@dataclass
class _Walk:
    """A way through the file, from one length to the next."""

    source: Source
    file: str
    nbytes: int
    at: int = 0

    def take(self, count: int) -> bytes:
        """The next bytes."""
        start = self.skip(count)
        return self.source.read(self.file, start, count).tobytes()

    def skip(self, count: int) -> int:
        """The place of the next bytes, which are left unread."""
        if count > self.nbytes - self.at:
            raise ValueError(f"it needs {count} bytes where {self.nbytes - self.at} are left")
        start, self.at = self.at, self.at + count
        return start

    def integers(self, count: int) -> tuple[int, ...]:
        """The next 32-bit integers."""
        return struct.unpack(f"<{count}i", self.take(4 * count))

    def entry(self) -> tuple[str, Entry]:
        """The next entry and its name."""
        (length,) = self.integers(1)
        if not 0 < length <= _MAX_NAME:
            raise ValueError(f"its name would have {length} bytes")
        # A name that is not UTF-8 raises a ValueError too.
        name = self.take(length).decode()
        if not name.isprintable():
            raise ValueError("its name holds characters that cannot be printed")
        calls, n_sums = self.integers(2)
        if calls < 1 or n_sums < 1:
            raise ValueError(f'"{shown(name)}" says {calls} calls and {n_sums} sums')
        return name, Entry(self.skip(SUM_NBYTES * n_sums), n_sums, calls=calls)

    def end(self) -> None:
        """Go past what may follow the entries: chunks, and the name of the text."""
        if self.at < self.nbytes:
            self.skip(4)
        if self.at < self.nbytes:
            (length,) = self.integers(1)
            if length != self.nbytes - self.at:
                left = self.nbytes - self.at
                raise ValueError(f"{left} bytes follow its last entry, not {length}")
            self.skip(length)
