"""Sizes as people write them: 90GiB, 5 GB, 4096."""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kKMGT]?)(i?)B)?")
_POWER = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int | None:
    """Bytes of a size such as 5GiB (1024³) or 5GB (1000³), None if it is none.

    A number without a unit is bytes.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or len(found[1]) > 20 or (found[3] and not found[2]):
        return None
    unit: int = (1024 if found[3] else 1000) ** _POWER[found[2] or ""]
    return round(float(found[1]) * unit)
