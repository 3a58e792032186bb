"""Whether the codes of a matrix are those that rounding its source's values may give.

Written from `docs/verifying.md` and the pages about the formats alone, in float64, one matrix
at a time: what the verifier says is compared with this, so nothing of it is used here but the
tables that no page lists (signs, centroids).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# Part -> its bytes, [rows or lines, bytes].
Parts = Mapping[str, Array]

UNIT = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
FLOOR = {"BF16": 0.0, "F16": 2.0**-25, "F32": 0.0}
FLOAT_SLOP, STEP_SLOP = 2.0**-20, 2.0**-10
# So near to a bound, float32 and float64 may disagree about the side.
EDGE = 2e-3
IN, NEAR, OUT = "in", "near", "out"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def floats(raw: Array, dtype: str) -> Array:
    """float64: the values of bytes of a dtype."""
    flat = np.ascontiguousarray(raw)
    if dtype == "BF16":
        return (flat.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(float)
    return flat.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(float)


def rounded(values: Array, dtype: str) -> Array:
    """float64: the values rounded to a dtype."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "F16":
            return values.astype(np.float16).astype(float)
        wide = np.ascontiguousarray(values.astype(np.float32))
    if dtype == "F32":
        return wide.astype(float)
    bits = wide.view(np.uint32)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(wide), wide, up.view(np.float32)).astype(float)


def stream(raw: Array, bits: int, count: int) -> Array:
    """The codes of each row of bytes, a stream of bits with the lowest first."""
    ones = np.unpackbits(np.ascontiguousarray(raw), axis=1, bitorder="little")
    used = ones[:, : count * bits].reshape(len(raw), count, bits)
    return used @ (1 << np.arange(bits))


def side(values: Array, decoded: Array, allowed: Array) -> str:
    """On which side of the bounds the worst value is."""
    with np.errstate(invalid="ignore", over="ignore"):
        off = np.abs(values - decoded)
        if not (off <= allowed * (1 + EDGE)).all():
            return OUT
        return IN if (off <= allowed * (1 - EDGE)).all() else NEAR


def judged(values: Array, parts: Parts, treatment: Mapping[str, Any], dtype: str) -> str:
    """The side for a matrix. values: float64 [out, in], of a BF16 source; dtype: as coded."""
    scheme, bits, size = (treatment.get(key) for key in ("scheme", "bits", "group_size"))
    relative = 0.0 if dtype in ("BF16", "F32") else UNIT[dtype]
    before = np.abs(values) * (relative + FLOAT_SLOP) + (FLOOR[dtype] if relative else 0)
    if scheme == "affine":
        return _affine(values, parts, (bits, size), dtype, before)
    if scheme in ("mxfp4", "mxfp8", "nvfp4"):
        return _small_floats(values, parts, scheme, dtype, before)
    if scheme == "mxtq":
        return _mxtq(values, parts, bits)
    if scheme == "int":
        return _int(values, parts, treatment, before)
    return _blocks(values, parts["weight"], scheme, bits, size)


def _affine(values: Array, parts: Parts, width: tuple[int, int], dtype: str, before: Array) -> str:
    bits, size = width
    codes = stream(parts["weight"], bits, values.shape[1]).astype(float)
    scale, bias = (
        np.repeat(floats(parts[part], dtype), size, axis=1) for part in ("scales", "biases")
    )
    decoded = rounded(rounded(codes * scale, dtype) + bias, dtype)
    reach = np.where(codes == 2**bits - 1, 1.0, 0.5) + STEP_SLOP
    unit, floor = UNIT[dtype], FLOOR[dtype]
    lost = (codes + 1) * (2 * unit * np.abs(scale) + floor)
    lost += unit * (np.abs(bias) + np.abs(decoded)) + 2 * floor
    return side(values, decoded, reach * np.abs(scale) + lost + before)


