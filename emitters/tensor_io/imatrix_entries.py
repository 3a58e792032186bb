"""What both kinds of importance matrix files come to: where the numbers of an entry are."""

from __future__ import annotations

from typing import NamedTuple

SUM_NBYTES = 4  # float32, counts likewise


class Entry(NamedTuple):
    """Where the numbers of one matrix, or of a layer's experts, stand in a file.

    n_sums float32 from the byte `sums_at`, n_counts float32 from `counts_at`; in a legacy file
    counts_at is None, and `calls` takes the place of one count.
    """

    sums_at: int
    n_sums: int
    n_counts: int = 1
    counts_at: int | None = None
    calls: int = 0
