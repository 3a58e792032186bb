"""One unit of a build, run: rows read, made into values, encoded, written at their places."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emitters.core.value_errors import ValueDefectError, band_of
from emitters.core.verdicts import Sums
from emitters.core.work_units import Output, Unit
from emitters.numerics.rounding import first_nonfinite, to_float32
from emitters.numerics.value_types import VALUE_TYPES, Array
from emitters.tensor_io.read import Source
from emitters.tensor_io.shards import write_at
from emitters.tensor_io.view_rows import Cast, ViewReader, place_of
from policy_dsl.formats import Format, UnstorableError
from policy_dsl.plan import PlannedTensor
from policy_dsl.treatments import Coded, coded, describe

# A value that no dtype loses, and a relative error from which that of a matrix is far.
_LARGE, _NEAR = 1e-3, 0.5
_LOOKED_AT = 4096


class Receipt(NamedTuple):
    """What came of a unit.

    nbytes: written. is_lost: whether all its values became 0, and they were not. is_durable:
    whether its bytes are on the disk, also after a crash; if not, the build flushes its files.
    """

    nbytes: int
    is_lost: bool
    is_durable: bool = False


class Made(NamedTuple):
    """The parts of a unit's rows, and what became of its values.

    is_kept: a reader gets more of them than next to nothing. is_lost: it does not, and they
    are not zeros.
    """

    parts: dict[str, Array]
    is_kept: bool
    is_lost: bool


@dataclass(frozen=True)
class Work:
    """What all units of a build share, to be called with each. It can be pickled.

    reader: of the source. fp8_rule: of the plan. folder: of the files that are written.
    """

    format: Format
    reader: ViewReader
    fp8_rule: str
    folder: Path

    @property
    def source(self) -> Source:
        """The source."""
        return self.reader.source

    def __call__(self, unit: Unit) -> Receipt:
        """Build the rows of a unit.

        Raises: ValueDefectError if a value does not fit; PolicyError if the source cannot be
        read or holds a value that is not finite, or the output cannot be written.
        """
        made, output, written = self.made(unit), unit.output, 0
        for tensor in output.tensors:
            # What a row has beyond its source's values is its tail, or zeros.
            start, stride = tensor.rows_at(unit.at, output.n_rows)
            path, part = self.folder / tensor.file, made.parts[tensor.part]
            written += write_at(path, start, part, stride=stride)
        return Receipt(written, made.is_lost)

    def made(self, unit: Unit) -> Made:
        """The parts of the rows of a unit. Raises as a call does."""
        output = unit.output
        values = self._values(unit, output.dtype)
        scale = unit.context.scale if unit.context else None
        scaled = values if scale is None else values * scale
        if isinstance(output.treatment, Coded):
            parts = self._encoded(unit, scaled)
        else:
            parts = {output.tensors[0].part: values}
        if self._is_surely_kept(output, scaled):
            return Made(parts, True, False)
        exact = self._values(unit, "F32")
        sums = Sums.of(exact, self._decoded(unit, parts, exact.shape))
        return Made(parts, not sums.nothing_left, sums.nothing_left)

    def defects_of_lost(self, lost: Iterable[Unit]) -> Iterator[ValueDefectError]:
        """A defect for each matrix of the source of which nothing is left.

        lost: the units whose values became 0; other units may have others of the same matrix.
        """
        matrices: dict[tuple[int, int], Unit] = {}
        for unit in lost:
            matrices.setdefault((unit.module, unit.source), unit)
        for unit in matrices.values():
            if any(self.made(part).is_kept for part in _whole(unit)):
                continue
            values = self._values(unit, "F32")
            largest = int(np.abs(values).max(axis=-1).argmax())
            count = unit.view.n_rows * unit.view.width
            yield ValueDefectError(unit, "value-underflow", count, band_of(values, "F32", largest))

    def _values(self, unit: Unit, dtype: str) -> Array:
        """[n_rows, in] finite values of the unit's rows in a value type."""
        how = Cast(dtype, self.fp8_rule, cuts_off=self.format.spec.cuts_off)
        values = self.reader.rows(unit.view, unit.first, unit.n_rows, how)
        at = first_nonfinite(values, dtype)
        if at >= 0:
            exact = self.reader.rows(unit.view, unit.first, unit.n_rows, how._replace(dtype="F32"))
            what = f"{exact.reshape(-1)[at]:.4g} at {place_of(unit.view, unit.first, at)}"
            band = band_of(exact, "F32", at // exact.shape[-1])
            raise ValueDefectError(unit, "value-overflow", (what, dtype), band)
        return values

    def _encoded(self, unit: Unit, values: Array) -> dict[str, Array]:
        output = unit.output
        encode = unit.context.encode if unit.context else self.format.codec().encode
        try:
            parts = encode(values, output.dtype, coded(output.treatment))
        except UnstorableError as error:
            if error.reason:
                raise _of_group(unit, "unstorable-value", error.reason, values, error.row) from None
            treatment = describe(output.treatment)
            raise _of_group(unit, "value-overflow", treatment, values, error.row) from None
        for tensor in output.tensors:
            row = _first_overflow(tensor, parts[tensor.part], values)
            if row >= 0:
                what = f"{describe(output.treatment)}, whose {tensor.part} are {tensor.dtype}"
                raise _of_group(unit, "value-overflow", what, values, row)
        return parts

    def _is_surely_kept(self, output: Output, values: Array) -> bool:
        """Whether the first rows show that values are stored and not lost; nearly always so."""
        if not isinstance(output.treatment, Coded):
            some = to_float32(values.reshape(-1)[:_LOOKED_AT], output.dtype)
            return bool(np.abs(some).max(initial=0) >= _LARGE)
        # Where groups run on from row to row, whole ones.
        first = np.ascontiguousarray(values[: output.together])
        exact = to_float32(first, output.dtype)
        how, codec = (output.dtype, output.treatment), self.format.codec()
        # Without statistics: whatever weighs, the largest values stay.
        decoded = codec.decode(codec.encode(first, *how), *how, exact.shape[-1])
        relative = Sums.of(exact, decoded).relative
        return relative is not None and relative < _NEAR

    def _decoded(self, unit: Unit, parts: dict[str, Array], shape: tuple[int, ...]) -> Array:
        """float32: the values of a unit's parts, as readers compute with them."""
        output, scale = unit.output, unit.context.scale if unit.context else None
        if not isinstance(output.treatment, Coded):
            return to_float32(parts[output.tensors[0].part], output.dtype)
        held = {tensor.part: parts[tensor.part] for tensor in output.tensors}
        decode = self.format.codec().decode
        decoded = decode(held, output.dtype, output.treatment, shape[-1])
        values = decoded.reshape(-1, shape[-1])[: shape[0]]
        return values if scale is None else values / scale


def _whole(unit: Unit) -> Iterator[Unit]:
    """The rows of a unit's view, as many at a time as the unit has."""
    above, total = unit.at - unit.first, unit.view.n_rows
    for first in range(0, total, unit.n_rows):
        n_rows = min(unit.n_rows, total - first)
        yield unit._replace(first=first, n_rows=n_rows, at=above + first)


def _of_group(unit: Unit, code: str, what: str, values: Array, row: int) -> ValueDefectError:
    """The defect of a group of a row of the unit's values."""
    place = f"a group of row {place_of(unit.view, unit.first + row, 0)}"
    return ValueDefectError(unit, code, (place, what), band_of(values, unit.output.dtype, row))


def _first_overflow(tensor: PlannedTensor, part: Array, values: Array) -> int:
    """The first row whose scale is infinite although its values are not, or -1."""
    if tensor.dtype not in VALUE_TYPES:
        return -1
    at = first_nonfinite(part, tensor.dtype)
    if at < 0:
        return -1
    return at % len(values) if tensor.by_columns else at * len(values) // part.size
