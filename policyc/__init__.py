"""policyc: quantization policies as source files, planned to the byte, built and verified.

    plan = policyc.plan("policy.yaml", model="./checkpoint")
    policyc.build(plan, out="./bundle")
    policyc.verify("./bundle", source="./checkpoint").ok
    policyc.diff("config_i", plan)

`load` reads a policy and `open_source` the headers of a checkpoint. Defects of policies, sources
and bundles are raised as one PolicyError.
"""

from __future__ import annotations

# Checkers know the name; `typing` itself takes longer than Ctrl-C may go uncaught.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from emitters.core.build import BuildReport
    from emitters.core.verify import VerifyReport
    from policy_dsl.diagnostics import Diagnostic, PolicyError
    from policy_dsl.inventory import Inventory
    from policy_dsl.plan import Plan
    from policy_dsl.planning.outline import Outline, PlanDiff
    from policy_dsl.policy import Policy
    from policyc.workflow import build, diff, load, open_source, plan, verify

__all__ = [
    "BuildReport",
    "Diagnostic",
    "Inventory",
    "Outline",
    "Plan",
    "PlanDiff",
    "Policy",
    "PolicyError",
    "VerifyReport",
    "build",
    "diff",
    "load",
    "open_source",
    "plan",
    "verify",
]
_HOMES = {
    "BuildReport": "emitters.core.build",
    "Diagnostic": "policy_dsl.diagnostics",
    "Inventory": "policy_dsl.inventory",
    "Outline": "policy_dsl.planning.outline",
    "Plan": "policy_dsl.plan",
    "PlanDiff": "policy_dsl.planning.outline",
    "Policy": "policy_dsl.policy",
    "PolicyError": "policy_dsl.diagnostics",
    "VerifyReport": "emitters.core.verify",
}


def __getattr__(name: str) -> object:
    # Imported when asked for: a command loads only what it uses.
    from importlib import import_module  # noqa: PLC0415

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "policyc.workflow")), name)
