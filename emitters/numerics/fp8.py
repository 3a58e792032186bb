"""Dequantization of FP8 E4M3 matrices that carry one scale for each block.

Three rules are in use; they differ in what is rounded to bfloat16 on the way:
"f32" nothing; "bf16" the product (mlx, transformers); "bf16_bf16" the scale and the product
(AutoRound).
Source: mlx 0.32.4 (`mx.from_fp8`, mlx-lm's MiniMax sanitize); transformers 5.23
`Fp8Dequantize`; AutoRound 0.16.1.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emitters.numerics.jit import device, factory, int64_pair, kernel, reads, writes
from emitters.numerics.minifloats import e4m3_value
from emitters.numerics.rounding import cast
from emitters.numerics.scalars import narrow, rounded
from emitters.numerics.value_types import BF16, Array, flat, new_values, raw_bits, value_type

FP8_RULES = ("f32", "bf16", "bf16_bf16")


@device
def _write_block(target: tuple[int, bool], scale: np.float32, codes: Array, result: Array) -> None:
    """result = the weights of codes [n] under one scale; target: (kind, by way of bfloat16)."""
    kind, by_bf16 = target
    for i in range(codes.shape[0]):
        value = e4m3_value(codes[i]) * scale
        result[i] = narrow(kind, rounded(BF16, value) if by_bf16 else value)


@factory
def _dequantizer(kind: int, raw: str, by_bf16: bool) -> Callable[..., None]:
    """The kernel that dequantizes rows of one row of blocks into one value type."""

    @kernel(reads("uint8"), reads("float32"), int64_pair, writes(raw))
    def dequantize_band(
        codes: Array, scales: Array, geometry: tuple[int, int], result: Array
    ) -> None:
        columns, width = geometry
        for start in range(0, codes.shape[0], columns):
            for first in range(0, columns, width):
                begin, end = start + first, start + min(first + width, columns)
                part, target = codes[begin:end], result[begin:end]
                _write_block((kind, by_bf16), scales[first // width], part, target)

    return dequantize_band


def fp8_dequantize(  # noqa: PLR0913 - one call is one slice of rows, one grid, one rule
    codes: Array,
    scale_inv: Array,
    *,
    block: tuple[int, int] = (128, 128),
    first_row: int = 0,
    rule: str,
    out_dtype: str,
) -> Array:
    """The weights [rows, in] of these codes, in value type `out_dtype`.

    codes: uint8 [rows, in], rows `first_row` and following of the matrix; scale_inv: float32
    grid of multipliers of the whole matrix, one for each block [out, in], blocks at the edges
    smaller; rule: one of `FP8_RULES`. A bfloat16 result is rounded once from the rule's
    result. NaN codes give NaN; overflow gives infinity.
    Raises: ValueError for another rule or dtype, or if the grid does not cover the rows.
    """
    if rule not in FP8_RULES:
        raise ValueError(f"rule {rule!r} is none of {', '.join(FP8_RULES)}")
    rows, columns = codes.shape
    height, width = block
    end_band = -(-(first_row + rows) // height)
    if scale_inv.shape[0] < end_band or scale_inv.shape[1] != -(-columns // width):
        grid = f"scales {scale_inv.shape} of blocks {block}"
        raise ValueError(f"{grid} do not cover rows up to {first_row + rows} of {columns}")
    scales = np.require(scale_inv, np.float32, ["C", "ALIGNED"])
    if rule == "bf16_bf16":
        scales = cast(cast(scales, "F32", "BF16"), "BF16", "F32")
    kind, _, raw = value_type(out_dtype)
    result = new_values((rows, columns), out_dtype)
    dequantize = _dequantizer(kind, raw.__name__, rule != "f32")
    if height == 1 and columns % width == 0:
        # Rows with scales of their own are one long row of blocks.
        part, target = flat(codes, np.uint8, "codes"), raw_bits(result, out_dtype)
        own = scales[first_row : first_row + rows].reshape(-1)
        dequantize(part, own, (max(1, rows * columns), width), target)
        return result
    # One call for each row of blocks: inside it, every row has the same scales.
    for band in range(first_row // height, end_band):
        band_rows = slice(max(band * height - first_row, 0), (band + 1) * height - first_row)
        part = flat(codes[band_rows], np.uint8, "codes")
        target = raw_bits(result[band_rows], out_dtype)
        dequantize(part, scales[band], (columns, width), target)
    return result
