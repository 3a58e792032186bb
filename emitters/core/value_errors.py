"""Values that do not fit in what they are to become, and the errors that say what holds them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from emitters.core.work_units import Unit
from emitters.numerics.rounding import cast, first_nonfinite, to_float32
from emitters.numerics.value_types import Array
from policy_dsl.diagnostics import Diagnostic, Span, diagnostic
from policy_dsl.formats import Format
from policy_dsl.plan import Plan
from policy_dsl.quantities import counted
from policy_dsl.roles.classify import ModelTensor
from policy_dsl.treatments import PLAIN_WORDS, Coded, Plain, describe
from policy_dsl.views import Values

# Rows that formats code together at most, with groups that do not run on from row to row.
BAND = 32
# A dtype that loses more of the largest value does not hold it.
_LARGEST_LOSS = 0.25


class ValueDefectError(Exception):
    """Finite values of a unit that its output cannot store. It can be pickled.

    about: of `value-underflow` how many values; of others the place, and what is too narrow or
    why it cannot be stored. values: float32 [rows, in], some of those concerned.
    """

    def __init__(self, unit: Unit, code: str, about: int | tuple[str, str], values: Array) -> None:
        super().__init__(unit, code, about, values)
        self.unit, self.code, self.about, self.values = unit, code, about, values


def finding_of(defect: ValueDefectError, plan: Plan, format: Format) -> Diagnostic:
    """The error: what does not fit, where the policy chose it, and what would hold it."""
    unit, output = defect.unit, defect.unit.output
    span, tensor = _span(plan, unit), unit.view.tensor.name
    quantized = isinstance(output.treatment, Coded)
    treatment = describe(output.treatment) if quantized else output.dtype
    if isinstance(defect.about, int):
        cure, values = _cure(defect, plan, format, "them"), counted(defect.about, "value")
        facts = {"tensor": tensor, "values": values, "treatment": treatment}
        return diagnostic(defect.code, span, suggestion=cure, **facts)
    place, what = defect.about
    if defect.code == "unstorable-value":
        facts = {"tensor": tensor, "place": place, "treatment": treatment, "reason": what}
        return diagnostic(defect.code, span, **facts)
    facts = {"tensor": tensor, "what": place, "dtype": what}
    return diagnostic(defect.code, span, suggestion=_cure(defect, plan, format, "it"), **facts)


def band_of(values: Array, dtype: str, row: int) -> Array:
    """float32 [rows, in]: the band that `row` of the values, of value type `dtype`, is in."""
    first = row // BAND * BAND
    return to_float32(np.ascontiguousarray(values[first : first + BAND]), dtype)


def _cure(defect: ValueDefectError, plan: Plan, format: Format, them: str) -> str:
    held = list(_holding(defect, plan, format))
    if held:
        return f"{' or '.join(held)} would hold {them}; give the tensor a rule of its own"
    return f"no plain dtype of {plan.target} holds {them}; try another scheme"


def _holding(defect: ValueDefectError, plan: Plan, format: Format) -> Iterator[str]:
    """The plain dtypes that readers of the target take and that hold the values."""
    spec, tensor = format.spec, _tensor(plan, defect.unit)
    for dtype in spec.plain_dtypes:
        refused = format.review.held(tensor, plan.model, Plain(dtype))
        if refused is None and _fits(defect.values, dtype, cuts_off=spec.cuts_off):
            yield PLAIN_WORDS[dtype]


def _fits(values: Array, dtype: str, *, cuts_off: bool) -> bool:
    narrow = cast(values, "F32", dtype, cuts_off=cuts_off)
    if first_nonfinite(narrow, dtype) >= 0:
        return False
    lost = np.abs(to_float32(narrow, dtype) - values).max() / np.abs(values).max()
    return bool(lost <= _LARGEST_LOSS)


def _tensor(plan: Plan, unit: Unit) -> ModelTensor:
    """What a unit's view is in the model; a source tensor may hold several of its tensors."""
    view = unit.view
    # Rows may be counted as the values in them.
    made = tuple(one for one in view.operations if not isinstance(one, Values))
    return next(
        tensor
        for tensor in plan.model.tensors
        if tensor.source.name == view.tensor.name and tensor.operations == made
    )


def _span(plan: Plan, unit: Unit) -> Span | None:
    """The treatment that was chosen, where the policy says it."""
    rule = plan.rule_of(plan.modules[unit.module])
    if rule is None:
        return dict(plan.policy.key_spans).get("defaults.otherwise")
    return rule.treatment_span or rule.span
