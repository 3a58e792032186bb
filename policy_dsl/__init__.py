"""policyc: quantization policies as source files, planned to the byte and built.

load(reference) -> Policy; resolve(policy, inventory, specs) -> Plan; diff(before, after) of two
outlines. Defects of a policy or a source are raised as one PolicyError.
"""

from __future__ import annotations

# Checkers know the name; `typing` itself takes longer than Ctrl-C may go uncaught.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from policy_dsl.diagnostics import PolicyError
    from policy_dsl.language.load import load
    from policy_dsl.plan import Plan
    from policy_dsl.planning.diff import diff
    from policy_dsl.planning.resolve import resolve
    from policy_dsl.policy import Policy

__all__ = ["Plan", "Policy", "PolicyError", "diff", "load", "resolve"]

_HOMES = {
    "Plan": "plan",
    "Policy": "policy",
    "PolicyError": "diagnostics",
    "diff": "planning.diff",
    "load": "language.load",
    "resolve": "planning.resolve",
}


def __getattr__(name: str) -> object:
    # Found when asked for: every module of the package imports this one first, and a command
    # loads only what it uses.
    from importlib import import_module  # noqa: PLC0415

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
