"""What a configuration of either dialect tells readers of a module: its width, or nothing.

Source: vLLM 0.33.0 (`INCConfigParser`, `get_dynamic_override`), auto-round 0.16.1
(`get_layer_config`), gptqmodel 7.7.0 (`dynamic_get`), as far as they agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, NamedTuple

from emitters.gptq.auto_round import VERSIONS
from emitters.gptq.schemes import WIDTHS
from emitters.gptq.widths import AUTO_ROUND, GPTQ, Width
from policy_dsl.policy import WHOLE_ROW

_USUAL = "auto_round:auto_gptq"
_PLAIN_BITS = 16
_HEAD = "lm_head"


class Told(NamedTuple):
    """version: of the zero points. width(module): None if it is not quantized.

    covers: whether linears that are not quantized must be named.
    """

    version: str
    width: Callable[[str], Width | None]
    covers: bool


def read(config: Mapping[str, Any], names: Collection[str]) -> Told:
    """What a `quantization_config` tells of the modules of these names.

    Raises: ValueError, KeyError, TypeError or AttributeError for another format's, or for
    widths that this one does not have.
    """
    method, default = config["quant_method"], _width(config, None)
    if method == AUTO_ROUND:
        if config.get("data_type", "int") != "int":
            raise ValueError(f"its data_type is {config['data_type']!r}")
        version = VERSIONS[config.get("packing_format", _USUAL)]
        patterns = _patterns(config, names)
        return Told(version, partial(_auto_round, config, default, patterns), covers=True)
    if method != GPTQ:
        raise ValueError(f"its quant_method is {method!r}")
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    if version not in VERSIONS.values():
        raise ValueError(f"its checkpoint_format is {version!r}")
    return Told(version, partial(_gptq, config, default), covers=False)


def _patterns(
    config: Mapping[str, Any], names: Collection[str]
) -> list[tuple[re.Pattern[str], Mapping[str, Any]]]:
    """Rules by pattern: those that are no name of a module, in order."""
    entries = (config.get("extra_config") or {}).items()
    return [(_compiled(key), entry) for key, entry in entries if key not in names]


def _auto_round(
    config: Mapping[str, Any],
    default: Width,
    patterns: list[tuple[re.Pattern[str], Mapping[str, Any]]],
    name: str,
) -> Width | None:
    entry = (config.get("extra_config") or {}).get(name)
    if entry is None:
        found = (entry for pattern, entry in patterns if pattern.search(name))
        entry = next(found, None)
    if entry is not None:
        return _narrowed(entry, default)
    covered = config.get("block_name_to_quantize", config.get("to_quant_block_names"))
    if not covered:
        return None if name.endswith(_HEAD) else default
    prefixes = covered.split(",") if isinstance(covered, str) else covered
    return default if name.startswith(tuple(prefixes)) else None


def _gptq(config: Mapping[str, Any], default: Width, name: str) -> Width | None:
    if name.endswith(_HEAD) and not config.get("lm_head"):
        return None
    for key, entry in (config.get("dynamic") or {}).items():
        if _compiled(key[2:] if key[:2] in ("+:", "-:") else key).match(name):
            return None if key.startswith("-:") else _narrowed(entry, default)
    listed = _flat(config.get("modules_in_block_to_quantize") or [])
    if listed and not name.endswith(_HEAD) and not any(one in name for one in listed):
        return None
    return default


def _narrowed(entry: Mapping[str, Any], default: Width) -> Width | None:
    if entry.get("bits", default.bits) >= _PLAIN_BITS:
        return None
    return _width(entry, default)


def _width(entry: Mapping[str, Any], default: Width | None) -> Width:
    """The width in an entry, its gaps filled by the default. Raises: ValueError, KeyError."""
    given = {"sym": True} if default is None else _named(default)
    given |= {key: entry[key] for key in ("bits", "group_size", "sym") if key in entry}
    bits, size, symmetric = given["bits"], given["group_size"], given["sym"]
    if type(bits) is not int or bits not in WIDTHS:
        raise ValueError(f"bits {bits!r} are none of {', '.join(map(str, sorted(WIDTHS)))}")
    if type(size) is not int or (size < 1 and size != WHOLE_ROW):
        raise ValueError(f"group_size {size!r} is no number of values")
    if type(symmetric) is not bool:
        raise ValueError(f"sym {symmetric!r} is neither true nor false")
    return Width(bits, size, symmetric)


def _named(width: Width) -> dict[str, Any]:
    return {"bits": width.bits, "group_size": width.group_size, "sym": width.symmetric}


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no pattern: {error}") from None


def _flat(listed: Any) -> list[str]:
    return [one for item in listed for one in (item if isinstance(item, list) else [item])]
