"""What a build needs to know about the model's inputs, and where the policy says it is."""

from __future__ import annotations

from collections.abc import Iterable

from policy_dsl.formats import FormatSpec
from policy_dsl.plan import Module
from policy_dsl.policy import Policy

# Statistic -> how to get one.
_SOURCES = {
    "imatrix": "an importance matrix: run llama.cpp's llama-imatrix on the model, and give the "
    "file with --imatrix or `calibration imatrix`",
}


def pending_statistics(
    modules: Iterable[Module], policy: Policy, spec: FormatSpec
) -> tuple[str, ...]:
    """The statistics that the plan's methods need and the policy does not name, and a cure."""
    methods = {module.treatment.method or "" for module in modules}
    needed = sorted({spec.statistics[one] for one in methods if one in spec.statistics})
    given = dict(policy.calibration)
    return tuple(_SOURCES[name] for name in needed if given.get(name) is None)
