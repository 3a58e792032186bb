"""How many layers and experts a config says its model has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policy_dsl.diagnostics import fail
from policy_dsl.inventory import Inventory
from policy_dsl.roles.architecture import Architecture

# A config that asks for more is no model, and would only cost memory.
_LARGEST_COUNT = 65536


@dataclass(frozen=True, slots=True)
class Counts:
    """Blocks of the language model, experts of a block (0: dense), MTP blocks after them."""

    layers: int
    experts: int
    mtp_layers: int


def config_value(config: Mapping[str, Any], key: str) -> Any:
    """A key of the config, or of its `text_config` as multimodal models nest it; else None."""
    text = config.get("text_config")
    found = config.get(key)
    return text.get(key) if found is None and isinstance(text, Mapping) else found


def read_counts(inventory: Inventory, table: Architecture) -> Counts:
    """The counts that the family's keys have in the config.

    Raises: PolicyError if the number of layers is missing or a count is no plausible number.
    """
    layers = _count(inventory, table.layers)
    if layers == 0:
        why = ", which tells the number of layers"
        raise fail("missing-config-key", model=inventory.id, key=table.layers, why=why)
    experts = (_count(inventory, key) for key in table.experts)
    mtp_layers = _count(inventory, table.mtp_layers) if table.mtp_layers else 0
    return Counts(layers, next(filter(None, experts), 0), mtp_layers)


def _count(inventory: Inventory, key: str) -> int:
    value = config_value(inventory.config, key)
    if value is None:
        return 0
    # isinstance would let true and false pass.
    if type(value) is not int or not 0 <= value <= _LARGEST_COUNT:
        raise fail("bad-config-value", model=inventory.id, key=key, value=repr(value)[:60])
    return value
