"""Rounding to nearest as AutoRound does it: value = scale * (code - zero point).

Symmetric: the zero point is the middle code, and the sign of the scale is such that the
extreme of larger magnitude gets code 0. Asymmetric: both follow from the extremes and zero.
Arithmetic is that of float32 or of the values' type up to the scale, which is float16 from then
on: with it bfloat16 values are promoted to float32.
Source: auto-round 0.16.1 (torch 2.13.0, CPU), `auto_round/data_type/int.py`, functions
registered as `rtn_int_sym` and `int_asym`; 0.12.2 calls the former `int_sym`. Its model-free
flow makes the values float32 first, the others keep their type.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emitters.numerics.gptq_layout import GptqParts, new_band, new_parts, pack_row
from emitters.numerics.jit import device, factory, int64_pair, kernel, reads, writes
from emitters.numerics.scalars import bits_of, float_at, narrow, order_of, rounded, widen
from emitters.numerics.value_types import BF16, F16, Array, raw_bits, value_type

_Rule = tuple[int, int, bool]  # type of the arithmetic, bits, symmetric
_Line = tuple[np.float32, np.float32]  # scale, zero point

_ZERO = np.float32(0)
_SMALLEST_SCALE = np.float32(np.float16(1e-5))  # a subnormal
_ROUNDER = np.float32(1.5 * 2.0**23)  # adding it leaves an integer in the low bits
_WHOLE = np.float32(2.0**23)  # the same for what is an integer already


@device
def _range(values: Array) -> tuple[np.float32, np.float32]:
    """The extremes of zero and float32 [n], compared as integers, which LLVM may reorder."""
    low, high = np.int32(0), np.int32(0)
    for i in range(values.shape[0]):
        order = order_of(values[i])
        low, high = min(low, order), max(high, order)
    return float_at(low), float_at(high)


@device
def _quotient(kind: int, value: np.float32, scale: np.float32) -> np.float32:
    """value / scale; only float16 values keep their type beside a float16 scale."""
    quotient = value / scale
    return rounded(F16, quotient) if kind == F16 else quotient


@device
def _choose_line(rule: _Rule, values: Array) -> _Line:
    """Scale and zero point of a group; values: float32 [n]."""
    kind, bits, symmetric = rule
    half, top = np.float32(1 << (bits - 1)), np.float32((1 << bits) - 1)
    low, high = _range(values)
    # Equal extremes give a negative scale, a group of zeros a positive one.
    span = (-low if high < -low else -high) if symmetric else rounded(kind, high - low)
    scale = rounded(F16, rounded(kind, span / (half if symmetric else top)))
    floor = -_SMALLEST_SCALE if scale < _ZERO else _SMALLEST_SCALE
    scale = floor if abs(scale) < _SMALLEST_SCALE else scale
    return scale, half if symmetric else np.rint(_quotient(kind, -low, scale))


@device
def _clamped(code: np.float32, top: np.float32) -> np.float32:
    code = code if code > _ZERO else _ZERO
    return code if code < top else top


@device
def _write_codes(rule: _Rule, values: Array, line: _Line, codes: Array) -> None:
    """codes = the nearest code of each value; values: float32 [n], codes: uint8 [n]."""
    kind, bits, symmetric = rule
    scale, zero = line
    top = np.float32((1 << bits) - 1)
    for i in range(values.shape[0]):
        # Rounded before the zero point is added: ties go to even steps, not to even codes.
        step = (_quotient(kind, values[i], scale) + _ROUNDER) - _ROUNDER
        code = _clamped(step + zero, top)
        if kind == BF16 and not symmetric:
            # What is packed are the decoded weights, and bfloat16 may lose half a step.
            decoded = rounded(BF16, (code - zero) * scale)
            code = _clamped((decoded / scale + zero + _ROUNDER) - _ROUNDER, top)
        codes[i] = np.uint8(bits_of(code + _WHOLE))


@factory
def _encoder(dtype: str, kind: int, symmetric: bool) -> Callable[..., None]:
    """The kernel that encodes rows of one value type; kind: of the arithmetic."""
    source, _, raw = value_type(dtype)
    outputs = writes("int32"), writes("int16"), writes("uint16")

    @kernel(reads(raw.__name__), int64_pair, *outputs)
    def encode_rtn(
        values: Array, layout: tuple[int, int], words: Array, zeros: Array, scales: Array
    ) -> None:
        columns, bits = layout
        rows, rule = values.shape[0] // columns, (kind, bits, symmetric)
        n_groups = scales.shape[0] // max(rows, 1)
        size = columns // max(n_groups, 1)
        group, codes = np.empty(size, np.float32), np.empty(columns, np.uint8)
        band = new_band(columns // 32 * bits)
        for row in range(rows):
            for k in range(n_groups):
                part = values[row * columns + k * size :][:size]
                for i in range(size):
                    group[i] = widen(source, part[i])
                line, at = _choose_line(rule, group), k * rows + row
                _write_codes(rule, group, line, codes[k * size : (k + 1) * size])
                scales[at], zeros[at] = narrow(F16, line[0]), np.int16(line[1])
            pack_row(codes, bits, (row, rows), band, words)

    return encode_rtn


def gptq_rtn(  # noqa: PLR0913 - one call is one block of rows under one set of rules
    values: Array,
    dtype: str,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    arithmetic: str = "F32",
) -> GptqParts:
    """Codes, zero points and scales of every group along the last axis.

    values: [rows, in] of value type `dtype` (BF16 as uint16), finite; bits: 2, 3, 4 or 8;
    group_size: a multiple of 32 that divides `in`, or -1 for one group a row; arithmetic: "F32"
    or `dtype`. Scales from 65520 on are infinite. Asymmetric zero points go from 0 to 2**bits,
    which is more than can be stored: see `first_unstorable_zero`.
    Raises: ValueError for other widths, value types or arithmetics, or for groups that do not
    divide rows.
    Source: auto-round 0.16.1 and 0.12.2, plain rounding to nearest.
    """
    if arithmetic not in ("F32", dtype):
        raise ValueError(f"arithmetic {arithmetic!r} is neither F32 nor {dtype}")
    raw, kind = raw_bits(values, dtype), value_type(arithmetic).kind
    parts = new_parts((values.shape[0], values.shape[1]), bits, group_size)
    outputs = parts.qweight.reshape(-1), parts.zeros.reshape(-1), raw_bits(parts.scales, "F16")
    _encoder(dtype, kind, symmetric)(raw, (values.shape[1], bits), *outputs)
    return parts