def _small_floats(values: Array, parts: Parts, scheme: str, dtype: str, before: Array) -> str:
    bits, size = (8, 32) if scheme == "mxfp8" else (4, 16 if scheme == "nvfp4" else 32)
    grid = _e4m3()[:127] if scheme == "mxfp8" else E2M1
    codes = stream(parts["weight"], bits, values.shape[1])
    sign, at = np.where(codes >> (bits - 1), -1.0, 1.0), codes & (2 ** (bits - 1) - 1)
    if (at >= len(grid)).any():
        return OUT
    size_of = grid[at]
    more = 1 + (2.0**-4 * 1.1 if scheme == "nvfp4" else 0)
    above = grid[(at + 1) % len(grid)]
    upper = np.where(at == len(grid) - 1, size_of * more, (size_of + above) / 2)
    lower = np.where(at == 0, -grid[1] / 2, (size_of + grid[at - 1]) / 2)
    scales = parts["scales"]
    if scheme == "nvfp4":
        scale = np.where(scales & 128, -1, 1) * np.append(_e4m3()[:127], np.nan)[scales & 127]
    else:
        scale = 2.0 ** (scales.astype(float) - 127)
    scale = np.repeat(scale, size, axis=1)
    ends = np.sort(np.stack([sign * scale * lower, sign * scale * upper]), axis=0)
    added = before + 2 * UNIT[dtype] * np.abs(values) + size_of * FLOOR[dtype]
    if scheme == "nvfp4":
        added += size_of * 2.0**-10 + 6 * 2.0**-10 * (scale == 0)
    middle, half = ends.mean(axis=0), (ends[1] - ends[0]) / 2
    return side(values, middle, half + added)


def _e4m3() -> Array:
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, 2.0 ** (exponent - 7.0) * (1 + mantissa / 8))


def _int(values: Array, parts: Parts, treatment: Mapping[str, Any], before: Array) -> str:
    bits, size = treatment["bits"], treatment["group_size"]
    rows, columns = values.shape
    size = columns if size == -1 else size
    words = np.ascontiguousarray(parts["qweight"]).view(np.int32)
    codes = stream(np.ascontiguousarray(words.T).view(np.uint8), bits, columns).astype(float)
    zeros = stream(parts["qzeros"], bits, rows).T.astype(float) + 1
    scale = np.repeat(floats(parts["scales"], "F16").T, size, axis=1)
    zero = np.repeat(zeros, size, axis=1)
    decoded = rounded((codes - zero) * scale, "F16")
    symmetric = treatment.get("symmetric") is not False
    end = 1 + 0.75 * 2 ** (bits - 1) if symmetric else 1.0
    reach = np.where((codes == 0) | (codes == 2**bits - 1), end, 0.5) + STEP_SLOP
    each = np.abs(scale) * (2 * UNIT["F16"] + 3 * UNIT["BF16"]) + FLOOR["F16"]
    lost = (np.abs(codes - zero) + 1) * each + FLOOR["F16"]
    return side(values, decoded, reach * np.abs(scale) + lost + before)


def hadamard(lines: Array) -> Array:
    """The orthonormal transform of each row, by the powers of two of its length."""
    parts, start, columns = [], 0, lines.shape[1]
    size = 2 ** (columns.bit_length() - 1)
    while start < columns:
        if size <= columns - start:
            matrix = np.ones((1, 1))
            while len(matrix) < size:
                matrix = np.block([[matrix, matrix], [matrix, -matrix]])
            parts.append(lines[:, start : start + size] @ matrix / np.sqrt(size))
            start += size
        size //= 2
    return np.concatenate(parts, axis=1)


