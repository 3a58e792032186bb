"""The table of a model family: which tensor names it has and what each is for.

architectures/<family>.yaml ── includes ── architectures/_parts.yaml ──> Architecture
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from policy_dsl.vocabulary import COMPONENTS, SINGLE_ROLES

TABLES = Path(__file__).parent / "architectures"
# Single roles that are linear weights; the others are never quantized as matrices.
MATRIX_ROLES = frozenset({"router", "shared_expert_gate", "embed", "lm_head"})
_MAPPINGS = ("top", "block", "ignored", "elsewhere", "aliases")
_VALUES = ("model_types", "models", "layers", "experts", "mtp_layers")
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
    """

    roles: tuple[Role, ...]
    layer_at: int | None = None
    expert_at: int | None = None
    fusion: Fusion | None = None
    reason: str = ""


@dataclass(frozen=True)
class Architecture:
    """A model family's table: its names, aliases and how its config tells the sizes.

    roles: all that its names can have; the open sets below `elsewhere` (vision, MTP extras)
    come with a model. aliases: a known name -> the projections, role or component it means.
    layers, experts, mtp_layers: config keys (of experts, the first that the config has).
    models: what may stand before `layers.0`.
    names: a name with `#` for each number -> its rule. elsewhere: prefix -> component.
    """

    family: str
    model_types: tuple[str, ...]
    roles: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]]
    layers: str = field(repr=False)
    experts: tuple[str, ...] = field(repr=False)
    mtp_layers: str | None = field(repr=False)
    models: tuple[str, ...] = field(repr=False)
    names: Mapping[str, NameRule] = field(repr=False)
    elsewhere: Mapping[str, str] = field(repr=False)


def role_of(text: str) -> Role:
    """The role that `component.projection` or a single role names.

    Raises: ValueError if the closed vocabulary lacks it.
    """
    component, _, last = text.rpartition(".")
    single = last in SINGLE_ROLES
    if not last or (not single and component not in COMPONENTS):
        raise ValueError(f"{text} is no role: neither a single role nor in a component")
    return Role(
        text, component or None, None if single else last, not single or last in MATRIX_ROLES
    )


@cache
def families() -> tuple[str, ...]:
    """The names of all families that have a table, sorted."""
    return tuple(sorted(path.stem for path in TABLES.glob("[!_]*.yaml")))


@cache
def architecture(family: str) -> Architecture:
    """The table of a family.

    Raises: KeyError if there is none; ValueError if a table contradicts itself.
    """
    if family not in families():
        raise KeyError(family)
    table = _merged(family)
    names = dict(_names(table, family))
    roles = {role.name for rule in names.values() for role in rule.roles}
    return Architecture(
        family=family,
        model_types=tuple(table["model_types"]),
        roles=tuple(sorted(roles)),
        aliases={alias: tuple(meant) for alias, meant in table.get("aliases", {}).items()},
        layers=table["layers"],
        experts=tuple(table.get("experts", ())),
        mtp_layers=table.get("mtp_layers"),
        models=tuple(table["models"]),
        names=names,
        elsewhere=table.get("elsewhere", {}),
    )


@cache
def model_types() -> Mapping[str, str]:
    """The `model_type` of a config -> its family."""
    return {each: family for family in families() for each in _table(family)["model_types"]}


def outside(architecture: Architecture, key: str, *, beyond: bool) -> NameRule | None:
    """The rule of a name that the table does not spell: vision towers and MTP blocks.

    key: the name with `#` for numbers. beyond: its first number is a layer after the last one.
    """
    for prefix, component in architecture.elsewhere.items():
        if key.startswith(prefix):
            return _outside(architecture, key, component)
    prefixes = tuple(f"{model}.layers.#." for model in architecture.models)
    if beyond and architecture.mtp_layers and key.startswith(prefixes):
        return _outside(architecture, key, "mtp")
    return None


