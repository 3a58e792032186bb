"""Hadamard rotation of 16 rows at once.

The rows are side by side as lanes: element j of all rows, then element j + 1 of all rows.
Loops then run over neighbouring floats, while each row keeps its own fixed order of additions.

A row is split into the powers of two of its length, largest first, and each of these blocks
is transformed on its own: 1536 = 1024 + 512. The matrix is Sylvester's, scaled to be
orthonormal, hence its own inverse.
Source: jang 2.5.50, `jang_tools.turboquant.rotation`.
"""

import numpy as np

from emitters.numerics import F32, Array
from emitters.numerics.jit import device, kernel, reads, writes
from emitters.numerics.rounding import widen

LANES = 16  # rows side by side
_CHUNK = 256  # elements of each lane that fit the first-level cache together

_LANES = np.uint64(LANES)
_FOUR = np.uint64(4)


@device
def _shuffle(pairs: Array, halves: Array) -> None:
    """pairs = the elements of both halves in turn; both float32 [n], not overlapping."""
    n = halves.shape[0] // 2
    first, second = halves[:n], halves[n:]
    for i in range(n):
        pairs[2 * i] = first[i]
        pairs[2 * i + 1] = second[i]


@device
def _unshuffle(halves: Array, pairs: Array) -> None:
    """The inverse of `_shuffle`: halves = the even elements, then the odd ones."""
    n = halves.shape[0] // 2
    first, second = halves[:n], halves[n:]
    for i in range(n):
        first[i] = pairs[2 * i]
        second[i] = pairs[2 * i + 1]


@device
def load_lanes(kind: int, values: Array, signs: Array, lanes: Array) -> None:
    """lanes = up to 16 rows of values times signs; rows that are missing repeat the last one.

    values: raw bits [rows * columns]; signs: float32 [columns]; lanes: float32 [columns, 16].
    """
    scratch = np.empty(_CHUNK * LANES, np.float32)
    columns, half = signs.shape[0], LANES // 2
    last = values.shape[0] // columns - 1
    for start in range(0, columns, _CHUNK):
        part = signs[start : start + _CHUNK]
        n = part.shape[0]
        # The first of four shuffles is done on the way: row k beside row k + 8.
        pairs, chunk = scratch[: n * LANES], lanes[start * LANES : (start + n) * LANES]
        for k in range(half):
            first, second = min(k, last) * columns, min(k + half, last) * columns
            a, b = values[first + start :][:n], values[second + start :][:n]
            target = pairs[2 * k * n :][: 2 * n]
            for i in range(n):
                target[2 * i] = widen(kind, a[i]) * part[i]
                target[2 * i + 1] = widen(kind, b[i]) * part[i]
        _shuffle(chunk, pairs)
        _shuffle(pairs, chunk)
        _shuffle(chunk, pairs)


@device
def store_lanes(lanes: Array, signs: Array, values: Array) -> None:
    """values = the lanes times signs, row by row; lanes are destroyed.

    lanes, signs: as in `load_lanes`; values: float32 [rows * columns], up to 16 rows.
    """
    scratch = np.empty(_CHUNK * LANES, np.float32)
    columns = signs.shape[0]
    for start in range(0, columns, _CHUNK):
        part = signs[start : start + _CHUNK]
        n = part.shape[0]
        rows, chunk = scratch[: n * LANES], lanes[start * LANES : (start + n) * LANES]
        _unshuffle(rows, chunk)
        _unshuffle(chunk, rows)
        _unshuffle(rows, chunk)
        _unshuffle(chunk, rows)
        for k in range(values.shape[0] // columns):
            source, target = chunk[k * n :][:n], values[k * columns + start :][:n]
            for i in range(n):
                target[i] = source[i] * part[i]


@device
def _times(value: np.float32, scale: np.float32 | None) -> np.float32:
    """The value times scale, if there is one; known when compiling."""
    return value if scale is None else value * scale


@device
def _four(lanes: Array, start: np.uint64, step: np.uint64, scale: np.float32 | None) -> None:
    """Two stages on the 4 * step floats from start on, then times scale."""
    double = step + step
    triple = double + step
    for i in range(start, start + step):
        a, b, c, d = lanes[i], lanes[i + step], lanes[i + double], lanes[i + triple]
        a, b, c, d = a + b, a - b, c + d, c - d
        lanes[i], lanes[i + step] = _times(a + c, scale), _times(b + d, scale)
        lanes[i + double], lanes[i + triple] = _times(a - c, scale), _times(b - d, scale)


@device
def _stages(lanes: Array, step: np.uint64, scale: np.float32 | None) -> None:
    """All stages that add floats at least a step apart, then times scale."""
    n = np.uint64(lanes.shape[0])
    while _FOUR * step < n:
        for start in range(np.uint64(0), n, _FOUR * step):
            _four(lanes, np.uint64(start), step, None)
        step *= _FOUR
    if _FOUR * step == n:
        _four(lanes, np.uint64(0), step, scale)
    elif step < n:
        for i in range(step):
            a, b = lanes[i], lanes[i + step]
            lanes[i], lanes[i + step] = _times(a + b, scale), _times(a - b, scale)


@device
def rotate(lanes: Array) -> None:
    """The rotation of every lane, in place, signs aside; lanes: float32 [n, 16], flat, any n."""
    columns, start = lanes.shape[0] // LANES, 0
    while start < columns:
        n = columns - start
        while n & (n - 1):
            n &= n - 1
        block = lanes[start * LANES : (start + n) * LANES]
        scale, first = (
            np.float32(1 / np.sqrt(np.float64(n))),
            _CHUNK * LANES if n > _CHUNK else LANES,
        )
        # Chunk by chunk as long as stages stay inside a chunk: that is a pass over memory saved.
        for at in range(0, n * LANES if n > _CHUNK else 0, first):
            _stages(block[at : at + first], _LANES, None)
        _stages(block, np.uint64(first), scale)
        start += n


@device
def rotate_lanes(values: Array, before: Array, after: Array, lanes: Array, rotated: Array) -> None:
    """rotated = each row of values times the signs before, rotated, times the signs after it.

    values, rotated: float32 [rows * columns], up to 16 rows, maybe the same array; before, after:
    float32 [columns]; lanes: float32 [columns, 16], scratch.
    """
    load_lanes(F32, values.view(np.uint32), before, lanes)
    rotate(lanes)
    store_lanes(lanes, after, rotated)


@kernel(reads("float32"), reads("float32"), reads("float32"), writes("float32"))
def rotate_rows(values: Array, before: Array, after: Array, rotated: Array) -> None:
    """The same of any number of rows."""
    size = before.shape[0] * LANES
    lanes = np.empty(size, np.float32)
    for start in range(0, values.shape[0], size):
        rotate_lanes(values[start:][:size], before, after, lanes, rotated[start:][:size])
