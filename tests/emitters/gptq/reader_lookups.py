"""How readers find the width of a module in a configuration, one function for each reader.

Written from what the readers do, not from the code that writes for them. A width is (bits,
group size, symmetric), None a module that stays plain.
Source: vLLM 0.33.0 (`INCConfigParser`, `INCConfig.get_quant_method`, `get_dynamic_override`,
`is_layer_gptq_quantized`), auto-round 0.16.1 (`get_layer_config`), gptqmodel 7.7.0
(`dynamic_get`); compared with the first by running both on the same configurations.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

Width = tuple[int, int, bool] | None
Config = Mapping[str, Any]
_SPECIAL = set(r"*+?^$()[]{}|\\")


def by_auto_round(config: Config, name: str, linears: Collection[str]) -> Width:
    """AutoRound: the linear's own entry, else the first pattern that is found in its name."""
    if config["quant_method"] == "gptq":
        entries: dict[str, Any] = {}
        for key, entry in config.get("dynamic", {}).items():
            entries[key[2:]] = {"bits": 16} if key.startswith("-:") else entry
    else:
        entries = config.get("extra_config", {})
    entry = entries.get(name)
    if entry is None:
        patterns = (key for key in entries if key not in linears)
        entry = next((entries[key] for key in patterns if re.search(key, name)), None)
    prefixes = tuple(config.get("block_name_to_quantize", "model.layers").split(","))
    if entry is None and not name.startswith(prefixes):
        return None
    return _plain_or(config, entry or {})


def by_gptqmodel(config: Config, name: str) -> Width:
    """GPTQModel: lm_head by its flag, then the first rule that matches the name's start."""
    if name == "lm_head" and not config["lm_head"]:
        return None
    for key, entry in config.get("dynamic", {}).items():
        if re.match(key.removeprefix("+:").removeprefix("-:"), name):
            return None if key.startswith("-:") else _plain_or(config, entry)
    return _plain_or(config, {})


def by_vllm(config: Config, name: str, joined: Mapping[str, Collection[str]]) -> Width:
    """vLLM, dialect auto-round. joined: its name for joined projections -> their own.

    Raises: ValueError if joined projections have several widths.
    """
    entries, default = config.get("extra_config", {}), _plain_or(config, {})
    # Looked for first, and what has no bits counts as plain.
    if name in entries and entries[name].get("bits", 16) >= 16:
        return None
    if name in entries:
        return _plain_or(config, entries[name])
    for key in entries:
        if name.endswith(f".{key}"):
            return _plain_or(config, entries[key])
    covered = name.startswith(tuple(config["block_name_to_quantize"].split(",")))

    def find(one: str) -> Width:
        if one in entries:
            return _plain_or(config, entries[one])
        for key, entry in entries.items():
            if set(key) & _SPECIAL and re.search(key, one):
                return _plain_or(config, entry)
        return default if covered else None

    for word, members in joined.items():
        if name.count(word) == 1:
            names = [name.replace(word, member) for member in members]
            listed = [
                one
                for one in names
                for key in entries
                if key == one or (set(key) & _SPECIAL and re.search(key, one))
            ]
            if listed:
                widths = {find(one) for one in names}
                if len(widths) > 1:
                    raise ValueError(f"{name} has several widths")
                return widths.pop()
    return find(name)


def by_vllm_gptq(
    config: Config, name: str, joined: Mapping[str, Collection[str]], packed: Collection[str]
) -> Width:
    """vLLM, dialect gptq. packed: modules whose tensors are no floats, from the headers.

    Raises: ValueError if joined projections are partly packed.
    """
    for key, entry in config.get("dynamic", {}).items():
        if re.match(key.removeprefix("+:").removeprefix("-:"), name):
            found = None if key.startswith("-:") else _plain_or(config, entry)
            break
    else:
        found = _plain_or(config, {})
    if name.endswith(".experts"):
        return found
    if name == "lm_head" and not config["lm_head"]:
        return None
    parent, _, last = name.rpartition(".")
    names = [f"{parent}.{member}" for member in joined.get(last, ())] or [name]
    there = {any(one in each for one in packed) for each in names}
    if len(there) > 1:
        raise ValueError(f"{name} is partly packed")
    return found if there.pop() else None


def _plain_or(config: Config, entry: Mapping[str, Any]) -> Width:
    filled = {**{key: config[key] for key in ("bits", "group_size", "sym")}, **entry}
    if filled["bits"] >= 16:
        return None
    return filled["bits"], filled["group_size"], filled["sym"]
