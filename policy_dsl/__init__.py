"""policyc: quantization policies as source files, planned to the byte and built.

load(reference) -> Policy; resolve(policy, inventory, specs) -> Plan; diff(before, after) of two
outlines. Defects of a policy or a source are raised as one PolicyError.
"""

from __future__ import annotations

from policy_dsl.diagnostics import PolicyError
from policy_dsl.language.load import load
from policy_dsl.plan import Plan
from policy_dsl.planning.diff import diff
from policy_dsl.planning.resolve import resolve
from policy_dsl.policy import Policy

__all__ = ["Plan", "Policy", "PolicyError", "diff", "load", "resolve"]
