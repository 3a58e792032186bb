"""What readers take from config.json: one table for each reader, readers/<reader>.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from policy_dsl.roles.config_keys import ConfigKey, config_keys

TABLES = Path(__file__).parent.parent / "readers"
_TABLE = {"reader", "ropes", "ropes_only", "kinds"}
_KIND = {
    *("model_types", "required", "assumes", "unused", "nullable", "also", "only"),
    *("ropes", "biases", "window", "inside", "inside_assumes"),
}
REQUIRED = "required"


@dataclass(frozen=True)
class Level:
    """The keys that a reader looks for in one mapping of a config.

    required: what it does not start without. assumes: the others, with what it takes where
    they are absent. nullable: keys whose null it takes for absence.
    """

    required: tuple[str, ...] = ()
    assumes: Mapping[str, ConfigKey] = field(default_factory=dict)
    nullable: frozenset[str] = frozenset()

    @property
    def keys(self) -> tuple[str, ...]:
        """All its keys, those that are required first."""
        return *self.required, *self.assumes

    def must_have(self, key: str, *, is_null: bool) -> bool:
        """Whether a reader fails without a value for the key: where it is absent, or null."""
        return key in self.required or (is_null and not self.takes_null(key))

    def takes_null(self, key: str) -> bool:
        """Whether a reader takes null for absence: then null is assumed, or keys decide."""
        if key in self.nullable or key not in self.assumes:
            return key in self.nullable
        defaults = self.assumes[key].defaults
        return not defaults or not isinstance(defaults[0], int | float | str | list)


@dataclass(frozen=True)
class ReaderKind:
    """What a reader's code for some model types takes from a config, and what it does anyway.

    top: keys of the config itself. inside, nested: a mapping in it, and the keys there. also:
    key -> where else the reader looks for it, as a path. only: key -> the values that the
    reader computes with, whatever the config says; a `ConfigKey` if other keys decide.
    ropes: ways to scale positions that it knows -> their parameters; None if it knows all.
    ropes_only: parameters that it does not read -> values that change nothing. biases: the
    last word of a linear -> the key that announces its bias, or True; None if biases were not
    looked at. windows: whether it computes with sliding windows. unused: what it reads and no
    config here sets.
    """

    name: str
    model_types: tuple[str, ...]
    top: Level
    inside: str | None
    nested: Level
    also: Mapping[str, tuple[str, ...]]
    only: Mapping[str, ConfigKey | tuple[Any, ...]]
    ropes: Mapping[str, Level] | None
    ropes_only: Mapping[str, tuple[Any, ...]]
    biases: Mapping[str, str | bool] | None
    windows: bool
    unused: Mapping[str, Any]


@cache
def reader_kinds(reader: str) -> Mapping[str, ReaderKind]:
    """The kinds of a reader's table, by their names.

    Raises: ValueError if a table has a key that means nothing.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    text = (TABLES / f"{reader}.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = yaml.load(text, Loader=loader)
    _ensure_known(reader, table, _TABLE)
    return {name: _kind(name, kind, table) for name, kind in table["kinds"].items()}


def reader_kind(reader: str, model_type: object) -> ReaderKind | None:
    """What a reader has for models of this type; None if its table does not say."""
    kinds = reader_kinds(reader).values()
    return next((kind for kind in kinds if model_type in kind.model_types), None)


def _kind(name: str, kind: Mapping[str, Any], table: Mapping[str, Any]) -> ReaderKind:
    _ensure_known(name, kind, _KIND)
    nullable = frozenset(kind.get("nullable", ()))
    known = kind.get("ropes")
    ropes = None if known is None else {rope: _rope(table["ropes"][rope]) for rope in known}
    return ReaderKind(
        name=name,
        model_types=tuple(kind["model_types"]),
        top=Level(tuple(kind.get("required", ())), _assumed(kind.get("assumes", {})), nullable),
        inside=kind.get("inside"),
        nested=Level((), _assumed(kind.get("inside_assumes", {})), nullable),
        also={key: tuple(path.split(".")) for key, path in kind.get("also", {}).items()},
        only={key: _allowed(key, values) for key, values in kind.get("only", {}).items()},
        ropes=ropes,
        ropes_only={key: tuple(values) for key, values in table.get("ropes_only", {}).items()},
        biases=kind.get("biases", {}) if "biases" in kind else None,
        windows=kind.get("window") != "ignored",
        unused=kind.get("unused", {}),
    )


def _rope(parameters: Mapping[str, Any]) -> Level:
    required = tuple(key for key, value in parameters.items() if value == REQUIRED)
    others = {key: value for key, value in parameters.items() if key not in required}
    return Level(required, _assumed(others))


def _assumed(values: Mapping[str, Any]) -> dict[str, ConfigKey]:
    return config_keys({"config": values})


def _allowed(key: str, values: Any) -> ConfigKey | tuple[Any, ...]:
    return tuple(values) if isinstance(values, list) else _assumed({key: {"default": values}})[key]


def _ensure_known(name: str, found: Mapping[str, Any], known: set[str]) -> None:
    # A misspelt key would silently be a table without its entries.
    if unknown := set(found) - known:
        raise ValueError(f"{name}: unknown key {sorted(unknown)}")
