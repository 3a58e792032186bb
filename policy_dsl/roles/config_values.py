"""Whether the values of a config are of the kinds that sizes and readers need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import Inventory
from policy_dsl.roles.config_keys import ConfigKey
from policy_dsl.roles.config_meaning import ConfigMeaning, is_whole

# No model has a size or count beyond it; 32-bit integers of readers end there.
LARGEST_SIZE = 2**31 - 1
_LONGEST_VALUE = 60


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= LARGEST_SIZE
    return type(value) is float and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(value: Any, is_one: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_one, value))


def _is_token(value: Any) -> bool:
    # -1 is written for a token that there is not.
    return type(value) is int and -1 <= value <= LARGEST_SIZE


# kind -> (whether a value is of it, what the value must be)
_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "size": (lambda value: is_whole(value) and 1 <= value <= LARGEST_SIZE, "a whole number from 1"),
    "count": (lambda value: is_whole(value) and value <= LARGEST_SIZE, "a whole number from 0"),
    "number": (_is_number, "a number"),
    "positive": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "flag": (lambda value: type(value) is bool, "true or false"),
    "list": (lambda value: isinstance(value, list), "a list"),
    "numbers": (lambda value: _is_list_of(value, _is_number), "a list of numbers"),
    "texts": (lambda value: _is_list_of(value, _is_text), "a list of texts"),
    "mapping": (lambda value: isinstance(value, dict), "an object"),
    "text": (_is_text, "a text"),
    "tokens": (
        lambda value: _is_token(value) or _is_list_of(value, _is_token),
        "the number of a token, or a list of them",
    ),
    # Models of several parts have one for each.
    "dtype": (lambda value: isinstance(value, str | dict), "the name of a dtype"),
}
# What configs of all families have at their top or in `text_config`, if at all.
_AT_TOP = {
    "architectures": "texts",
    **dict.fromkeys(("text_config", "vision_config", "audio_config", "auto_map"), "mapping"),
    **dict.fromkeys(("quantization_config", "quantization", "compression_config"), "mapping"),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), "tokens"),
    **dict.fromkeys(("torch_dtype", "dtype"), "dtype"),
    "transformers_version": "text",
}


def config_findings(
    inventory: Inventory, meaning: ConfigMeaning, layers: int
) -> Iterator[Diagnostic]:
    """Values that sizes or readers need and that are not what they must be."""
    text = inventory.config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    for key, kind in _AT_TOP.items():
        yield from _kind_findings(inventory.id, key, inventory.config.get(key), kind)
        yield from _kind_findings(inventory.id, f"text_config.{key}", inner.get(key), kind)
    for entry in meaning.table.config.values():
        written = reversed(meaning.written(entry.name))
        # Of the same key at the top and in `text_config` the first counts that is not null.
        for place, value in {at: one for at, one in written if one is not None}.items():
            yield from _key_findings(inventory.id, place, value, entry, layers)
        most = meaning.computed(entry.at_most) if entry.at_most else None
        value = meaning.value(entry.name)
        # A limit of 0 is that of a model that uses neither.
        if most and is_whole(value) and value > most:
            yield bad_value(inventory.id, entry.name, value, f"it must be at most {most}")


def _key_findings(
    model_id: str, place: str, value: Any, entry: ConfigKey, layers: int
) -> Iterator[Diagnostic]:
    wrong = list(_kind_findings(model_id, place, value, entry.kind))
    yield from wrong
    if isinstance(value, list) and not wrong:
        yield from _list_findings(model_id, place, value, layers)
    for name, kind in entry.entries.items() if isinstance(value, Mapping) else ():
        yield from _kind_findings(model_id, f"{place}.{name}", value.get(name), kind)


def _kind_findings(model_id: str, place: str, value: Any, kind: str) -> Iterator[Diagnostic]:
    is_of_kind, wanted = _KINDS[kind]
    if value is not None and not is_of_kind(value):
        yield bad_value(model_id, place, value, f"it must be {wanted}")


def _list_findings(model_id: str, key: str, given: list[Any], layers: int) -> Iterator[Diagnostic]:
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
