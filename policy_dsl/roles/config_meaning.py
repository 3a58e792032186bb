"""What a config means, in every form that publishers and transformers 4 and 5 save it.

config.json + the family's table ── config_value ──> the value of a canonical key
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from policy_dsl.diagnostics import fail
from policy_dsl.inventory import Inventory
from policy_dsl.roles.architecture import Architecture
from policy_dsl.roles.config_keys import ConfigKey, Derived

# A config that asks for more is no model, and would only cost memory.
LARGEST_COUNT = 65536
_LARGEST_OPERAND = 2**53
_ABSENT = object()
_WORD = re.compile(r"\s*([*/+]?)\s*([\w.|]+)")


def config_value(config: Mapping[str, Any], table: Architecture, key: str) -> Any:
    """What a config of a family says about a canonical key, by whatever name, else its default.

    config: a whole config.json. key: as in the `config` of the family's table; any other key
    is looked up as it is spelled. A key is looked up at the top, then in `text_config`, under
    each of the paths that the table lists (`num_experts` may be `num_local_experts`, and
    `rope_theta` may be inside `rope_parameters`). Absent or null, it is what the table says
    transformers assumes then, which other keys may decide (`head_dim: hidden_size /
    num_attention_heads`). None comes back if the config lacks the key and no default is known,
    or if null is the key's meaning (`q_lora_rank: null`). The value is the config's own, of
    whatever type it was written in.
    """
    return ConfigMeaning(config, table).value(key)


def written_value(config: Mapping[str, Any], key: str) -> Any:
    """A key as it is spelled, of a config of any family or none; None if it is not there."""
    return next((level[key] for level in _levels(config) if level.get(key) is not None), None)


def given_value(config: Mapping[str, Any], table: Architecture, key: str) -> Any:
    """What a config itself says about a canonical key, by whatever name; None if nothing."""
    found = ConfigMeaning(config, table).given(key)
    return None if found is _ABSENT else found


@dataclass
class ConfigMeaning:
    """A config read by a family's table; each key is computed once."""

    config: Mapping[str, Any]
    table: Architecture
    _known: dict[str, Any] = field(default_factory=dict)

    def value(self, key: str) -> Any:
        """As `config_value`."""
        if key not in self._known:
            # A key whose default leads back to itself has none there.
            self._known[key] = None
            self._known[key] = self._computed(self._entry(key))
        return self._known[key]

    def given(self, key: str) -> Any:
        """The value that is written in the config, maybe None, or a marker for absence."""
        written = [value for _, value in self.written(key)]
        return next((one for one in written if one is not None), *written[:1] or [_ABSENT])

    def written(self, key: str) -> list[tuple[str, Any]]:
        """Each place where the config has the key, likeliest first, and the value there."""
        return [
            (".".join(path), found)
            for path in self._entry(key).paths
            for level in _levels(self.config)
            if (found := _inside(level, path)) is not _ABSENT
        ]

    def is_given(self, key: str) -> bool:
        """Whether the config has the key under any of its names, null included."""
        return self.given(key) is not _ABSENT

    def _entry(self, key: str) -> ConfigKey:
        return self.table.config.get(key) or ConfigKey(key, ((key,),), "size")

    def _computed(self, entry: ConfigKey) -> Any:
        found = self.given(entry.name)
        if entry.kind == "mapping" and isinstance(found, Mapping):
            found = _cleaned(found, entry)
        if found is None and entry.when_null is not None:
            return self.first(entry.when_null)
        if found is not None and found is not _ABSENT:
            return found
        own = entry.by_type.get(str(self.config.get("model_type")))
        return self.first(own or entry.defaults)

    def first(self, defaults: tuple[Any, ...]) -> Any:
        """What the first of these defaults that can be computed is in this config."""
        values = (self._default(one) if isinstance(one, Derived) else one for one in defaults)
        return next((value for value in values if value is not None), None)

    def _default(self, default: Derived) -> Any:
        fields = default.fields
        if default.form == "expression":
            return self.computed(fields["text"])
        if default.form == "period":
            return _period(self.value(fields["period"]), fields["of"])
        written, layers = fields[default.form], self.value(self.table.layers)
        number = self.value(written) if isinstance(written, str) else written
        if not (is_whole(number) and is_whole(layers) and layers <= LARGEST_COUNT):
            return None
        words = (fields["else"], fields["is"])
        return [words[is_so] for is_so in _where(default.form, number, layers)]

    def computed(self, expression: str) -> float | int | None:
        """Sums of numbers and keys multiplied and divided from left to right; None if unknown.

        `a|b` is the first of several keys that is a number.
        """
        products = [self._product(product) for product in expression.split(" + ")]
        total = sum(product for product in products if product is not None)
        if None in products:
            return None
        return int(total) if total == int(total) else total

    def keys_of(self, expression: str) -> tuple[str, ...]:
        """The keys that an expression names."""
        words = [word for _, each in _WORD.findall(expression) for word in each.split("|")]
        return tuple(word for word in words if not word.isdecimal())

    def _product(self, product: str) -> float | int | None:
        total: float | int = 1
        for sign, words in _WORD.findall(product):
            operand = next(filter(_is_operand, map(self._operand, words.split("|"))), None)
            if operand is None or (sign == "/" and operand == 0):
                return None
            total = total / operand if sign == "/" else total * operand
        return total

    def _operand(self, word: str) -> Any:
        return int(word) if word.isdecimal() else self.value(word)


