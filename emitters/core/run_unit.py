"""One unit of a build, run: rows read, made into values, encoded, written at their places."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from emitters.core.work_units import Unit
from emitters.numerics import VALUE_TYPES, Array
from emitters.numerics.reach import distance
from emitters.numerics.rounding import cast, first_nonfinite, to_float32
from emitters.tensor_io.files import write_at
from emitters.tensor_io.view_rows import Cast, ViewReader, place_of
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Format, UnstorableError
from policy_dsl.plan import Plan
from policy_dsl.quantities import counted
from policy_dsl.treatments import PLAIN_WORDS, Coded, Plain, describe

# A value that no dtype loses, and a relative error from which that of a matrix is far.
_LARGE, _NEAR = 1e-3, 0.5
_LOOKED_AT = 4096
# Rows that formats code together at most, with groups that do not run on from row to row.
_BAND = 32
# A dtype that loses more of the largest value does not hold it.
_LARGEST_LOSS = 0.25


class ValueDefectError(Exception):
    """Finite values of a unit that its output cannot store. It can be pickled.

    facts: of the finding, but for the tensor. values: float32 [rows, in], some of those concerned.
    """

    def __init__(self, unit: Unit, code: str, facts: dict[str, str], values: Array) -> None:
        super().__init__(unit, code, facts, values)
        self.unit, self.code, self.facts, self.values = unit, code, facts, values


class Receipt(NamedTuple):
    """What came of a unit. is_lost: whether all its values became 0, and were not.

    is_durable: whether its bytes are on the disk, also after a crash; else the build flushes them.
    """

    is_lost: bool
    is_durable: bool = False


@dataclass(frozen=True)
class Work:
    """What all units of a build share, to be called with each. It can be pickled."""

    format: Format
    reader: ViewReader
    fp8_rule: str
    folder: Path

    def __call__(self, unit: Unit) -> Receipt:
        """Build the rows of a unit.

        Raises: ValueDefectError if a value does not fit; PolicyError if the source cannot be
        read or holds a value that is not finite, or the output cannot be written.
        """
        (parts, is_lost), output = self._made(unit), unit.output
        for tensor in output.tensors:
            # What a row has beyond its source's values is its tail, or zeros.
            start, stride = tensor.rows_at(unit.at, output.n_rows)
            write_at(self.folder / tensor.file, start, parts[tensor.part], stride=stride)
        return Receipt(is_lost)

    def defects_of_lost(self, lost: Iterable[Unit]) -> Iterator[ValueDefectError]:
        """A defect for each matrix of the source of which nothing is left.

        lost: the units whose values became 0; other units may have others of the same matrix.
        """
        matrices: dict[tuple[int, int], Unit] = {}
        for unit in lost:
            matrices.setdefault((unit.module, unit.source), unit)
        for unit in matrices.values():
            # Its rows, as many at a time as the unit has.
            above, total = unit.at - unit.first, unit.view.n_rows
            parts = (
                unit._replace(first=first, n_rows=min(unit.n_rows, total - first), at=above + first)
                for first in range(0, total, unit.n_rows)
            )
            if not all(is_lost for _, is_lost in map(self._made, parts)):
                continue
            values, stored = self._values(unit, "F32"), unit.output.treatment
            treatment = describe(stored) if isinstance(stored, Coded) else unit.output.dtype
            count = counted(total * unit.view.width, "value")
            facts = {"values": count, "treatment": treatment}
            band = _band(values, "F32", int(np.abs(values).max(axis=-1).argmax()))
            yield ValueDefectError(unit, "value-underflow", facts, band)

    def _made(self, unit: Unit) -> tuple[dict[str, Array], bool]:
        """The parts of the rows of a unit, and whether nothing is left of values that are not 0."""
        output, scale = unit.output, unit.context.scale if unit.context else None
        values = self._values(unit, output.dtype)
        if not isinstance(output.treatment, Coded):
            parts = {output.tensors[0].part: values}
            some = to_float32(values.reshape(-1)[:_LOOKED_AT], output.dtype)
            if np.abs(some).max(initial=0) >= _LARGE:
                return parts, False
            decoded = to_float32(values, output.dtype)
        else:
            how, codec = (output.dtype, output.treatment), self.format.codec()
            values, width = values if scale is None else values * scale, values.shape[-1]
            parts = self._encoded(unit, output.treatment, values)
            # Where groups run on from row to row, whole ones.
            first = np.ascontiguousarray(values[: output.together])
            # Without statistics: whatever weighs, the largest values stay.
            kept = codec.decode(codec.encode(first, *how), *how, width)
            relative = distance(to_float32(first, output.dtype), kept).relative
            # Nearly always so: the first rows show that values are stored and not lost.
            if relative is not None and relative < _NEAR:
                return parts, False
            held = {tensor.part: parts[tensor.part] for tensor in output.tensors}
            decoded = codec.decode(held, *how, width).reshape(-1, width)[: len(values)]
            decoded = decoded if scale is None else decoded / scale
        return parts, distance(self._values(unit, "F32"), decoded).nothing_left

    def _values(self, unit: Unit, dtype: str) -> Array:
        """[n_rows, in] finite values of the unit's rows in a value type."""
        rows = unit.view, unit.first, unit.n_rows
        how = Cast(dtype, self.fp8_rule, cuts_off=self.format.spec.cuts_off)
        values = self.reader.rows(*rows, how)
        at = first_nonfinite(values, dtype)
        if at >= 0:
            exact = self.reader.rows(*rows, how._replace(dtype="F32"))
            what = f"{exact.reshape(-1)[at]:.4g} at {place_of(unit.view, unit.first, at)}"
            band = _band(exact, "F32", at // exact.shape[-1])
            raise ValueDefectError(unit, "value-overflow", {"what": what, "dtype": dtype}, band)
        return values

    def _encoded(self, unit: Unit, treatment: Coded, values: Array) -> dict[str, Array]:
        encode = unit.context.encode if unit.context else self.format.codec().encode
        dtype, how = unit.output.dtype, describe(treatment)

        def defect(row: int, what: str, reason: str = "") -> ValueDefectError:
            place = f"a group of row {place_of(unit.view, unit.first + row, 0)}"
            code, facts = "value-overflow", {"what": place, "dtype": what}
            if reason:
                code = "unstorable-value"
                facts = {"place": place, "treatment": how, "reason": reason}
            return ValueDefectError(unit, code, facts, _band(values, dtype, row))

        try:
            parts = encode(values, dtype, treatment)
        except UnstorableError as error:
            raise defect(error.row, how, error.reason) from None
        for tensor in unit.output.tensors:
            part = parts[tensor.part]
            at = first_nonfinite(part, tensor.dtype) if tensor.dtype in VALUE_TYPES else -1
            if at >= 0:
                # A scale is infinite although its values are not.
                row = at % len(values) if tensor.by_columns else at * len(values) // part.size
                raise defect(row, f"{how}, whose {tensor.part} are {tensor.dtype}")
        return parts


def finding_of(defect: ValueDefectError, plan: Plan, format: Format) -> Diagnostic:
    """The error: what does not fit, where the policy chose it, and what would hold it."""
    decided = plan.modules[defect.unit.module].decided_by
    rule = None if decided is None else plan.policy.rules[decided]
    otherwise = dict(plan.policy.key_spans).get("defaults.otherwise")
    span = rule.treatment_span or rule.span if rule else otherwise
    cure = None if defect.code == "unstorable-value" else _cure(defect, plan, format)
    tensor = defect.unit.view.tensor.name
    return diagnostic(defect.code, span, suggestion=cure, tensor=tensor, **defect.facts)


def _cure(defect: ValueDefectError, plan: Plan, format: Format) -> str:
    """The plain dtypes that readers of the target take and that hold the values."""
    spec, view = format.spec, defect.unit.view
    # A source tensor may hold several of the model's. Rows may be counted as the values in them.
    alike = (one for one in plan.model.tensors if one.source.name == view.tensor.name)
    tensor = next(
        one for one in alike if any(view in (made, made.as_values()) for made in one.views)
    )
    held = [
        PLAIN_WORDS[dtype]
        for dtype in spec.plain_dtypes
        if format.review.held(tensor, plan.model, Plain(dtype)) is None
        and _fits(defect.values, dtype, cuts_off=spec.cuts_off)
    ]
    them = "them" if defect.code == "value-underflow" else "it"
    if held:
        return f"{' or '.join(held)} would hold {them}; give the tensor a rule of its own"
    return f"no plain dtype of {plan.target} holds {them}; try another scheme"


def _fits(values: Array, dtype: str, *, cuts_off: bool) -> bool:
    narrow = cast(values, "F32", dtype, cuts_off=cuts_off)
    if first_nonfinite(narrow, dtype) >= 0:
        return False
    lost = np.abs(to_float32(narrow, dtype) - values).max() / np.abs(values).max()
    return bool(lost <= _LARGEST_LOSS)


def _band(values: Array, dtype: str, row: int) -> Array:
    """float32 [rows, in]: the band that `row` of the values, of value type `dtype`, is in."""
    first = row // _BAND * _BAND
    return to_float32(np.ascontiguousarray(values[first : first + _BAND]), dtype)
