"""What a config and its family's table expect of a model: which tensors, of which shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from policy_dsl.roles.architecture import Architecture
from policy_dsl.roles.config_keys import Derived
from policy_dsl.roles.config_meaning import ConfigMeaning, is_whole
from policy_dsl.roles.needs import ALWAYS, Clause, Need, clauses

_NEVER = "never"
_LONGEST_VALUE = 60


class Expectation:
    """The needs of a family, in the sizes and layers of one config."""

    def __init__(self, config: Mapping[str, Any], table: Architecture) -> None:
        self.table = table
        self.meaning = ConfigMeaning(config, table)
        self.shapes = {need: self._shape(need) for need in table.needs.values()}

    def holds(self, need: Need, layer: int | None) -> bool:
        """Whether the config says that a layer has it."""
        return self._all(need.when, -1 if layer is None else layer)

    def reason(self, need: Need, layer: int | None) -> str:
        """What the config says that decides whether a layer has it; empty if nothing does."""
        at = -1 if layer is None else layer
        said = list(self._deciding(need.when, at))
        # Of `experts, and from this layer on`, the layer explains what one layer lacks; and
        # what is written explains more than what is not.
        said = [clause for clause in said if clause.form] or said
        said = [one for one in said if self.meaning.is_given(self._root(one.key))] or said
        return " and ".join(dict.fromkeys(self._said(clause, at) for clause in said))

    def absent_keys(self, size: str) -> tuple[str, ...]:
        """The keys that decide a size and that the config leaves out."""
        keys = (one for key in self.meaning.keys_of(size) for one in self._absent(key))
        return tuple(dict.fromkeys(keys))

    def _shape(self, need: Need) -> tuple[int, ...] | None:
        sizes = [self.meaning.computed(size) for size in need.shape]
        return tuple(sizes) if all(map(is_whole, sizes)) else None  # type: ignore[arg-type]

    def _absent(self, key: str) -> Iterator[str]:
        if self.meaning.is_given(key):
            return
        sizes = [one.fields["text"] for one in self._derived(key) if one.form == "expression"]
        deciding = tuple(one for size in sizes for one in self.absent_keys(size))
        yield from deciding or (key,)

    def _derived(self, key: str) -> list[Derived]:
        entry = self.table.config.get(key)
        return [one for one in entry.defaults if isinstance(one, Derived)] if entry else []

    def _all(self, condition: str, layer: int) -> bool:
        return all(self._is(one, layer) != one.negated for one in clauses(condition))

    def _is(self, clause: Clause, layer: int) -> bool:
        if clause.key in (ALWAYS, _NEVER):
            return clause.key == ALWAYS
        if clause.key in self.table.where:
            return self._all(self.table.where[clause.key], layer)
        value = self.meaning.value(clause.key)
        if clause.form == "in":
            return isinstance(value, list) and layer in value
        if clause.form == "is":
            return bool(_at(value, self._listed(layer)) == clause.word)
        if not clause.form:
            return value not in (None, False, 0)
        return is_whole(value) and _counts(clause.form, layer, value)

    def _listed(self, layer: int) -> int:
        """The layer as lists of the config count it: an MTP block is one like the last."""
        layers = self.meaning.value(self.table.layers)
        return min(layer, layers - 1) if is_whole(layers) else layer

    def _deciding(self, condition: str, layer: int) -> Iterator[Clause]:
        """The clauses about the config that decide a condition: those that fail, or all."""
        parts = clauses(condition)
        failing = [one for one in parts if self._is(one, layer) == one.negated]
        for clause in failing or parts:
            if clause.key in self.table.where:
                yield from self._deciding(self.table.where[clause.key], layer)
            elif clause.key not in (ALWAYS, _NEVER):
                yield clause

    def _said(self, clause: Clause, layer: int) -> str:
        key = self._root(clause.key)
        value = self.meaning.value(key)
        if clause.form == "is" and isinstance(value, list):
            return f"{key} says {json.dumps(_at(value, self._listed(layer)))} there"
        shown = json.dumps(value)[:_LONGEST_VALUE]
        if self.meaning.is_given(key):
            is_null = self.meaning.given(key) is None and value is not None
            return f"{key} is null, which means {shown}" if is_null else f"{key} is {shown}"
        return f"the config has no {key}, which means {shown}"

    def _root(self, key: str) -> str:
        """The key that decides: of one that the config leaves out, what its default is of."""
        for default in () if self.meaning.is_given(key) else self._derived(key):
            deciding = default.fields.get(default.form)
            if default.form in ("first", "every") and isinstance(deciding, str):
                return self._root(deciding)
        return key


def _counts(form: str, layer: int, number: int) -> bool:
    if form == "from":
        return layer >= number
    return number > 0 and (layer + (form == "every")) % number == 0


def _at(value: Any, layer: int) -> Any:
    if not isinstance(value, list):
        return value
    return value[layer] if 0 <= layer < len(value) else None
