"""The numbers before the codes of HFQ blocks: which of them no reader can compute with.

Source: Kaden-Schutt/hipfire at commits 91e58a5 and 0e5eb9a, `crates/hipfire-quantize`.
"""

from __future__ import annotations

import numpy as np

from emitters.numerics.value_types import Array


def minmax_header(blocks: Array) -> Array:
    """float32 [blocks, 2]: scale and smallest value. blocks: uint8 [blocks, bytes]."""
    return np.ascontiguousarray(blocks[:, :8]).view(np.float32)


def half_header(blocks: Array, count: int) -> Array:
    """float16 [blocks, count]: a scale, or levels. blocks: uint8 [blocks, bytes]."""
    return np.ascontiguousarray(blocks[:, : 2 * count]).view(np.float16)


def first_bad_minmax(header: Array) -> int:
    """The first block whose scale is not above 0, or has a number that is not finite; or -1."""
    # A NaN that signals would warn; it is not finite.
    with np.errstate(invalid="ignore"):
        return _first(np.all(np.isfinite(header), axis=1) & (header[:, 0] > 0))


def first_bad_scale(header: Array) -> int:
    """The first block whose scale is below 0 or not finite, or -1."""
    scale = header[:, 0]
    with np.errstate(invalid="ignore"):
        return _first(np.isfinite(scale) & (scale >= 0))


def first_bad_levels(header: Array) -> int:
    """The first block whose levels do not ascend or are not all finite, or -1."""
    with np.errstate(invalid="ignore"):
        ascending = np.all(header[:, 1:] >= header[:, :-1], axis=1)
        return _first(np.all(np.isfinite(header), axis=1) & ascending)


def _first(good: Array) -> int:
    """The index of the first False, or -1."""
    return -1 if good.all() else int(np.argmin(good))
