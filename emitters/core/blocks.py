"""One unit of a build, run: rows read, made into values, encoded, written at their places."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from emitters.core.misfit import Misfit, band_of
from emitters.core.stretches import in_stretches
from emitters.core.tally import Sums
from emitters.core.units import Unit
from emitters.numerics.rounding import first_nonfinite, to_float32
from emitters.numerics.value_types import VALUE_TYPES, Array
from emitters.tensor_io.prepared import Prepared
from emitters.tensor_io.read import Source
from emitters.tensor_io.shards import write_at
from emitters.tensor_io.view_rows import Cast, ViewReader, place_of
from policy_dsl.diagnostics import PolicyError
from policy_dsl.formats import Format, UnstorableError
from policy_dsl.plan import Module, Plan, PlannedTensor
from policy_dsl.treatments import Coded, coded, describe
from policy_dsl.views import View

# A value that no dtype loses, and a relative error from which that of a matrix is far.
_LARGE, _NEAR = 1e-3, 0.5
_LOOKED_AT = 4096


@dataclass(frozen=True)
class Site:
    """What every unit of a build needs: the plan, its format, the source, the output folder.

    prepared: what statistics decide.
    """

    plan: Plan
    format: Format
    reader: ViewReader
    folder: Path
    prepared: Prepared

    @property
    def source(self) -> Source:
        """The source."""
        return self.reader.source


class Outcome(NamedTuple):
    """What came of a unit: bytes written; whether all values were lost."""

    nbytes: int
    is_lost: bool


def run_unit(site: Site, unit: Unit) -> Outcome:
    """Build the rows of one unit.

    Raises: PolicyError if the source cannot be read, holds a value that is not finite or does
    not fit, or the output cannot be written.
    """
    module = in_stretches(site.plan.modules[unit.module])
    made = make_unit(site, unit)
    written = 0
    for tensor in module.tensors:
        # Written with the header: the rows have no part in it.
        if tensor.is_constant:
            continue
        part = made.parts[tensor.part]
        # Equal bytes a row: a block of rows is one stretch of bytes, or one of each line.
        # What a row has beyond its source's values is its tail, or zeros.
        stride = tensor.nbytes // tensor.shape[0] if tensor.by_columns else 0
        share = (stride or tensor.nbytes) * unit.at // max(1, prod(module.shape[:-1]))
        path = site.folder / tensor.file
        written += write_at(path, tensor.start + share, part, stride=stride)
    return Outcome(written, made.is_lost)


class Made(NamedTuple):
    """The parts of a unit's rows, and what became of its values.

    is_kept: a reader gets more of them than next to nothing. is_lost: it does not, and they
    are not zeros.
    """

    parts: dict[str, Array]
    is_kept: bool
    is_lost: bool


def make_unit(site: Site, unit: Unit) -> Made:
    """The parts of the rows of one unit. Raises: PolicyError as `run_unit` does."""
    module = in_stretches(site.plan.modules[unit.module])
    view = module.sources[unit.source]
    span = unit.first, unit.count
    values = source_values(site, module, view, span)
    scale = site.prepared.column_scales.get(module.name)
    scaled = values if scale is None else values * scale
    if isinstance(module.treatment, Coded):
        parts = _encoded(site, module, scaled, (view, unit))
    else:
        parts = {module.tensors[0].part: values}
    if _is_surely_kept(site, module, scaled):
        return Made(parts, True, False)
    exact = source_values(site, replace(module, dtype="F32"), view, span)
    sums = Sums.of(exact, _decoded(site, module, parts, scale, exact.shape))
    return Made(parts, not sums.nothing_left, sums.nothing_left)


def _is_surely_kept(site: Site, module: Module, values: Array) -> bool:
    """Whether the first rows tell that values are stored and not lost; nearly always so."""
    if not isinstance(module.treatment, Coded):
        some = to_float32(values.reshape(-1)[:_LOOKED_AT], module.dtype)
        return bool(np.abs(some).max(initial=0) >= _LARGE)
    # Where groups run on from row to row, whole ones.
    first = np.ascontiguousarray(values[: module.together])
    exact = to_float32(first, module.dtype)
    what = module.dtype, module.treatment
    codec = site.format.codec()
    # Without statistics: whatever weighs, the largest values stay.
    decoded = codec.decode(codec.encode(first, *what), *what, exact.shape[-1])
    relative = Sums.of(exact, decoded).relative
    return relative is not None and relative < _NEAR


def _decoded(
    site: Site, module: Module, parts: dict[str, Array], scale: Array | None, shape: tuple[int, ...]
) -> Array:
    """float32: the values of a unit's parts, as readers compute with them."""
    if not isinstance(module.treatment, Coded):
        return to_float32(parts[module.tensors[0].part], module.dtype)
    held = {one.part: parts[one.part] for one in module.tensors if not one.is_constant}
    decoded = site.format.codec().decode(held, module.dtype, module.treatment, shape[-1])
    values = decoded.reshape(-1, shape[-1])[: shape[0]]
    return values if scale is None else values / scale


