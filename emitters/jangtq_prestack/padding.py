"""Experts that only pad, as `jang_config.json` tells of them.

Source: jang 2.5.50, its converter for MiniMax writes `expert_padding`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emitters.jangtq_prestack.names import projection_of
from emitters.jangtq_prestack.structure import JANG_CONFIG
from policy_dsl.formats import document
from policy_dsl.roles.published_names import expert_of

# Tensors beside the stacks that have an entry for every expert.
_BY_EXPERT = frozenset({"gate", "e_score_correction_bias"})


def added(files: Mapping[str, bytes], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Module -> how many of its first axis, at its end, are experts that only pad.

    shapes: logical, by module. Modules without such experts are left out.
    """
    jang = document(files, JANG_CONFIG) if JANG_CONFIG in files else {}
    known = jang.get("expert_padding")
    own = _count(known, "original_num_local_experts")
    padded = _count(known, "padded_num_local_experts")
    if not 0 < own < padded:
        return {}
    found = {path: _added(path, shape, own, padded) for path, shape in shapes.items()}
    return {path: count for path, count in found.items() if count}


def _count(known: Any, key: str) -> int:
    """A count of experts; 0 where there is none that makes sense."""
    value = known.get(key) if isinstance(known, Mapping) else None
    return value if type(value) is int else 0


def _added(path: str, shape: tuple[int, ...], own: int, padded: int) -> int:
    number = expert_of(path)
    if number is not None:
        # A module of its own, nothing but added rows.
        return shape[0] if shape and number >= own else 0
    last = path.rpartition(".")[2]
    by_expert = last in _BY_EXPERT or projection_of(path) is not None
    return padded - own if by_expert and shape[:1] == (padded,) else 0
