"""AWQ scales from an importance matrix: one for gate and up of all experts of a layer.

Source: Kaden-Schutt/hipfire, `calibration` module and MiniMax branch at 02786be.
"""

from __future__ import annotations

from emitters.hipfire_hfq.encode import encode
from emitters.hipfire_hfq.names import column_scale as scale_of
from emitters.hipfire_hfq.tiers import AWQ, EXACT, alpha_of, scales_of
from emitters.numerics.awq import awq_scale, column_scale, gate_up_sums
from emitters.numerics.value_types import Array
from policy_dsl.diagnostics import PolicyError
from policy_dsl.formats import Context, Statistics
from policy_dsl.plan import Module, Plan, coded_modules


def contents(plan: Plan, statistics: Statistics) -> dict[str, bytes]:
    """The stored scales of every layer.

    Raises: PolicyError if the importance matrix is not one of this model.
    """
    scaled = {
        name: module
        for module, coded in coded_modules(plan.modules)
        if coded.method == AWQ and (name := scale_of(module.name)) is not None
    }
    exact = scales_of(plan.policy) == EXACT
    return {
        f"{name}.weight": column_scale(
            _scale(plan, module, statistics), exact=exact
        ).stored.tobytes()
        for name, module in scaled.items()
    }


def context(plan: Plan, module: Module, source: int, statistics: Statistics) -> Context:
    """What an expert's columns are multiplied by before they are coded."""
    exact = scales_of(plan.policy) == EXACT
    return Context(encode, column_scale(_scale(plan, module, statistics), exact=exact).applied)


def _scale(plan: Plan, module: Module, statistics: Statistics) -> Array:
    """float32 [in]: the scale that all experts of a module's layer share."""

    def made() -> Array:
        return awq_scale(_sums(statistics, module), alpha_of(plan.policy))

    return statistics.once((AWQ, module.layer), made)


def _sums(statistics: Statistics, module: Module) -> Array:
    """float32 [in]: what gate and up of all experts of a module's layer got as input."""
    gate = statistics.of_layer("experts.gate_proj", module).sums
    try:
        up = statistics.of_layer("experts.up_proj", module).sums
    except PolicyError as error:
        # Both have the same inputs: without up's, gate's count for both.
        if error.diagnostics[0].code != "missing-imatrix-entry":
            raise
        up = None
    return gate_up_sums(gate, up)
