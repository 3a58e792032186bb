"""policyc: quantization policies as source files, planned to the byte and built.

load(reference) -> Policy; resolve(policy, inventory, specs) -> Plan; build(plan, inventory,
out=…) -> BuildReport; verify_bundle(folder) -> VerifyReport; diff(before, after) of two outlines.
Defects of a policy or a source are raised as one PolicyError.
"""

from __future__ import annotations

# Checkers know the name; `typing` itself takes longer than Ctrl-C may go uncaught.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from emitters.core.build import BuildReport, build
    from emitters.core.verify import VerifyReport, verify_bundle
    from policy_dsl.diagnostics import PolicyError
    from policy_dsl.language.load import load
    from policy_dsl.plan import Plan
    from policy_dsl.planning.diff import diff
    from policy_dsl.planning.resolve import resolve
    from policy_dsl.policy import Policy

_HOMES = {
    "BuildReport": "emitters.core.build",
    "Plan": "policy_dsl.plan",
    "Policy": "policy_dsl.policy",
    "PolicyError": "policy_dsl.diagnostics",
    "VerifyReport": "emitters.core.verify",
    "build": "emitters.core.build",
    "diff": "policy_dsl.planning.diff",
    "load": "policy_dsl.language.load",
    "resolve": "policy_dsl.planning.resolve",
    "verify_bundle": "emitters.core.verify",
}

__all__ = [
    "BuildReport",
    "Plan",
    "Policy",
    "PolicyError",
    "VerifyReport",
    "build",
    "diff",
    "load",
    "resolve",
    "verify_bundle",
]


def __getattr__(name: str) -> object:
    # Imported when asked for: a command loads only what it uses.
    from importlib import import_module  # noqa: PLC0415

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