def _levels(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The config, and the `text_config` in which multimodal models nest the language model."""
    text = config.get("text_config")
    return (config, text) if isinstance(text, Mapping) else (config,)


def _inside(level: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = level
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return _ABSENT
        found = found[key]
    return found


def _cleaned(found: Mapping[str, Any], entry: ConfigKey) -> Mapping[str, Any] | None:
    """A mapping without the entries that are keys of their own; None if it means nothing."""
    if any(found.get(key) == word for key, word in entry.unless.items()):
        return None
    return {key: value for key, value in found.items() if key not in entry.without} or None


def _where(form: str, number: int, layers: int) -> list[bool]:
    """Of each layer, whether it is one of the first ones, or each so many-th."""
    if form == "first":
        return [layer < number for layer in range(layers)]
    return [number > 0 and (layer + 1) % number == 0 for layer in range(layers)]


def _period(words: Any, word: str) -> int | None:
    """After how many entries the word returns, again and again; None if it does not so."""
    if not isinstance(words, list) or word not in words:
        return None
    period = words.index(word) + 1
    regular = all((each == word) == (at % period == 0) for at, each in enumerate(words, 1))
    return period if regular else None


def is_whole(value: object) -> bool:
    """Whether a value is a whole number from 0; true and false are not."""
    return type(value) is int and value >= 0


def _is_operand(value: Any) -> bool:
    # Neither infinity nor what no float can hold.
    return type(value) in (int, float) and abs(value) < _LARGEST_OPERAND


@dataclass(frozen=True, slots=True)
class Counts:
    """Blocks of the language model, experts of a block (0: dense), MTP blocks after them."""

    layers: int
    experts: int
    mtp_layers: int


def read_counts(inventory: Inventory, table: Architecture) -> Counts:
    """The counts that a config tells.

    Raises: PolicyError if the number of layers is missing or a count is no plausible number.
    """
    meaning = ConfigMeaning(inventory.config, table)
    layers = _count(inventory, meaning, table.layers)
    if layers == 0 and meaning.value(table.layers) == 0:
        notes = ["it must be at least 1"]
        raise fail("bad-config-value", notes=notes, model=inventory.id, key=table.layers, value="0")
    if layers == 0:
        why = ", which tells the number of layers"
        raise fail("missing-config-key", model=inventory.id, key=table.layers, why=why)
    experts = _count(inventory, meaning, table.experts_key) if table.experts_key else 0
    mtp_layers = _count(inventory, meaning, table.mtp_layers) if table.mtp_layers else 0
    return Counts(layers, experts, mtp_layers)


def _count(inventory: Inventory, meaning: ConfigMeaning, key: str) -> int:
    value = meaning.value(key)
    if value is None:
        return 0
    # isinstance would let true and false pass.
    if not is_whole(value) or value > LARGEST_COUNT:
        # By the name that the config has for it.
        key = next((at for at, one in meaning.written(key) if one is not None), key)
        notes = [f"it must be a whole number of at most {LARGEST_COUNT:,}"]
        shown = repr(value)[:60]
        raise fail("bad-config-value", notes=notes, model=inventory.id, key=key, value=shown)
    return int(value)
