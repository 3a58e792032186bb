"""policyc: quantization policies as source files, planned to the byte, built and verified.

    plan = policyc.plan("policy.yaml", model="./checkpoint")
    policyc.build(plan, out="./bundle")
    policyc.verify("./bundle", source="./checkpoint").ok
    policyc.diff("config_i", plan)

`load` reads a policy and `open_source` the headers of a checkpoint. Defects of policies, sources
and bundles are raised as one PolicyError.
"""

# Checkers know the name; `typing` itself takes longer than Ctrl-C may go uncaught.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from emitters.core.build import BuildReport
    from emitters.core.verify import VerifyReport
    from policy_dsl.diagnostics import Diagnostic, PolicyError
    from policy_dsl.inventory import Inventory
    from policy_dsl.language.load import load
    from policy_dsl.plan import Plan
    from policy_dsl.planning.outline import Outline, PlanDiff
    from policy_dsl.policy import Policy
    from policy_dsl.sources.reference import open_source
    from policyc.workflow import build, diff, plan, verify

__all__ = ["BuildReport", "Diagnostic", "Inventory", "Outline", "Plan", "PlanDiff", "Policy"]
__all__ += ["PolicyError", "VerifyReport", "build", "diff", "load", "open_source", "plan", "verify"]
# Imported when asked for: a command loads only what it uses.
_HOMES = {
    "emitters.core.build": ("BuildReport",),
    "emitters.core.verify": ("VerifyReport",),
    "policy_dsl.diagnostics": ("Diagnostic", "PolicyError"),
    "policy_dsl.inventory": ("Inventory",),
    "policy_dsl.language.load": ("load",),
    "policy_dsl.plan": ("Plan",),
    "policy_dsl.planning.outline": ("Outline", "PlanDiff"),
    "policy_dsl.policy": ("Policy",),
    "policy_dsl.sources.reference": ("open_source",),
    "policyc.workflow": ("build", "diff", "plan", "verify"),
}


def __getattr__(name: str) -> object:
    from importlib import import_module  # noqa: PLC0415

    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
