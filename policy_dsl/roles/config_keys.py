"""The keys of a config that a table lists, and what their absence means."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# Of a default, by the type that shows it; others than these are given, or sizes.
_KINDS_OF_DEFAULTS: Mapping[type, str] = {bool: "flag", float: "number", list: "list"}
# Defaults that other keys decide: what `Derived` says of them.
_FORMS = ("every", "first", "listed", "period", "each", "length", "words", "numbers", "keys", "if")


class Derived(NamedTuple):
    """A default that other keys decide: `form` says how, from the keys and words of `fields`.

    expression: numbers and keys multiplied and divided. every, first, listed: a list with a word
    a layer, `is` or `else`. each: a list with `then` for each entry of another that `is`, or
    `else`. period: after how many entries of a list the word `of` returns. length, words: of a
    list or a text, how many entries it has, and what they mean, by `as`. numbers: those of the
    layers with the word `of` in a list, counted `from`. keys: a mapping to the values of these.
    if: an expression, `then` or `else`.
    """

    form: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """One canonical key of a family's config; what its fields mean: docs/extending.md.

    paths: where it may be, likeliest first. defaults: what its absence means, the first that
    can be computed; none: it must be there. when_null, by_type: the same of a written null, of
    a model_type.
    """

    name: str
    paths: tuple[tuple[str, ...], ...]
    kind: str
    defaults: tuple[Any, ...] = ()
    when_null: tuple[Any, ...] | None = None
    by_type: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    without: Sequence[str] = ()
    unless: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, str] = field(default_factory=dict)
    at_most: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The keys at the top of a config or its `text_config` that may hold it."""
        return tuple(path[0] for path in self.paths if len(path) == 1)


def config_keys(entries: Mapping[str, Any]) -> dict[str, ConfigKey]:
    """The keys that the `config` of a table lists. Raises: TypeError at an unknown field."""
    return {name: _key(name, dict(fields_of(entry))) for name, entry in entries.items()}


def fields_of(entry: Any) -> Mapping[str, Any]:
    """What the entry of a key says; by itself it is the default."""
    return entry if isinstance(entry, Mapping) else {"default": entry}


def _key(name: str, given: dict[str, Any]) -> ConfigKey:
    defaults = given.pop("defaults", [given.pop("default")] if "default" in given else [])
    shown = _KINDS_OF_DEFAULTS.get(type(defaults[0]), "size") if defaults else "size"
    when_null = (_default(given.pop("when_null")),) if "when_null" in given else None
    return ConfigKey(
        name=name,
        paths=tuple(tuple(path.split(".")) for path in given.pop("keys", [name])),
        kind=given.pop("kind", shown),
        defaults=tuple(map(_default, defaults)),
        when_null=when_null,
        by_type={type_: (_default(own),) for type_, own in given.pop("by_type", {}).items()},
        **given,
    )


def _default(written: Any) -> Any:
    if isinstance(written, str):
        return Derived("expression", {"text": written})
    if not isinstance(written, Mapping):
        return written
    if "value" in written:
        return written["value"]
    for form in _FORMS:
        if form in written:
            return Derived(form, written)
    raise ValueError(f"a default cannot be {written}")