def _outside(architecture: Architecture, key: str, component: str) -> NameRule:
    """MTP blocks are built like the model's own, and named after them where they are alike."""
    _, found, rest = key.partition("layers.#.")
    if component == "mtp" and found:
        alike = architecture.names.get(f"{architecture.models[0]}.layers.#.{rest}")
        if alike is not None:
            roles = tuple(_moved(role, component) for role in alike.roles)
            return replace(alike, roles=roles, layer_at=None)
    parts = [part for part in key.split(".") if part != "#"]
    if parts[-1] == "bias":
        return NameRule((role_of(f"{component}.bias"),))
    last = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if "norm" in last or last.startswith("ln"):
        return NameRule((role_of(f"{component}.norm"),))
    if component == "mtp":
        last = architecture.aliases.get(last, (last,))[0]
    role = role_of(f"{component}.{last}")
    linear = parts[-1] == "weight" and (role.projection is None or "embed" not in last)
    return NameRule((role._replace(is_matrix=None if linear else False),))


def _moved(role: Role, component: str) -> Role:
    last = role.name.rpartition(".")[2]
    return role._replace(name=f"{component}.{last}", component=component)


@cache
def _table(name: str) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = (TABLES / f"{name}.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.load(text, Loader=loader)
    return table


def _merged(family: str) -> dict[str, Any]:
    """A family's table with the parts it includes; what the family itself says, wins."""
    own = _table(family)
    merged: dict[str, Any] = {}
    for part in [*(_table("_parts")[name] for name in own.get("include", [])), own]:
        unknown = set(part) - {*_MAPPINGS, *_VALUES, "include"}
        if unknown:
            raise ValueError(f"{family}.yaml: unknown key {sorted(unknown)}")
        for key, value in part.items():
            merged[key] = {**merged.get(key, {}), **value} if key in _MAPPINGS else value
    return merged


def _names(table: Mapping[str, Any], family: str) -> Iterator[tuple[str, NameRule]]:
    block = {f"{{model}}.layers.{{layer}}.{name}": to for name, to in table["block"].items()}
    ignored = {name: {"reason": why} for name, why in table.get("ignored", {}).items()}
    seen: set[str] = set()
    for pattern, meaning in {**table["top"], **block, **ignored}.items():
        for name, met in _spelled(pattern, table["models"]):
            key, rule = _rule(name, meaning, met)
            if key in seen:
                raise ValueError(f"{family}.yaml: two entries for {key}")
            seen.add(key)
            yield key, rule


def _spelled(pattern: str, models: list[str], met: str = "") -> Iterator[tuple[str, str]]:
    """Every name that a pattern with `{a,b}` and `{model}` means, and the last choice met."""
    choice = re.search(r"\{(model|[^{}]*,[^{}]*)\}", pattern)
    if choice is None:
        yield pattern, met
        return
    words = models if choice[1] == "model" else choice[1].split(",")
    for word in words:
        chosen = pattern[: choice.start()] + word + pattern[choice.end() :]
        yield from _spelled(chosen, models, met if choice[1] == "model" else word)


def _rule(name: str, meaning: str | dict[str, Any], met: str) -> tuple[str, NameRule]:
    parts = name.split(".")
    numbers = [part for part in parts if part in _NUMBERS]
    key = ".".join("#" if part in _NUMBERS else part for part in parts)
    if "{" in key or any(part.isdecimal() for part in parts):
        raise ValueError(f"a name pattern may hold only {_NUMBERS}, not {name}")
    at = {place: numbers.index(place) if place in numbers else None for place in _NUMBERS}
    options = {} if isinstance(meaning, str) else dict(meaning)
    reason = options.pop("reason", "")
    projections = options.pop("experts", [])
    roles = tuple(role_of(f"experts.{projection}") for projection in projections)
    if isinstance(meaning, str):
        roles = (role_of(meaning.replace("*", met)),)
    fusion = Fusion(**options) if projections else None
    return key, NameRule(roles, at["{layer}"], at["{expert}"], fusion, reason)