def _mxtq(values: Array, parts: Parts, bits: int) -> str:
    from emitters.numerics.mxtq_tables import codebook, signs  # noqa: PLC0415 - tables only

    columns = values.shape[1]
    words = np.ascontiguousarray(parts["tq_packed"]).view(np.uint32)
    shifts = np.arange(32 // bits) * bits
    codes = ((words[:, :, None] >> shifts) & (2**bits - 1)).reshape(len(words), -1)
    codes = codes[:, :columns].astype(int)
    line = hadamard(values * signs(columns))
    norm = np.sqrt((line**2).sum(axis=1, keepdims=True))
    stored = floats(parts["tq_norms"], "F16").reshape(-1, 1)
    norms = side(norm, stored, rounded(norm, "F16") * 2 * UNIT["F16"] + 2 * FLOOR["F16"])
    centroids = codebook(columns, bits).astype(float)
    inner = (centroids[1:] + centroids[:-1]) / 2
    low, high = np.append(-1e9, inner)[codes], np.append(inner, 1e9)[codes]
    line, near = line / np.maximum(norm, 1e-10), 2.0**-16 / np.sqrt(columns)
    off = np.maximum(low - line, line - high)
    worst = OUT if (off > near * 1.2).any() else NEAR if (off > near * 0.8).any() else IN
    return max(norms, worst, key=(IN, NEAR, OUT).index)


def _blocks(values: Array, raw: Array, scheme: str, bits: int, size: int) -> str:
    from emitters.numerics.hfq import rotation_signs  # noqa: PLC0415 - tables only

    groups = values.reshape(-1, size)
    nbytes = raw.size // len(groups)
    blocks = np.ascontiguousarray(raw).reshape(-1, nbytes)
    spread, added = np.sqrt((groups**2).mean(axis=1, keepdims=True)), 0.0
    if scheme.startswith("mq"):
        before, after = rotation_signs()[:256], rotation_signs()[256:]
        groups = hadamard(groups * before) * after
        added = spread * 2.0**-16
    added = added + np.abs(groups) * FLOAT_SLOP
    if scheme == "q8":
        scale = floats(blocks[:, :2], "F16")
        codes = blocks[:, 2:].view(np.int8).astype(float)
        lost = (np.abs(codes) + 1) * (scale * 2 * UNIT["F16"] + 2 * FLOOR["F16"])
        reach = np.abs(scale) * (0.5 + STEP_SLOP)
        return side(groups, codes * scale, reach + np.abs(lost) + added)
    packed = size * bits // 8
    codes = stream(blocks[:, nbytes - packed :], bits, size)
    if scheme.endswith("lloyd"):
        levels = floats(blocks[:, : nbytes - packed], "F16")
        return _levels(groups, codes, levels, added)
    scale, low = floats(blocks[:, :4], "F32"), floats(blocks[:, 4:8], "F32")
    with np.errstate(over="ignore", invalid="ignore"):
        decoded = rounded(rounded(codes * scale, "F32") + low, "F32")
    constant = (scale == 1) & (codes.max(axis=1, keepdims=True) == 0)
    step = np.where(constant, 0, np.abs(scale))
    return side(groups, decoded, step * (0.5 + STEP_SLOP) + added)


def _levels(groups: Array, codes: Array, levels: Array, added: Array) -> str:
    own = np.take_along_axis(levels, codes, axis=1)
    if not np.isfinite(own).all():
        return OUT
    added = added + 2 * UNIT["F16"] * np.abs(own) + 2 * FLOOR["F16"]
    with np.errstate(invalid="ignore"):
        off = np.abs(groups[:, :, None] - levels[:, None, :])
        best = np.nanmin(off, axis=2)
        nearest = np.take_along_axis(levels, np.nanargmin(off, axis=2), axis=1)
        beyond = np.abs(groups - own) - best
        found = side(beyond, np.zeros_like(beyond), np.abs(own - nearest) / 2 + added)
    for at in range(levels.shape[1]):
        mine = codes == at
        counts = mine.sum(axis=1)
        mean = (groups * mine).sum(axis=1) / np.maximum(counts, 1)
        gap = np.nanmin(np.abs(np.delete(levels, at, axis=1) - levels[:, [at]]), axis=1)
        allowed = gap[:, None] / 2 + np.where(mine, added, 0)
        moved = np.where(mine, (mean - levels[:, at])[:, None], 0)
        found = max(found, side(moved, 0 * moved, allowed), key=(IN, NEAR, OUT).index)
    return found
