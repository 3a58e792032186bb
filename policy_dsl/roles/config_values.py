"""Whether the values of a config are of the kinds that sizes and readers need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import Inventory
from policy_dsl.roles.config_meaning import ConfigMeaning, is_whole

# No model has a size or count beyond it; 32-bit integers of readers end there.
LARGEST_SIZE = 2**31 - 1
_LONGEST_VALUE = 60


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= LARGEST_SIZE
    return type(value) is float and math.isfinite(value)


# kind -> (whether a value is of it, what the value must be)
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "size": (
        lambda value: is_whole(value) and 1 <= value <= LARGEST_SIZE,
        "a whole number from 1",
    ),
    "count": (
        lambda value: is_whole(value) and value <= LARGEST_SIZE,
        "a whole number from 0",
    ),
    "number": (_is_number, "a number"),
    "flag": (lambda value: type(value) is bool, "true or false"),
    "list": (lambda value: isinstance(value, list), "a list"),
    "mapping": (lambda value: isinstance(value, dict), "an object"),
    "text": (lambda value: isinstance(value, str), "a text"),
}


def config_findings(
    inventory: Inventory, meaning: ConfigMeaning, layers: int
) -> Iterator[Diagnostic]:
    """Values that sizes or readers need and that are not what they must be."""
    for key, entry in meaning.table.config.items():
        given = meaning.given(key) if meaning.is_given(key) else None
        is_of_kind, wanted = _KINDS[entry.kind]
        if given is not None and not is_of_kind(given):
            yield bad_value(inventory.id, key, given, f"it must be {wanted}")
        elif isinstance(given, list):
            yield from _list_findings(inventory.id, key, given, layers)


def _list_findings(
    model_id: str, key: str, given: list[Any], layers: int
) -> Iterator[Diagnostic]:
    """What is wrong with a list of layers' numbers, or of a word for each layer."""
    if all(isinstance(word, str) for word in given) and given:
        if len(given) != layers:
            reason = f"it has {len(given)} entries, and there are {layers} layers"
            yield bad_value(model_id, key, given, reason)
    elif not all(is_whole(number) for number in given):
        yield bad_value(model_id, key, given, "its entries must be numbers of layers")


def bad_value(model_id: str, key: str, value: Any, reason: str) -> Diagnostic:
    """The finding about a value that a key cannot have."""
    shown = repr(value)[:_LONGEST_VALUE]
    return diagnostic("bad-config-value", notes=[reason], model=model_id, key=key, value=shown)
