"""What the entries of an architecture table say about tensor names.

`model.layers.{layer}.mlp.{up_proj,down_proj}.weight: mlp.*` -> two names with a role each
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from policy_dsl.vocabulary import COMPONENTS, SINGLE_ROLES

# Single roles that are linear weights; the others are never quantized as matrices.
MATRIX_ROLES = frozenset({"router", "shared_expert_gate", "embed", "lm_head"})
_NUMBERS = ("{layer}", "{expert}")
_CHOICE = re.compile(r"\{(model|[^{}]*,[^{}]*)\}")


class Role(NamedTuple):
    """What a tensor is for. is_matrix None: its shape decides."""

    name: str
    component: str | None
    projection: str | None
    is_matrix: bool | None


@dataclass(frozen=True, slots=True)
class Fusion:
    """How one source tensor holds matrices of every expert, along its first axis.

    interleaved: rows of the projections take turns, else they are blocks one after the other.
    transposed: stored [experts, in, out]. mxfp4: stored as blocks beside scales.
    """

    interleaved: bool = False
    transposed: bool = False
    mxfp4: bool = False


@dataclass(frozen=True, slots=True)
class NameRule:
    """What a name means. Several roles: a fused tensor's, in order; none: it is no weight.

    layer_at, expert_at: which of the numbers in the name they are. reason: why it is ignored.
    """

    roles: tuple[Role, ...]
    layer_at: int | None = None
    expert_at: int | None = None
    fusion: Fusion | None = None
    reason: str = ""


def role_of(text: str) -> Role:
    """The role that `component.projection` or a single role names.

    Raises: ValueError if the closed vocabulary lacks it.
    """
    component, _, last = text.rpartition(".")
    single = last in SINGLE_ROLES
    if not last or (not single and component not in COMPONENTS):
        raise ValueError(f"{text} is no role: neither a single role nor in a component")
    projection = None if single else last
    return Role(text, component or None, projection, not single or last in MATRIX_ROLES)


def name_rules(table: Mapping[str, Any]) -> dict[str, NameRule]:
    """Every name of a table, with `#` for each number, and its rule.

    Raises: ValueError if two entries mean the same name, or an entry none.
    """
    rules: dict[str, NameRule] = {}
    for key, rule in _rules(table):
        # The later entry would win in a mapping, and a tensor would quietly change its role.
        if key in rules:
            raise ValueError(f"two entries for {key}")
        rules[key] = rule
    return rules


def _rules(table: Mapping[str, Any]) -> Iterator[tuple[str, NameRule]]:
    block = {f"{{model}}.layers.{{layer}}.{name}": to for name, to in table["block"].items()}
    for pattern, meaning in {**table["top"], **block}.items():
        for name, met in _spelled(pattern, table["models"]):
            yield _rule(name, *_meaning(meaning, met))
    for pattern, reason in table.get("ignored", {}).items():
        for name, _ in _spelled(pattern, table["models"]):
            yield _rule(name, reason=reason)


def _spelled(pattern: str, models: list[str], met: str = "") -> Iterator[tuple[str, str]]:
    """Every name that a pattern with `{a,b}` and `{model}` means, and the last choice met."""
    choice = _CHOICE.search(pattern)
    if choice is None:
        yield pattern, met
        return
    # `*` in a role stands for the projection that was met, never for the model's prefix.
    of_model = choice[1] == "model"
    for word in models if of_model else choice[1].split(","):
        chosen = pattern[: choice.start()] + word + pattern[choice.end() :]
        yield from _spelled(chosen, models, met if of_model else word)


def _meaning(
    meaning: str | Mapping[str, Any], met: str
) -> tuple[tuple[Role, ...], Fusion | None]:
    if isinstance(meaning, str):
        return (role_of(meaning.replace("*", met)),), None
    options = dict(meaning)
    projections = options.pop("experts")
    return tuple(role_of(f"experts.{each}") for each in projections), Fusion(**options)


def _rule(
    name: str, roles: tuple[Role, ...] = (), fusion: Fusion | None = None, *, reason: str = ""
) -> tuple[str, NameRule]:
    parts = name.split(".")
    numbers = [part for part in parts if part in _NUMBERS]
    at = {place: place_at for place_at, place in enumerate(numbers)}
    key = name.replace("{layer}", "#").replace("{expert}", "#")
    # A literal number would be taken out of the names that are looked up.
    if "{" in key or any(part.isdecimal() for part in parts):
        raise ValueError(f"a name may hold only the numbers {_NUMBERS}: {name}")
    return key, NameRule(roles, at.get("{layer}"), at.get("{expert}"), fusion, reason)