def _encoded(
    site: Site, module: Module, values: Array, origin: tuple[View, Unit]
) -> dict[str, Array]:
    importance = site.prepared.importance.get(module.name)
    given = {} if importance is None else {"importance": importance}
    # Only formats whose `prepare` gives an importance take one.
    encode: Any = site.format.codec().encode
    try:
        parts: dict[str, Array] = encode(values, module.dtype, coded(module.treatment), **given)
    except UnstorableError as error:
        place, found = _misfit(site, module, values, origin, error.row)
        if error.reason:
            raise found.unstorable(place, error.reason) from None
        raise found.too_large(place, describe(module.treatment)) from None
    for tensor in module.tensors:
        at = -1 if tensor.is_constant else _first_overflow(tensor, parts[tensor.part], values)
        if at >= 0:
            place, found = _misfit(site, module, values, origin, at)
            whose = f"whose {tensor.part} are {tensor.dtype}"
            raise found.too_large(place, f"{describe(module.treatment)}, {whose}")
    return parts


def _first_overflow(tensor: PlannedTensor, part: Array, values: Array) -> int:
    """The first row whose scale is infinite although its values are not, or -1."""
    if tensor.dtype not in VALUE_TYPES:
        return -1
    at = first_nonfinite(part, tensor.dtype)
    if at < 0:
        return -1
    return at % len(values) if tensor.by_columns else at * len(values) // part.size


def _misfit(
    site: Site, module: Module, values: Array, origin: tuple[View, Unit], row: int
) -> tuple[str, Misfit]:
    """Where a group is that cannot be stored, in that row of the values, and its neighbours."""
    view, unit = origin
    place = place_of(view, unit.first + row, 0)
    found = Misfit(site.plan, site.format, module, view, band_of(values, module.dtype, row))
    return f"a group of row {place}", found


def source_values(site: Site, module: Module, view: View, span: tuple[int, int]) -> Array:
    """[count, in] finite values of the module's value type.

    span: first row of the view, and count. FP8 is dequantized by the plan's rule.
    Raises: PolicyError as `run_unit` does.
    """
    how = Cast(module.dtype, site.plan.fp8_rule, cuts_off=site.format.spec.cuts_off)
    values = site.reader.rows(view, *span, how)
    at = first_nonfinite(values, module.dtype)
    if at >= 0:
        raise _overflow(site, module, view, span, at)
    return values


def _overflow(
    site: Site, module: Module, view: View, span: tuple[int, int], at: int
) -> PolicyError:
    """The error of a value that is finite, and not in the module's dtype."""
    exact = site.reader.rows(view, *span, Cast("F32", site.plan.fp8_rule))
    band = band_of(exact, "F32", at // exact.shape[-1])
    what = f"{exact.reshape(-1)[at]:.4g} at {place_of(view, span[0], at)}"
    return Misfit(site.plan, site.format, module, view, band).too_large(what, module.dtype)
