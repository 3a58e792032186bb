"""What a config means, in every form that publishers and transformers 4 and 5 save it."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, fail
from policy_dsl.roles import architecture
from policy_dsl.roles.architecture import Architecture, Clause, Need
from policy_dsl.roles.table_entries import ConfigKey, Derived

# A config that asks for more layers or experts is not a model, and would only cost memory.
LARGEST_COUNT = 65536
# No model has a size beyond it; 32-bit integers of readers end there.
LARGEST_SIZE = 2**31 - 1
# The key that says that lm_head is embed.
TIED = "tie_word_embeddings"
_LARGEST_OPERAND = 2**53
_LONGEST_VALUE = 60
# Numbers that JSON has none for, and how transformers 5 writes them.
UNLIMITED = (math.inf, -math.inf)
_FLOATS: Mapping[str, float] = dict(zip(("Infinity", "-Infinity"), UNLIMITED, strict=True))
_ENTRY = re.compile(r"(\w+)\[layer\]")
_WORD = re.compile(r"\s*([*/+]|(?:up|down) to\b)?\s*([\w.|]+)")


def _inside(place: Any, key: str) -> Any:
    """What is under a key of a mapping; under `*`, what all its entries have alike."""
    if key != "*":
        return place[key]
    first, *others = place.values()
    return {word: one for word, one in first.items() if all(each[word] == one for each in others)}


@dataclass(frozen=True)
class ConfigFacts:
    """A config read by its family's table; each key is computed once.

    A key is one in the `config` of the table, or looked up as it is spelled: at the top, then in
    `text_config`, under each path that the table lists (`rope_theta` may be inside
    `rope_parameters`). n_layers: blocks of the language model. n_experts: of a block, 0 if it
    is dense. n_mtp_blocks: blocks after the last layer that predict tokens.
    """

    config: Mapping[str, Any]
    table: Architecture
    model_id: str = ""
    n_layers: int = 0
    n_experts: int = 0
    n_mtp_blocks: int = 0
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def value(self, key: str) -> Any:
        """What the config means by a key: as written, else what transformers assumes then.

        None if no default is known, or if null is the key's meaning (`q_lora_rank: null`).
        """
        if key not in self._known:
            # A key whose default leads back to itself has none there.
            self._known[key] = None
            self._known[key] = self._computed(self._entry(key))
        return self._known[key]

    def _computed(self, entry: ConfigKey) -> Any:
        value = self.given(entry.name)
        if entry.kind == "mapping" and isinstance(value, Mapping):
            # Without the entries that are keys of their own; None if it means nothing.
            is_void = any(value.get(key) == word for key, word in entry.unless.items())
            rest = {key: inner for key, inner in value.items() if key not in entry.without}
            value = None if is_void else rest or None
        return self._assumed(entry) if value is None else value

    def _assumed(self, entry: ConfigKey) -> Any:
        if entry.when_null is not None and self.is_given(entry.name):
            return self.first(entry.when_null)
        return self.first(entry.by_type.get(str(self.config.get("model_type"))) or entry.defaults)

    def given(self, key: str) -> Any:
        """The value that is written in the config, by whatever name; None if there is none."""
        return next((value for _, value in self.written(key) if value is not None), None)

    def is_given(self, key: str) -> bool:
        """Whether the config has the key under any of its names, null included."""
        return bool(self.written(key))

    def written(self, key: str) -> list[tuple[str, Any]]:
        """Each place where the config has the key, likeliest first, and the value there."""
        places = []
        for path in self._entry(key).paths:
            for level in config_levels(self.config):
                # What is on the way may be anything.
                with suppress(AttributeError, KeyError, TypeError, ValueError):
                    places.append((".".join(path), _numbers(reduce(_inside, path, level))))
        return places

    def _entry(self, key: str) -> ConfigKey:
        return self.table.config.get(key) or ConfigKey(key, (tuple(key.split(".")),), "size")

    def first(self, defaults: tuple[Any, ...]) -> Any:
        """What the first of these defaults that can be computed is in this config."""
        values = (self._default(one) if isinstance(one, Derived) else one for one in defaults)
        return next((value for value in values if value is not None), None)

    def _default(self, default: Derived) -> Any:
        if default.form in _DEFAULTS:
            return _DEFAULTS[default.form](self, default.fields)
        return self._by_layer(default.form, default.fields)

    def _by_layer(self, form: str, fields: Mapping[str, Any]) -> list[Any] | None:
        """A word for each layer: one for those chosen, and another for the rest."""
        sides = (fields[form], fields.get("at", 0), self.table.layers)
        given, first, layers = (self.value(one) if isinstance(one, str) else one for one in sides)
        # Numbers of layers, or one number: the first layers, or each of so many; none of zero.
        numbers = given if form == "listed" and isinstance(given, list) else [given]
        if not all(map(is_whole, (*numbers, first, layers))) or layers > LARGEST_COUNT:
            return None
        those: Collection[int] = range(given) if form == "first" else ()
        if form == "listed":
            those = {number - fields.get("from", 0) for number in numbers}
        elif form == "every" and given:
            those = range(first if "at" in fields else given - 1, layers, given)
        return [fields["is" if layer in those else "else"] for layer in range(layers)]

    def computed(self, expression: str) -> float | int | None:
        """Sums of numbers and keys multiplied and divided from left to right; None if unknown.

        `a up to b` and `a down to b` are multiples of b: the next one, and the one before.
        `a|b` is the first of several keys that is a number.
        """
        total: float | int = 0
        for product in expression.split(" + "):
            result: float | int = 1
            for sign, words in _WORD.findall(product):
                values = (int(w) if w.isdecimal() else self.value(w) for w in words.split("|"))
                operand = next(filter(_is_operand, values), None)
                if operand is None or (sign in ("/", "up to", "down to") and not operand):
                    return None
                if sign == "up to":
                    result = math.ceil(result / operand) * operand
                elif sign == "down to":
                    result = result // operand * operand
                else:
                    result = result / operand if sign == "/" else result * operand
            total += result
        return int(total) if total == int(total) else total

    @cached_property
    def _shapes(self) -> dict[tuple[str, ...], tuple[int, ...] | None]:
        return {}

    def sizes(self, need: Need, layer: int | None) -> tuple[str, ...]:
        """The sizes of what fulfils a need in a layer, as the family's table writes them."""
        if not need.by_layer:
            return need.shape
        found = (architecture.choices(size) for size in need.shape)
        sizes = (next(word for word, when in one if self.satisfies(when, layer)) for one in found)
        at = -1 if layer is None else layer
        # One value may be for all layers.
        return tuple(
            _ENTRY.sub(lambda key: str(self._at(self.value(key[1]), at)), size) for size in sizes
        )

    def shape(self, sizes: tuple[str, ...]) -> tuple[int, ...] | None:
        """What these sizes are; None if one is not known."""
        if sizes not in self._shapes:
            shape = [self.computed(size) for size in sizes]
            is_known = all(map(is_whole, shape))
            self._shapes[sizes] = tuple(int(size or 0) for size in shape) if is_known else None
        return self._shapes[sizes]

    def holds(self, need: Need, layer: int | None) -> bool:
        """Whether the config says that a layer has it."""
        return self.satisfies(need.when, layer)

    def may_lack(self, need: Need, layer: int | None) -> bool:
        """Whether a layer may have it or not."""
        return need.optional is True or bool(need.optional and self.satisfies(need.optional, layer))

    def satisfies(self, condition: str, layer: int | None = None) -> bool:
        """Whether all clauses of a condition of the table hold, in a layer or in none."""
        at = -1 if layer is None else layer
        return all(self._is(one, at) != one.negated for one in architecture.clauses(condition))

    def reason(self, need: Need, layer: int | None) -> str:
        """What the config says that decides whether a layer has it; empty if nothing does."""
        for condition, why in need.because.items():
            if self.satisfies(condition, layer):
                return why
        at = -1 if layer is None else layer
        said = list(self._deciding(need.when, at))
        # Of `experts, and from this layer on`, the layer explains what one layer lacks; and
        # what is written explains more than what is not.
        said = [one for one in said if one.form] or said
        said = [one for one in said if self.is_given(self._root(one.key))] or said
        return " and ".join(dict.fromkeys(self._said(clause, at) for clause in said))

    def absent_keys(self, expression: str) -> tuple[str, ...]:
        """The keys that decide a size and that the config leaves out."""
        absent: dict[str, None] = {}
        for key in "|".join(words for _, words in _WORD.findall(expression)).split("|"):
            if key and not key.isdecimal() and not self.is_given(key):
                derived = self._derived(key)
                deciding = [w for d in derived for w in self.absent_keys(d.fields.get("text", ""))]
                # What is only computed is in no config.
                own = [key] if self._entry(key).paths else []
                absent |= dict.fromkeys(deciding or own)
        return tuple(absent)

    def _derived(self, key: str) -> list[Derived]:
        return [one for one in self._entry(key).defaults if isinstance(one, Derived)]

    def _is(self, clause: Clause, layer: int) -> bool:
        if clause.key in self.table.where:
            return self.satisfies(self.table.where[clause.key], layer)
        value, form = self.value(clause.key), clause.form
        count = value if is_whole(value) else 0
        match form:
            case "is":
                held = str(self._at(value, layer)) == clause.word
            case "has":
                held = isinstance(value, list) and clause.word in map(str, value)
            case "below":
                most = self.value(clause.word)
                held = is_whole(most) and 0 < count < most
            case "in":
                held = isinstance(value, list) and layer in value
            case "listed":
                listed = None if value is None else str(value).replace(" ", "").split(",")
                # A block after the last layer is like that one.
                held = layer > 0 if listed is None else str(min(layer, self.n_layers - 1)) in listed
            case "several":
                held = count > 1
            case "from":
                held = is_whole(value) and layer >= value
            case "last":
                held = layer >= self.n_layers - count
            case "every" | "at":
                held = count > 0 and (layer + (form == "every")) % count == 0
            case _:
                held = value not in (None, False, 0)
        return bool(held)

    def _at(self, value: Any, layer: int) -> Any:
        """The entry of a list for a layer; an MTP block is one like the last."""
        if not isinstance(value, list):
            return value
        layer = min(layer, self.n_layers - 1)
        return value[layer] if 0 <= layer < len(value) else None

    def _deciding(self, condition: str, layer: int) -> Iterator[Clause]:
        """The clauses about the config that decide a condition: those that fail, or all."""
        parts = architecture.clauses(condition)
        failing = [one for one in parts if self._is(one, layer) == one.negated]
        for clause in failing or parts:
            if clause.key in self.table.where:
                yield from self._deciding(self.table.where[clause.key], layer)
            else:
                yield clause

    def _said(self, clause: Clause, layer: int) -> str:
        key = self._root(clause.key)
        value = self.value(key)
        if clause.form == "is" and isinstance(value, list):
            return f"{key} says {json.dumps(self._at(value, layer))} there"
        shown = json.dumps(value)[:_LONGEST_VALUE]
        if self.is_given(key):
            is_null = self.given(key) is None and value is not None
            return f"{key} is null, which means {shown}" if is_null else f"{key} is {shown}"
        return f"the config has no {key}, which means {shown}"

    def _root(self, key: str) -> str:
        """The key that decides: of one that the config leaves out, what its default is of."""
        for default in () if self.is_given(key) else self._derived(key):
            deciding = default.fields.get(default.form)
            if default.form in ("first", "every", "listed") and isinstance(deciding, str):
                return self._root(deciding)
        return key

    def bad_value(self, key: str, value: Any, reason: str) -> Diagnostic:
        """The finding about a value that a key cannot have."""
        shown, model = repr(value)[:_LONGEST_VALUE], self.model_id
        return diagnostic("bad-config-value", notes=[reason], model=model, key=key, value=shown)


