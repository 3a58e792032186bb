"""Symmetric codes with scales that AutoRound searches for, its "optimized RTN".

Each group tries about 200 scales around that of rounding to nearest, and takes the first one
of least squared error, weighted by column if there is an importance matrix. All arithmetic is
that of the values' type, except for the sum of the squares.
Source: auto-round 0.16.1 (torch 2.13.0, CPU), `auto_round/data_type/int.py`, the function
registered as `opt_rtn_int_sym`; 0.12.2, the one registered as `rtn_int_sym`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from emitters.numerics.gptq_candidates import (
    N_CANDIDATES,
    ROUNDER,
    Target,
    best_scale,
    clamped,
    new_scratch,
    own,
)
from emitters.numerics.gptq_layout import GptqParts, new_band, new_parts, pack_row
from emitters.numerics.gptq_weights import (
    SearchWeights,
    check_grid,
    even_weights,
    weigh_by_magnitude,
)
from emitters.numerics.jit import device, factory, int64, kernel, reads, writes
from emitters.numerics.scalars import bits_of, narrow, widen
from emitters.numerics.value_types import BF16, F16, Array, raw_bits, value_type


@device
def _write_codes(target: Target, values: Array, scale: np.float32, codes: Array) -> None:
    """codes = the nearest code of each value; values: float32 [n], codes: uint8 [n]."""
    kind, half = target
    for i in range(values.shape[0]):
        step = (clamped(half, own(kind, values[i] / scale)) + ROUNDER) - ROUNDER
        if kind == BF16:
            # What is packed are the decoded weights: at 8 bits their rounding can move a code.
            again = own(kind, own(kind, step * scale) / scale)
            step = clamped(half, own(kind, again + half) - half)
        # The middle code is even: ties stay what they are.
        codes[i] = np.uint8(bits_of(step + (ROUNDER + half)))


@factory
def _encoder(kind: int, raw: str) -> Callable[..., None]:
    """The kernel that encodes rows of one value type."""
    inputs = reads(raw), reads("float32"), reads("float32"), reads("float32")

    @kernel(*inputs, int64, writes("int32"), writes("uint16"))
    def encode_search(  # noqa: PLR0913, PLR0917 - kernels take arrays one by one
        values: Array,
        multipliers: Array,
        weights: Array,
        divisors: Array,
        bits: int,
        words: Array,
        scales: Array,
    ) -> None:
        columns, n_groups = weights.shape[0], divisors.shape[0]
        rows, size = values.shape[0] // columns, columns // n_groups
        target, codes = (kind, np.float32(1 << (bits - 1))), np.empty(columns, np.uint8)
        group, scratch = np.empty((2, size), np.float32), new_scratch(size)
        band = new_band(columns // 32 * bits)
        for row in range(rows):
            for k in range(n_groups):
                part = values[row * columns + k * size :][:size]
                for i in range(size):
                    group[0, i], group[1, i] = widen(kind, part[i]), weights[k * size + i]
                if not np.isnan(divisors[k]):
                    weigh_by_magnitude(kind, bits, divisors[k], group[0], group[1])
                scale = best_scale(target, group, multipliers, scratch)
                _write_codes(target, group[0], scale, codes[k * size : (k + 1) * size])
                scales[k * rows + row] = narrow(F16, scale)
            pack_row(codes, bits, (row, rows), band, words)

    return encode_search


@cache
def _multipliers(bits: int, grid: str) -> Array:
    """What the reciprocal of a group's peak is multiplied with: float32 [1 + N_CANDIDATES].

    The first is that of rounding to nearest. At the end one is repeated, and never wins.
    """
    half = 2 ** (bits - 1)
    reach, step = 90, 0.01
    if grid == "0.16.1" and bits > 2:
        span = half * 0.75
        step = span / 200 * 2
        reach = int(span / step)
    others = [step * k - half for k in range(-reach, reach + 1) if k != 0]
    others += others[-1:] * (N_CANDIDATES - len(others))
    return np.array([-half, *others], np.float32)


def gptq_search(  # noqa: PLR0913 - one call is one block of rows under one set of rules
    values: Array,
    dtype: str,
    *,
    bits: int,
    group_size: int,
    weights: SearchWeights | None = None,
    grid: str = "0.16.1",
) -> GptqParts:
    """Codes, zero points and scales of every group along the last axis, all symmetric.

    values, bits, group_size: as for `gptq_rtn`; weights: of the columns, from `search_weights`
    with the same options; grid: the version of AutoRound whose scales are tried, "0.16.1" or
    "0.12.2". Scales from 65520 on are infinite.
    Raises: ValueError for other widths, value types or versions, if a group would be split,
    or if the weights are those of another shape.
    Source: auto-round 0.16.1 and 0.12.2, `search_scales` and its callers.
    """
    check_grid(grid)
    kind, _, raw = value_type(dtype)
    columns = values.shape[1]
    parts = new_parts((values.shape[0], columns), bits, group_size)
    n_groups = len(parts.scales)
    chosen = weights or even_weights(columns, columns // n_groups)
    if (len(chosen.columns), len(chosen.divisors)) != (columns, n_groups):
        raise ValueError(f"weights of {len(chosen.columns)} columns for {columns} columns")
    parts.zeros[:] = 1 << (bits - 1)
    inputs = raw_bits(values, dtype), _multipliers(bits, grid), *chosen
    outputs = parts.qweight.reshape(-1), raw_bits(parts.scales, "F16")
    _encoder(kind, raw.__name__)(*inputs, bits, *outputs)
    return parts
