"""What the entries of an architecture table say about tensor names.

`model.layers.{layer}.mlp.{up_proj,down_proj}.weight: mlp.*` -> two names with a role each
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from policy_dsl.roles.needs import Need, needs, spelled
from policy_dsl.vocabulary import COMPONENTS, SINGLE_ROLES

# Single roles that are linear weights; the others are never quantized as matrices.
MATRIX_ROLES = frozenset({"router", "shared_expert_gate", "embed", "lm_head"})
_MODEL = "{model}"
_BLOCK = "{model}.layers.{layer}."
_NUMBERS = ("{layer}", "{expert}")


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
    needs: what it fulfils, for each role; None where the table does not say.
    """

    roles: tuple[Role, ...]
    layer_at: int | None = None
    expert_at: int | None = None
    fusion: Fusion | None = None
    reason: str = ""
    needs: tuple[Need | None, ...] = (None,)


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

    Raises: ValueError if two entries mean the same name, an entry none, or a need neither a
    role nor a name.
    """
    rules: dict[str, NameRule] = {}
    for key, rule in (*_named(table), *_ignored(table)):
        # The later entry would win in a mapping, and a tensor would quietly change its role.
        if key in rules:
            raise ValueError(f"two entries for {key}")
        rules[key] = rule
    return rules


def _named(table: Mapping[str, Any]) -> Iterator[tuple[str, NameRule]]:
    """The names that have roles."""
    meant = [
        (prefix, below, *_meaning(meaning, met))
        for place, prefix in (("top", ""), ("block", _BLOCK))
        for pattern, meaning in table[place].items()
        for below, met in spelled(pattern)
    ]
    slots = {below: bool(prefix) for prefix, below, *_ in meant}
    slots |= {role.name: bool(prefix) for prefix, _, roles, _ in meant for role in roles}
    known = needs(table, slots)
    for prefix, below, roles, fusion in meant:
        own = tuple(known.get(role.name, known.get(below)) for role in roles)
        for name in _of_models(prefix + below, table["models"]):
            yield _rule(name, roles, fusion, needs=own)


def _ignored(table: Mapping[str, Any]) -> Iterator[tuple[str, NameRule]]:
    for pattern, reason in table.get("ignored", {}).items():
        for below, _ in spelled(pattern):
            for name in _of_models(below, table["models"]):
                yield _rule(name, reason=reason)


def _of_models(name: str, models: list[str]) -> list[str]:
    return [name.replace(_MODEL, model) for model in models] if _MODEL in name else [name]


def _meaning(meaning: str | Mapping[str, Any], met: str) -> tuple[tuple[Role, ...], Fusion | None]:
    if isinstance(meaning, str):
        return (role_of(meaning.replace("*", met)),), None
    options = dict(meaning)
    projections = options.pop("experts")
    return tuple(role_of(f"experts.{each}") for each in projections), Fusion(**options)


def _rule(
    name: str,
    roles: tuple[Role, ...] = (),
    fusion: Fusion | None = None,
    *,
    reason: str = "",
    needs: tuple[Need | None, ...] = (),
) -> tuple[str, NameRule]:
    parts = name.split(".")
    numbers = [part for part in parts if part in _NUMBERS]
    at = {place: place_at for place_at, place in enumerate(numbers)}
    key = name.replace("{layer}", "#").replace("{expert}", "#")
    # A literal number would be taken out of the names that are looked up.
    if "{" in key or any(part.isdecimal() for part in parts):
        raise ValueError(f"a name may hold only the numbers {_NUMBERS}: {name}")
    return key, NameRule(roles, at.get("{layer}"), at.get("{expert}"), fusion, reason, needs)


def numbered_key(name: str) -> tuple[str, list[int]]:
    """The name with `#` for each whole number between dots, and the numbers."""
    parts = name.split(".")
    numbers = []
    for i, part in enumerate(parts):
        # 01 is another name than 1, and a number of many digits is no layer.
        if part.isdecimal() and len(part) < 8 and (part[0] != "0" or part == "0"):
            numbers.append(int(part))
            parts[i] = "#"
    return ".".join(parts), numbers
