"""AWQ scales from an importance matrix: one for gate and up of all experts of a layer.

Source: Kaden-Schutt/hipfire, `calibration` module and MiniMax branch at 02786be.
"""

from __future__ import annotations

from collections.abc import Iterator

from emitters.hipfire_hfq.names import column_scale as scale_of
from emitters.hipfire_hfq.tiers import AWQ, EXACT, alpha_of, scales_of
from emitters.numerics.awq import awq_scale, column_scale, gate_up_sums
from emitters.numerics.value_types import Array
from emitters.tensor_io.imatrix import Imatrix
from emitters.tensor_io.prepared import Prepared, Statistics
from policy_dsl.diagnostics import PolicyError
from policy_dsl.plan import Module, Plan, coded_modules


def prepare(plan: Plan, statistics: Statistics) -> Prepared:
    """The stored scales of every layer, and what each expert's columns are multiplied by.

    Raises: PolicyError if the importance matrix is not one of this model.
    """
    scaled = {
        name: module
        for module, coded in coded_modules(plan.modules)
        if coded.method == AWQ and (name := scale_of(module.name)) is not None
    }
    if statistics.imatrix is None:
        return Prepared.nothing()
    exact = scales_of(plan.policy) == EXACT
    contents: dict[str, bytes] = {}
    applied: dict[str, Array] = {}
    for name, module in scaled.items():
        sums = _sums(statistics.imatrix, module, plan)
        scale = column_scale(awq_scale(sums, alpha_of(plan.policy)), exact=exact)
        contents[f"{name}.weight"] = scale.stored.tobytes()
        applied[name] = scale.applied
    return Prepared(contents, dict(_by_module(plan, applied)), {})


def _by_module(plan: Plan, applied: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    for module in plan.modules:
        name = scale_of(module.name)
        if name is not None and name in applied:
            yield module.name, applied[name]


def _sums(imatrix: Imatrix, module: Module, plan: Plan) -> Array:
    """float32 [in]: what gate and up of all experts of a module's layer got as input."""
    count, columns = plan.source_experts, module.shape[-1]
    found: list[Array] = []
    for role in ("experts.gate_proj", "experts.up_proj"):
        try:
            sums = imatrix.sums(role, module.layer, n_matrices=count, columns=columns)
        except PolicyError as error:
            # Both have the same inputs: without up's, gate's count for both.
            if not found or error.diagnostics[0].code != "missing-imatrix-entry":
                raise
        else:
            found.append(sums.of(plan.old_experts(module.layer)).sums)
    return gate_up_sums(found[0], found[1] if len(found) > 1 else None)
