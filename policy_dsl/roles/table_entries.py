"""Entries of a family's table: keys of a config, and what a reader makes of the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

# Of a default, by the type that shows it; others than these are given, or sizes.
_KINDS_OF_DEFAULTS: Mapping[type, str] = {bool: "flag", float: "number", list: "list"}
# Defaults that other keys decide: what `Derived` says of them.
_FORMS = (
    *("every", "first", "listed", "period", "each", "length"),
    *("words", "letters", "numbers", "keys", "if"),
)


class Derived(NamedTuple):
    """A default that other keys decide: `form` says how, from the keys and words of `fields`.

    expression: numbers and keys multiplied and divided. every, first, listed: a list with a word
    a layer, `is` or `else`. each: a list with `then` for each entry of another that `is`, or
    `else`. period: after how many entries of a list the word `of` returns. length, words: of a
    list or a text, how many entries it has, and what they mean, by `as`. letters: a text of what
    they mean, if they are not all alike. numbers: those of the
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


class Part(NamedTuple):
    """One tensor of the reader: its name, with `{model}`, `{layer}`, `{n}`, and its role.

    role: empty for that of the source. transposed: columns as rows, of every matrix of a stack.
    """

    name: str
    role: str = ""
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What becomes of a tensor. What its fields mean: docs/extending.md.

    published: the name without the rule. model: how the source calls the model. number_at: the
    place of `{n}` among the numbers of its name. place: among the tensors that are joined, by
    number; None if it is not.
    """

    parts: tuple[Part, ...]
    published: str = ""
    model: str = ""
    number_at: int | None = None
    split: str | tuple[str, ...] = ""
    stack: bool = False
    along: str = "first"
    shape: tuple[str, ...] = ()
    axes: tuple[int, ...] = ()
    take: str = ""
    add: float = 0.0
    drop: str = ""
    misses: str = ""
    when: str = ""
    place: int | None = None

    @property
    def as_published(self) -> Arrangement:
        """The tensor with only the reader's word for the model, where the rule does not hold."""
        return Arrangement((Part(self.published),), self.published, self.model, self.number_at)


class Spelled(NamedTuple):
    """A name that a pattern means, after `prefix`. met: its last choice; at: its number in all."""

    prefix: str
    below: str
    met: str
    at: int


def arrangement(name: Spelled, rule: Any, roles: Sequence[str]) -> Arrangement:
    """What a rule of a table says of a name. roles: of the source, several if it is fused.

    Raises: TypeError for a key that means nothing, ValueError for parts without a split.
    """
    fields = dict(rule) if isinstance(rule, Mapping) else {"to": rule}
    joined = fields.pop("concat", None)
    given = joined or fields.pop("to", name.below)
    named = [_named(one) for one in (given if isinstance(given, list) else [given])]
    split = fields.pop("split", "")
    fused = len(roles) > 1
    if fused != (len(named) > 1) and not split:
        raise ValueError(f"{name.below}: {len(named)} names for {len(roles)} roles, and no split")
    parts = []
    for number, (word, transposed) in enumerate(named):
        called = name.prefix + word.replace("*", name.met)
        role = roles[number] if fused else _part_role(roles[0], called) if split or joined else ""
        parts.append(Part(called, role, transposed))
    fields |= {key: tuple(map(str, fields[key])) for key in ("shape",) if key in fields}
    fields |= {key: tuple(fields[key]) for key in ("axes",) if key in fields}
    fields["split"] = split if isinstance(split, str) else tuple(map(str, split))
    place = name.at if joined else None
    return Arrangement(tuple(parts), name.prefix + name.below, place=place, **fields)


def _named(given: str | Mapping[str, Any]) -> tuple[str, bool]:
    if isinstance(given, str):
        return given, False
    return given["name"], bool(given.get("transpose", False))


def _part_role(role: str, name: str) -> str:
    """The role of a part: the last word of its name, in the component of its source."""
    component, _, _ = role.rpartition(".")
    word = name.removesuffix(".weight").rpartition(".")[2]
    return f"{component}.{word}" if component else role


def placed(found: Arrangement, pattern: str, model: str) -> Arrangement:
    """The rule for a source that calls the model so; pattern: of its name, with numbers."""
    numbers = [part for part in pattern.split(".") if part.startswith("{") and part != "{model}"]
    number_at = numbers.index("{n}") if "{n}" in numbers else None
    return replace(found, model=model, number_at=number_at)


def part_roles(found: Iterable[Arrangement]) -> Iterator[str]:
    """The roles that only parts have."""
    return (part.role for one in found for part in one.parts if part.role)
