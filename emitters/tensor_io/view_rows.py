"""Rows of views read from a source as values: FP8 codes times their scales, all else cast."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np

from emitters.numerics import VALUE_TYPES, Array, rounding
from emitters.numerics.rounding import first_nonfinite, to_float32
from emitters.numerics.small_floats import fp8_dequantize
from emitters.tensor_io.files import Source
from policy_dsl.diagnostics import PermanentError, diagnostic, fail
from policy_dsl.inventory import TensorInfo
from policy_dsl.roles.quantization import Blocks
from policy_dsl.views import Rectangle, View, index_of

# Rows up to this many values are worked on whole, whatever becomes of them.
LONGEST_ROW = 64 * 2**10
# Of the codes of FP8, whatever dtype they are stored as.
_FP8 = "F8_E4M3"


class Cast(NamedTuple):
    """How values become another type. rule: of FP8. by_way_of: a type between, if there is one.

    cuts_off: whether values that become F16 are rounded toward zero.
    """

    dtype: str
    rule: str = "f32"
    by_way_of: str = ""
    cuts_off: bool = False


class ViewReader:
    """Reads rows of a source's views; threads may share it. config: has the size of FP8 blocks.

    must_be_finite: whether a value or a scale that is not finite is refused.
    """

    def __init__(
        self, source: Source, config: Mapping[str, Any], *, must_be_finite: bool = False
    ) -> None:
        self.source, self._blocks, self._must_be_finite = source, Blocks(config), must_be_finite

    def rows(self, view: View, first: int, count: int, how: Cast) -> Array:
        """[count, in] values of rows of a view, from its row `first`; overflow is infinite.

        Raises: PolicyError if a file cannot be read, FP8 blocks have no size, or a value is not
        finite where it must be.
        """
        values = self._stored if view.scale is None else self._dequantized
        parts, at = [], 0
        for rectangle in view.rectangles(first, count):
            part = values(view, rectangle, how, (first, at)).reshape(-1)
            parts.append(part)
            at += len(part)
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(-1, view.width)

    def _stored(self, view: View, part: Rectangle, how: Cast, at: tuple[int, int]) -> Array:
        """The values of a rectangle, in the view's order; `at`: a row, and how many after it."""
        tensor, rows, columns = view.tensor, _extent(part.rows), _extent(part.columns)
        stored = _in_order(self.source.rectangle(tensor, rows, columns), part, rows, columns)
        self._check(stored, tensor, tensor.dtype, lambda flat: place_of(view, at[0], at[1] + flat))
        if view.added:
            sums = to_float32(stored, tensor.dtype) + np.float32(view.added)
            stored = rounding.cast(sums, "F32", tensor.dtype)
        step = how.by_way_of or tensor.dtype
        # Most often there is no cast and no copy.
        values = rounding.cast(stored, tensor.dtype, step)
        return rounding.cast(values, step, how.dtype, cuts_off=how.cuts_off)

    def _dequantized(self, view: View, part: Rectangle, how: Cast, at: tuple[int, int]) -> Array:
        """The same of codes with scales."""
        tensor, n_rows, block = view.tensor, view.tensor.shape[-2], self._block(view)
        rows, columns = _extent(part.rows), _extent(part.columns)
        # Codes and scales meet in source coordinates, and columns begin where a block does.
        columns = range(columns.start // block[1] * block[1], columns.stop)
        codes = self.source.rectangle(tensor, rows, columns)
        # A NaN code times a scale would be found too, but look like a NaN scale.
        own = _in_order(codes, part, rows, columns)
        self._check(own, tensor, _FP8, lambda flat: place_of(view, at[0], at[1] + flat))
        dequantize = partial(fp8_dequantize, block=block, rule=how.rule, out_dtype=how.dtype)
        values = []
        # Each matrix of a stack has a grid of its own.
        for matrix in range(rows.start // n_rows, -(-rows.stop // n_rows)):
            top = matrix * n_rows
            some = range(max(rows.start, top) - top, min(rows.stop, top + n_rows) - top)
            part_codes = codes[some.start + top - rows.start : some.stop + top - rows.start]
            scales = self._scales(view, matrix, some, columns)
            values.append(dequantize(part_codes, scales, first_row=some.start % block[0]))
        whole = values[0] if len(values) == 1 else np.concatenate(values)
        return _in_order(whole, part, rows, columns)

    def _scales(self, view: View, matrix: int, rows: range, columns: range) -> Array:
        """float32: the scales of these rows of one matrix of a stack."""
        scale, (height, width) = cast("TensorInfo", view.scale), self._block(view)
        grid = matrix * scale.shape[-2]
        # Only these: there may be one for each value.
        bands = range(grid + rows.start // height, grid - (-rows.stop // height))
        across = range(columns.start // width, -(-columns.stop // width))
        stored = self.source.rectangle(scale, bands, across)

        def place(flat: int) -> str:
            row, column = divmod(flat, len(across))
            return str(list(index_of(scale.shape, bands.start + row, across.start + column)))

        self._check(stored, scale, scale.dtype, place)
        return to_float32(stored, scale.dtype)

    def _block(self, view: View) -> tuple[int, int]:
        block = self._blocks.of(view.tensor.shape, cast("TensorInfo", view.scale).shape)
        if block is None:
            raise fail("missing-scale", tensors="1 tensor", names=view.tensor.name)
        return block

    def _check(
        self, stored: Array, tensor: TensorInfo, dtype: str, place: Callable[[int], str]
    ) -> None:
        """Raises: PolicyError if a value must be finite and is not; place(its number) in words."""
        at = first_nonfinite(stored, dtype) if self._must_be_finite else -1
        if at >= 0:
            held, where = stored.reshape(-1)[at : at + 1], place(at)
            # E4M3 has no infinities.
            value = str(to_float32(held, dtype)[0]) if dtype in VALUE_TYPES else "nan"
            found = diagnostic("non-finite-source", tensor=tensor.name, value=value, place=where)
            raise PermanentError([found])


def view_nbytes(view: View, n_rows: int) -> int:
    """Bytes of the source's values in so many rows of a view."""
    tensor = view.tensor
    return tensor.nbytes * n_rows * view.width // max(1, prod(tensor.shape))


def place_of(view: View, first: int, at: int) -> str:
    """Where in the source the value is that is `at` values after row `first`: `[3, 17]`."""
    row, column = divmod(at, view.width)
    place = view.place(first + row, column)
    return str(list(place)) if place else "its only value"


def _extent(numbers: Sequence[int]) -> range:
    """The shortest run of neighbours that holds all of these."""
    if isinstance(numbers, range) and numbers.step == 1:
        return numbers
    return range(min(numbers), max(numbers) + 1) if numbers else range(0)


def _in_order(stored: Array, part: Rectangle, rows: range, columns: range) -> Array:
    """The values of a rectangle, in the view's order, among those of these rows and columns."""
    for axis, (wanted, held) in enumerate(((part.rows, rows), (part.columns, columns))):
        if wanted != held:
            stored = stored.take([number - held.start for number in wanted], axis)
    return np.ascontiguousarray(stored.T) if part.transposed else stored
