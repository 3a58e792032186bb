"""What readers are told of a matrix, and what stands for most of a bundle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from policy_dsl.plan import Draft, Module
from policy_dsl.treatments import Plain

AUTO_ROUND, GPTQ = "auto-round", "gptq"


class Width(NamedTuple):
    """How a quantized matrix is stored, as far as rules of both dialects tell it."""

    bits: int
    group_size: int
    symmetric: bool


def width_of(module: Module) -> Width | None:
    """The width of a module; None if it is not quantized."""
    coded = module.treatment
    if isinstance(coded, Plain):
        return None
    return Width(coded.bits, coded.group_size, coded.symmetric)


def default_width(modules: Iterable[Module]) -> Width | None:
    """The width of most parameters, between equals the first; None if nothing is quantized."""
    covered: Counter[Width] = Counter()
    for module in modules:
        width = width_of(module)
        if width is not None:
            covered[width] += module.parameters
    return covered.most_common(1)[0][0] if covered else None


def dialect_of(plan: Draft) -> str:
    """Whose configuration a bundle gets: the policy's word, else AutoRound's."""
    return str(dict(plan.policy.metadata).get("dialect", AUTO_ROUND))
