"""Values that do not fit in what they are to become: the errors, with what would hold them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from emitters.numerics.rounding import cast, first_nonfinite, to_float32
from emitters.numerics.value_types import Array
from policy_dsl.diagnostics import Diagnostic, PolicyError, Span, diagnostic, fail
from policy_dsl.formats import Format, SchemeSpec, UnstorableError
from policy_dsl.plan import Module, Plan
from policy_dsl.planning.decisions import trace
from policy_dsl.quantities import counted
from policy_dsl.roles.classify import ModelTensor
from policy_dsl.treatments import PLAIN_WORDS, Coded, Plain, describe
from policy_dsl.views import Values, View

# Rows that formats code together at most, with groups that do not run on from row to row.
BAND = 32
# A treatment that loses more of the largest value does not hold it, whatever it stores.
_LARGEST_LOSS = 0.25


@dataclass(frozen=True)
class Misfit:
    """Values of a module that are finite, and that its treatment cannot store.

    view: where they come from. values: float32 [rows, in], at most a band of them.
    """

    plan: Plan
    format: Format
    module: Module
    view: View
    values: Array

    def too_large(self, what: str, dtype: str) -> PolicyError:
        """The error: `what` is too large for `dtype`, and which treatments would hold it."""
        facts = {"tensor": self.view.tensor.name, "what": what, "dtype": dtype}
        cure = self._cure("it")
        return fail("value-overflow", self._span(), suggestion=cure, **facts)

    def too_small(self, n_values: int) -> Diagnostic:
        """The error: all values become 0; and which treatments would hold them."""
        module = self.module
        quantized = isinstance(module.treatment, Coded)
        return diagnostic(
            "value-underflow",
            self._span(),
            suggestion=self._cure("them"),
            tensor=self.view.tensor.name,
            values=counted(n_values, "value"),
            treatment=describe(module.treatment) if quantized else module.dtype,
        )

    def _cure(self, them: str) -> str:
        """What to do about values that are not held."""
        held = list(self._holding())
        more = f"{', '.join(held[:-1])} or {held[-1]}" if len(held) > 1 else "".join(held)
        if held:
            return f"{more} would hold {them}; give the tensor a rule of its own"
        return f"nothing that {self.plan.target} stores holds {them}: is the checkpoint whole?"

    def unstorable(self, place: str, reason: str) -> PolicyError:
        """The error: the format has no numbers for what stands at `place`."""
        return fail(
            "unstorable-value",
            self._span(),
            tensor=self.view.tensor.name,
            place=place,
            treatment=describe(self.module.treatment),
            reason=reason,
        )

    def _holding(self) -> Iterator[str]:
        """What the target stores that would hold the values, in the policy's words.

        Plain dtypes, and of every scheme the width that is nearest to what was wanted.
        """
        tensor = self._tensor()
        spec, model = self.format.spec, self.plan.model
        for dtype in spec.plain_dtypes:
            if spec.unsupported(tensor, model, Plain(dtype)) is None and self._fits(dtype):
                yield PLAIN_WORDS[dtype]
        wanted = self.module.treatment
        if isinstance(wanted, Plain):
            return
        for scheme in spec.schemes:
            dtype = scheme.values or spec.plain_dtype(tensor, model)
            for treatment in self._treatments(wanted, scheme):
                allowed = spec.unsupported(tensor, model, treatment) is None
                if allowed and self._fits(dtype) and self._is_kept(treatment, dtype):
                    yield describe(treatment)
                    break

    def _treatments(self, wanted: Coded, scheme: SchemeSpec) -> Iterator[Coded]:
        """Treatments of a scheme, those with a width near to the module's own first."""
        columns = self.values.shape[-1]
        sizes = [size for size in scheme.group_sizes if columns % size == 0]
        if scheme.group_sizes and not sizes:
            return
        own = wanted.group_size if wanted.group_size in sizes else 0
        group = own or (sizes[0] if sizes else 0)
        for bits in sorted(scheme.bits, key=lambda bits: abs(bits - wanted.bits)):
            yield Coded(scheme.name, bits, group, scheme.symmetries[0], scheme.methods[0])

    def _fits(self, dtype: str) -> bool:
        narrow = cast(self.values, "F32", dtype, cuts_off=self.format.spec.cuts_off)
        if first_nonfinite(narrow, dtype) >= 0:
            return False
        return self._is_near(to_float32(narrow, dtype))

    def _is_kept(self, treatment: Coded, dtype: str) -> bool:
        """Whether the values come back from a treatment, more or less."""
        given = cast(self.values, "F32", dtype, cuts_off=self.format.spec.cuts_off)
        # Sums of such values overflow, which is an answer too.
        with np.errstate(all="ignore"):
            try:
                parts = self.format.codec().encode(given, dtype, treatment)
            except UnstorableError:
                return False
            back = self.format.codec().decode(parts, dtype, treatment, given.shape[-1])
            return self._is_near(back)

    def _is_near(self, values: Array) -> bool:
        """Whether the values are those of the module, more or less."""
        lost = np.abs(values - self.values).max() / np.abs(self.values).max()
        return bool(lost <= _LARGEST_LOSS)

    def _tensor(self) -> ModelTensor:
        """What the values are in the model; a source tensor may hold several of its tensors."""
        view = self.view
        # Rows may be counted as the values in them.
        made = tuple(one for one in view.operations if not isinstance(one, Values))
        return next(
            tensor
            for tensor in self.plan.model.tensors
            if tensor.source.name == view.tensor.name and tensor.operations == made
        )

    def _span(self) -> Span | None:
        """The treatment that was chosen, where the policy says it."""
        plan = self.plan
        matching = trace(plan.policy, plan.model, plan.target, self._tensor())
        rules = [compiled.rule for compiled, may in matching if may]
        if rules:
            return rules[-1].treatment_span or rules[-1].span
        return dict(plan.policy.key_spans).get("defaults.otherwise")


def band_of(values: Array, dtype: str, row: int) -> Array:
    """float32 [rows, in]: the band that `row` of the values, of value type `dtype`, is in."""
    first = row // BAND * BAND
    return to_float32(np.ascontiguousarray(values[first : first + BAND]), dtype)
