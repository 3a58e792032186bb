"""The exact values of a source: rows of a tensor in float32, FP8 codes times their scales."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from emitters.core.decoding import opened
from emitters.numerics.fp8 import fp8_dequantize
from emitters.numerics.rounding import to_float32
from emitters.numerics.value_types import Array
from emitters.tensor_io.read import picked_rows
from policy_dsl.diagnostics import fail
from policy_dsl.inventory import Inventory
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.scales import block_size


class SourceValues:
    """A source opened for reading, as the model that is made of it. Threads may share it.

    Raises: PolicyError if the source has no readable weights.
    """

    def __init__(self, source: Inventory, model: Model) -> None:
        if source.root is None:
            raise fail("not-comparable", reason=f"{source.id} is known by its headers alone")
        self.model = model
        self._source = opened(source, source.root)

    def rows(self, tensor: ModelTensor, first: int, count: int) -> Array:
        """float32 [count, in]: rows of a plain tensor of the model, from its row `first`.

        Raises: PolicyError if a file cannot be read any more, or FP8 blocks have no size.
        """

        def read(first: int, count: int) -> Array:
            return self._stretch(tensor, first, count)

        # Of the tensor as it is stored, which may hold other tensors of the model before.
        span = first + tensor.first_row, count
        return picked_rows(read, tensor.source, tensor.picked, span)

    def _stretch(self, tensor: ModelTensor, first: int, count: int) -> Array:
        """The values of rows that follow each other in the source."""
        stored = self._source.rows(tensor.source, first, count)
        if tensor.scale is None:
            return to_float32(stored, tensor.source.dtype)
        block = block_size(self.model.config)
        if block is None:
            raise fail("missing-scale", tensors="1 tensor", names=tensor.source.name)
        # A stack's matrices each have a grid of their own.
        height, grid_height = tensor.source.shape[-2], tensor.scale.shape[-2]
        parts = []
        for start, stop in _within_matrices(first, count, height):
            matrix, row = divmod(start, height)
            grid = self._source.rows(tensor.scale, matrix * grid_height, grid_height)
            codes = stored[start - first : stop - first]
            scales = to_float32(grid, tensor.scale.dtype)
            parts.append(
                fp8_dequantize(
                    codes, scales, block=block, first_row=row, rule="f32", out_dtype="F32"
                )
            )
        return np.concatenate(parts)


def _within_matrices(first: int, count: int, height: int) -> Iterator[tuple[int, int]]:
    """Spans of rows that do not cross from one matrix of a stack into the next."""
    start, end = first, first + count
    while start < end:
        stop = min(end, (start // height + 1) * height)
        yield start, stop
        start = stop