def read_config(config: Mapping[str, Any], table: Architecture, model_id: str) -> ConfigFacts:
    """The facts of a model's config.

    Raises: PolicyError if the number of layers is missing or a count is not plausible.
    """
    facts, key = ConfigFacts(config, table, model_id), table.layers
    layers = _count(facts, key)
    if layers == 0 and facts.value(key) == 0:
        raise PolicyError([facts.bad_value(key, 0, "it must be at least 1")])
    if layers == 0:
        why = ", which says how many layers there are"
        raise fail("missing-config-key", model=model_id, key=key, why=why)
    experts, mtp_blocks = _count(facts, table.experts_key), _count(facts, table.mtp_layers)
    return replace(facts, n_layers=layers, n_experts=experts, n_mtp_blocks=mtp_blocks)


def _count(facts: ConfigFacts, key: str | None) -> int:
    value = facts.value(key) if key else None
    if not key or value is None:
        return 0
    if is_whole(value) and value <= LARGEST_COUNT:
        return int(value)
    # By the name that the config has for it.
    key = next((place for place, one in facts.written(key) if one is not None), key)
    reason = f"it must be a whole number of at most {LARGEST_COUNT:,}"
    raise PolicyError([facts.bad_value(key, value, reason)])


def written_value(config: Mapping[str, Any], key: str) -> Any:
    """A key as it is spelled, of a config of any family or none; None if it is not there."""
    return next((level[key] for level in config_levels(config) if level.get(key) is not None), None)


