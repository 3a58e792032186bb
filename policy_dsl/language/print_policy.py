"""Policy -> text, in both notations and in one fixed form; its digest."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from policy_dsl.language.print_dsl import print_dsl
from policy_dsl.language.print_yaml import print_yaml
from policy_dsl.policy import Policy

__all__ = ["canonical_text", "policy_digest", "print_dsl", "print_yaml"]


def canonical_text(policy: Policy) -> str:
    """The policy as YAML, with the values of its variables in their places and no comments.

    Policies that are equal have equal texts: how they were written takes no part.
    """
    rules = tuple(replace(rule, template=None) for rule in policy.rules)
    bare = replace(policy, rules=rules, comments=(), templates=(), key_spans=(), source=None)
    return print_yaml(bare)


def policy_digest(policy: Policy) -> str:
    """SHA-256, in hex, of the policy's canonical text."""
    return hashlib.sha256(canonical_text(policy).encode()).hexdigest()
