"""What a family's table says about the keys of its config: where they are, and their defaults.

The key `config` of architectures/<family>.yaml -> a `ConfigKey` for each canonical key
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What a value may be: a whole number from 1, one from 0, any number, one above 0, a flag …
KINDS = (
    *("size", "count", "number", "positive", "flag"),
    *("list", "numbers", "texts", "mapping", "text"),
)
_FIELDS = frozenset(
    {
        *("keys", "default", "defaults", "when_null", "by_type", "kind", "without", "unless"),
        *("entries", "at_most"),
    }
)


@dataclass(frozen=True, slots=True)
class Derived:
    """A default that other keys decide: `form` says how, from the keys and words of `fields`.

    expression: numbers and keys, multiplied and divided from left to right.
    every, first: a list with a word for each layer: `is` for each `every`-th or for the first
    ones, `else` for the others. period: after how many entries of a list the word `of` returns.
    """

    form: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """One canonical key of a family's config.

    paths: where publishers and libraries write it, likeliest first; `a.b` is b inside a.
    defaults: what its absence means, the first that can be computed; none: it must be there.
    when_null: the same for a `null` that is written out. by_type: model_type -> its defaults,
    where those of the family's model types differ. without: what is left out of a mapping;
    unless: a mapping with one of these entries means nothing; entries: the kinds of those that
    a mapping may have. at_most: an expression that the value may not exceed.
    """

    name: str
    paths: tuple[tuple[str, ...], ...]
    kind: str
    defaults: tuple[Any, ...] = ()
    when_null: tuple[Any, ...] | None = None
    by_type: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    unless: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)
    at_most: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The keys at the top of a config or its `text_config` that may hold it."""
        return tuple(path[0] for path in self.paths if len(path) == 1)


def merged_keys(before: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a family over those of a part: fields that it does not give stay."""
    return {key: {**_fields(before.get(key, {})), **_fields(own[key])} for key in own}


def _fields(entry: Any) -> Mapping[str, Any]:
    return entry if isinstance(entry, Mapping) else {"default": entry}


def config_keys(entries: Mapping[str, Any]) -> dict[str, ConfigKey]:
    """The keys that the `config` of a family's table lists.

    Raises: ValueError if an entry has a field or a kind that does not exist.
    """
    return {name: _key(name, entry) for name, entry in entries.items()}


def _key(name: str, entry: Any) -> ConfigKey:
    given = _fields(entry)
    unknown = set(given) - _FIELDS
    kinds = {given.get("kind", KINDS[0]), *given.get("entries", {}).values()}
    if unknown or not kinds.issubset(KINDS):
        raise ValueError(f"config key {name}: unknown field {sorted(unknown)} or kind")
    defaults = given.get("defaults", [given["default"]] if "default" in given else [])
    return ConfigKey(
        name=name,
        paths=tuple(tuple(path.split(".")) for path in given.get("keys", [name])),
        kind=given.get("kind") or _kind(defaults),
        defaults=tuple(map(_default, defaults)),
        when_null=(_default(given["when_null"]),) if "when_null" in given else None,
        by_type={type_: (_default(own),) for type_, own in given.get("by_type", {}).items()},
        without=tuple(given.get("without", ())),
        unless=given.get("unless", {}),
        entries=given.get("entries", {}),
        at_most=given.get("at_most"),
    )


def _default(written: Any) -> Any:
    if isinstance(written, str):
        return Derived("expression", {"text": written})
    if not isinstance(written, Mapping):
        return written
    if "value" in written:
        return written["value"]
    form = next((form for form in ("every", "first", "period") if form in written), None)
    if form is None:
        raise ValueError(f"a default cannot be {written}")
    return Derived(form, written)


def _kind(defaults: list[Any]) -> str:
    """The kind of value that a default shows; others than these are given, or sizes."""
    first = defaults[0] if defaults else 1
    kinds = {bool: "flag", float: "number", list: "list"}
    return kinds.get(type(first), "size")