def rewritten(config: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    """The config with `change(key, value)` of its entries, and of those of its `text_config`."""
    entries = {key: change(key, value) for key, value in config.items()}
    if isinstance(text := entries.get("text_config"), Mapping):
        entries["text_config"] = rewritten(text, change)
    return entries


def config_levels(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The config, and the `text_config` in which multimodal models nest the language model."""
    text = config.get("text_config")
    return (config, text) if isinstance(text, Mapping) else (config,)


def _numbers(value: Any) -> Any:
    """A value, or a list, with the numbers that transformers 5 writes as `{"__float__": …}`."""
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return _FLOATS.get(str(value.get("__float__")), value) if isinstance(value, Mapping) else value


def _period(words: Any, word: str) -> int | None:
    """After how many entries the word returns, again and again; None if it does not."""
    if not isinstance(words, list) or word not in words:
        return None
    period = words.index(word) + 1
    regular = all((one == word) == (at % period == 0) for at, one in enumerate(words, 1))
    return period if regular else None


def _words(value: Any, meant: Mapping[str, str]) -> list[str]:
    """The entries of a list, or the letters of a text, in other words; empty if they are not."""
    is_list = isinstance(value, list | str) and len(value) <= LARGEST_COUNT
    given = value if is_list and all(isinstance(word, str) for word in value) else ()
    return [meant.get(word, word) for word in given]


def _places(words: Any, word: str, first: int) -> list[int] | None:
    """The numbers of a word in a list, which are counted from `first`; None if there is none."""
    if not isinstance(words, list):
        return None
    return [number for number, one in enumerate(words, first) if one == word]


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list | str) else None


def _each(entries: Any, one: Mapping[str, Any]) -> list[Any] | None:
    known, words = isinstance(entries, list), (one["else"], one["then"])
    return [words[entry == one["is"]] for entry in entries] if known else None


# Form of a default -> what it is in a config, by its fields; the others are lists by layer.
_DEFAULTS: Mapping[str, Callable[[ConfigFacts, Mapping[str, Any]], Any]] = {
    "expression": lambda facts, one: facts.computed(one["text"]),
    "if": lambda facts, one: facts.computed(one["then" if facts.satisfies(one["if"]) else "else"]),
    "keys": lambda facts, one: {name: facts.value(key) for name, key in one["keys"].items()},
    "period": lambda facts, one: _period(facts.value(one["period"]), one["of"]),
    # Only what is written: either list may be made of the other.
    "each": lambda facts, one: _each(facts.given(one["each"]), one),
    "length": lambda facts, one: _length(facts.value(one["length"])),
    "words": lambda facts, one: _words(facts.value(one["words"]), one["as"]) or None,
    "letters": lambda facts, one: (
        "".join(w) if len({*(w := _words(facts.value(one["letters"]), one["as"]))}) > 1 else ""
    ),
    "numbers": lambda facts, one: _places(facts.value(one["numbers"]), one["of"], one["from"]),
}


def _is_operand(value: Any) -> bool:
    # Neither infinity nor what no float can hold.
    return type(value) in (int, float) and abs(value) < _LARGEST_OPERAND


def is_whole(value: object) -> bool:
    """Whether a value is a whole number from 0; true and false are not."""
    return type(value) is int and value >= 0
