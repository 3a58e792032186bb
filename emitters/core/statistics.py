"""Statistics of a model's inputs, read once at the start of a build, and what they decide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from emitters import get
from emitters.core.interface import Prepared, Statistics
from emitters.tensor_io.imatrix import open_imatrix
from policy_dsl.plan import Module, Plan


def prepare(plan: Plan) -> tuple[Plan, Prepared]:
    """The plan with the bytes that statistics decide, and the scales of columns.

    Raises: PolicyError if a file of statistics cannot be read or is another model's.
    """
    emitter = get(plan.target)
    methods = {module.treatment.method or "" for module in plan.modules}
    if not methods & emitter.spec.statistics.keys():
        return plan, Prepared({}, {})
    calibration, spans = plan.policy.calibration, dict(plan.policy.key_spans)
    imatrix = None
    if calibration.imatrix is not None:
        path = _beside_policy(plan, calibration.imatrix)
        imatrix = open_imatrix(path, spans.get("calibration.imatrix"))
    prepared = emitter.prepare(plan, Statistics(imatrix))
    modules = tuple(_filled(module, prepared) for module in plan.modules)
    return replace(plan, modules=modules), prepared


def _filled(module: Module, prepared: Prepared) -> Module:
    """The module with the contents that were decided now, which then are constants of it."""
    if not any(tensor.name in prepared.contents for tensor in module.tensors):
        return module
    tensors = tuple(
        replace(tensor, tail=prepared.contents.get(tensor.name, tensor.tail))
        for tensor in module.tensors
    )
    return replace(module, tensors=tensors)


def _beside_policy(plan: Plan, written: str) -> Path:
    """A path as the policy's author means it: from the policy's own folder, if it is there."""
    source = plan.policy.source
    beside = Path(source.name).parent / written if source else Path(written)
    return beside if beside.exists() else Path(written)
