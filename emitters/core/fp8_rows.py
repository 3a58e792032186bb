"""Rows of FP8 codes made into values by those of their scales that are theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from emitters.numerics.rounding import to_float32
from emitters.numerics.small_floats import fp8_dequantize
from emitters.numerics.value_types import Array
from emitters.tensor_io.read import Source
from policy_dsl.diagnostics import fail
from policy_dsl.inventory import TensorInfo
from policy_dsl.roles.scales import fp8_block

Check = Callable[[Array, TensorInfo, int], None]


def dequantized_rows(  # noqa: PLR0913 - rows, their scales, and the type they become
    source: Source,
    config: Mapping[str, Any],
    tensors: tuple[TensorInfo, TensorInfo | None],
    codes: Array,
    *,
    first: int,
    rule: str,
    out_dtype: str,
    check: Check = lambda grid, scale, row: None,
) -> Array:
    """The values [rows, in] of FP8 codes from row `first` of a tensor, in a value type.

    tensors: the codes' and their scales'. check(grid, scale, row): looks at rows of scales as
    they are stored, from that row.
    Raises: PolicyError if the scales cannot be read, or the size of their blocks is not known.
    """
    tensor, scale = tensors
    block = scale and fp8_block(config, tensor, scale)
    if scale is None or block is None:
        raise fail("missing-scale", tensors="1 tensor", names=tensor.name)
    parts = []
    # A stack's matrices each have a grid of their own.
    for start, stop, matrix in _within_matrices(first, len(codes), tensor.shape[-2]):
        row = start - matrix * tensor.shape[-2]
        # Only these scales: there may be one for each value.
        band, end = row // block[0], -(-(row + stop - start) // block[0])
        at = matrix * scale.shape[-2] + band
        grid = source.rows(scale, at, end - band)
        check(grid, scale, at)
        parts.append(
            fp8_dequantize(
                codes[start - first : stop - first],
                to_float32(grid, scale.dtype),
                block=block,
                first_row=row - band * block[0],
                rule=rule,
                out_dtype=out_dtype,
            )
        )
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _within_matrices(first: int, count: int, height: int) -> Iterator[tuple[int, int, int]]:
    """Spans of rows that do not cross from one matrix of a stack into the next, and which."""
    start, end = first, first + count
    while start < end:
        matrix = start // height
        stop = min(end, (matrix + 1) * height)
        yield start, stop, matrix
        start = stop
