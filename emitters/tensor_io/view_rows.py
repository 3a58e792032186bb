"""Rows of views read from a source as values: FP8 codes times their scales, all else cast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from emitters.numerics.rounding import cast, first_nonfinite, to_float32
from emitters.numerics.small_floats import fp8_dequantize
from emitters.numerics.value_types import VALUE_TYPES, Array
from emitters.tensor_io.read import Source
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
    """Reads rows of views of one source. Plain data, and threads may share it.

    config: the model's, which has the size of FP8 blocks. must_be_finite: whether a value or a
    scale that is not finite is refused.
    """

    def __init__(
        self, source: Source, config: Mapping[str, Any], *, must_be_finite: bool = False
    ) -> None:
        self.source = source
        self._config = config
        self._must_be_finite = must_be_finite
        self._blocks: dict[tuple[object, ...], tuple[int, int]] = {}

    def rows(self, view: View, first: int, count: int, how: Cast) -> Array:
        """[count, in] values of rows of a view, from its row `first`.

        What overflows becomes infinite.
        Raises: PolicyError if a file cannot be read, FP8 blocks have no size, or a value is not
        finite where it must be.
        """
        parts, at = [], first
        for rectangle in view.rectangles(first, count):
            part = self._values(view, rectangle, how, at).reshape(-1, view.width)
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _values(self, view: View, part: Rectangle, how: Cast, at: int) -> Array:
        """The values of a rectangle, in the view's order; `at`: the first row that has them."""
        tensor, rows, columns = view.tensor, _extent(part.rows), _extent(part.columns)
        if view.scale is not None:
            return self._dequantized(view, part, how, at)
        stored = _in_order(self.source.rectangle(tensor, rows, columns), part, rows, columns)
        self._check(stored, tensor, tensor.dtype, lambda flat: place_of(view, at, flat))
        step = how.by_way_of or tensor.dtype
        # Most often there is no cast and no copy.
        return cast(cast(stored, tensor.dtype, step), step, how.dtype, cuts_off=how.cuts_off)

    def _dequantized(self, view: View, part: Rectangle, how: Cast, at: int) -> Array:
        height, width = block = self._block(view)
        rows, columns = _extent(part.rows), _extent(part.columns)
        # Codes and scales meet in source coordinates, and columns begin where a block does.
        columns = range(columns.start // width * width, columns.stop)
        codes = self.source.rectangle(view.tensor, rows, columns)
        # A NaN code times a scale would be found too, but look like a NaN scale.
        own = _in_order(codes, part, rows, columns)
        self._check(own, view.tensor, _FP8, lambda flat: place_of(view, at, flat))
        values = [
            fp8_dequantize(
                codes[some.start - rows.start : some.stop - rows.start],
                self._scales(view, matrix, some, columns, block),
                block=block,
                first_row=some.start % view.tensor.shape[-2] % height,
                rule=how.rule,
                out_dtype=how.dtype,
            )
            for matrix, some in _by_matrix(rows, view.tensor.shape[-2])
        ]
        whole = values[0] if len(values) == 1 else np.concatenate(values)
        return _in_order(whole, part, rows, columns)

    def _scales(
        self, view: View, matrix: int, rows: range, columns: range, block: tuple[int, int]
    ) -> Array:
        """float32: the scales of rows of one matrix of a stack, each with a grid of its own."""
        scale, first = _scale_of(view), rows.start - matrix * view.tensor.shape[-2]
        grid = matrix * scale.shape[-2]
        # Only these: there may be one for each value.
        bands = range(grid + first // block[0], grid - (-(first + len(rows)) // block[0]))
        across = range(columns.start // block[1], -(-columns.stop // block[1]))
        stored = self.source.rectangle(scale, bands, across)

        def place(flat: int) -> str:
            row, column = divmod(flat, len(across))
            return str(list(index_of(scale.shape, bands.start + row, across.start + column)))

        self._check(stored, scale, scale.dtype, place)
        return to_float32(stored, scale.dtype)

    def _block(self, view: View) -> tuple[int, int]:
        tensor, scale = view.tensor, _scale_of(view)
        shapes = tensor.shape, scale.shape
        if shapes not in self._blocks:
            block = Blocks(self._config).of(tensor, scale)
            if block is None:
                raise fail("missing-scale", tensors="1 tensor", names=tensor.name)
            self._blocks[shapes] = block
        return self._blocks[shapes]

    def _check(
        self, stored: Array, tensor: TensorInfo, dtype: str, place: Callable[[int], str]
    ) -> None:
        """Raises: PolicyError if a value must be finite and is not; place(its number) in words."""
        at = first_nonfinite(stored, dtype) if self._must_be_finite else -1
        if at < 0:
            return
        # E4M3 has no infinities.
        value = "nan"
        if dtype in VALUE_TYPES:
            value = str(to_float32(stored.reshape(-1)[at : at + 1], dtype)[0])
        where = place(at)
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


def _scale_of(view: View) -> TensorInfo:
    if view.scale is None:
        raise ValueError(f"{view.tensor.name} has no scales")
    return view.scale


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


def _by_matrix(rows: range, height: int) -> Iterator[tuple[int, range]]:
    """Runs of rows that do not cross from one matrix of a stack into the next, and which."""
    start = rows.start
    while start < rows.stop:
        matrix = start // height
        stop = min(rows.stop, (matrix + 1) * height)
        yield matrix, range(start, stop)
        start = stop
