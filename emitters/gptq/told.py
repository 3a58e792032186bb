"""What a configuration of either dialect tells readers of a module: its width, or nothing.

Source: vLLM 0.33.0 (`INCConfigParser`, `get_dynamic_override`), auto-round 0.16.1
(`get_layer_config`), gptqmodel 7.7.0 (`dynamic_get`), as far as they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from emitters.gptq.auto_round import VERSIONS
from emitters.gptq.rule_patterns import Rule, Unknown, Verdicts
from emitters.gptq.schemes import WIDTHS
from emitters.gptq.widths import AUTO_ROUND, GPTQ, Width
from policy_dsl.treatments import WHOLE_ROW

_Entry = Mapping[str, Any]

_USUAL = "auto_round:auto_gptq"
_PLAIN_BITS = 16
_HEAD = "lm_head"
_NOT = "-:"
_SIGNS = ("+:", _NOT)
# More values than any row has: a number of this size in a config is a mistake.
_LARGEST_GROUP = 2**20
# A name of a list is looked for in the name of a module so often.
_MOST_LOOKS = 5 * 10**7


class Told(NamedTuple):
    """version: of the zero points. width(module): None if it is not quantized; of `asked` ones.

    covers: whether linears that are not quantized must be named. act_order: whether groups may
    be of any columns, where they are numbered.
    """

    version: str
    width: Callable[[str], Width | Unknown | None]
    covers: bool
    act_order: bool = False


def read(config: Any, names: Collection[str], asked: Collection[str]) -> Told:
    """What a `quantization_config` tells of modules. names: of all; asked: in question.

    Raises: ValueError for another format's, for widths that this one does not have, or if its
    patterns take too long.
    """
    if not isinstance(config, Mapping):
        raise ValueError("its quantization_config is no object")
    method = config.get("quant_method")
    if method not in (AUTO_ROUND, GPTQ):
        raise ValueError(f"its quant_method is {method!r}")
    default = _width(config, None)
    if method == AUTO_ROUND:
        kind = config.get("data_type", "int")
        if kind != "int":
            raise ValueError(f"its data_type is {kind!r}")
        packing = config.get("packing_format", _USUAL)
        if packing not in [*VERSIONS]:
            raise ValueError(f"its packing_format is {packing!r}")
        exact, patterns = _rules_of(config, "extra_config", names)
        verdicts = Verdicts(
            patterns, asked, "anywhere", lambda rule: _narrowed(rule.entry, default)
        )
        covered = _covered(config)
        _ensure_few(covered, asked)
        width = partial(_auto_round, default, exact, verdicts, covered)
        return Told(VERSIONS[packing], width, covers=True)
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    if version not in [*VERSIONS.values()]:
        raise ValueError(f"its checkpoint_format is {version!r}")
    listed = _texts(config, "modules_in_block_to_quantize")
    _ensure_few(listed, asked)
    _, patterns = _rules_of(config, "dynamic")
    verdicts = Verdicts(patterns, asked, "start", partial(_said, default))
    width = partial(_gptq, default, verdicts, listed, bool(config.get("lm_head")))
    entries = [config, *(rule.entry for rule in patterns)]
    acts = any(entry.get("desc_act") is True for entry in entries)
    return Told(version, width, covers=False, act_order=acts)


def _rules_of(
    config: Mapping[str, Any], key: str, names: Collection[str] = ()
) -> tuple[Mapping[str, _Entry], Sequence[Rule]]:
    """What differs by the name of a module, and by patterns: the others, in their order.

    Raises: ValueError if they are no rules.
    """
    entries = config.get(key) or {}
    if not isinstance(entries, Mapping):
        raise ValueError(f"its {key} is no object")
    exact, patterns = {}, []
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"its {key} has no object for {name!r}")
        if name in names:
            exact[name] = entry
        else:
            sign, text = (name[:2], name[2:]) if name[:2] in _SIGNS else ("", name)
            patterns.append(Rule(sign, text, entry))
    return exact, patterns


def _covered(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names of packed modules begin with, empty if nothing is said."""
    keys = "block_name_to_quantize", "to_quant_block_names"
    told = _texts(config, next((key for key in keys if key in config), keys[0]))
    return tuple(one for text in told for one in text.split(",") if one)


def _ensure_few(texts: Sequence[str], asked: Collection[str]) -> None:
    """Raises: ValueError if it takes long to look for each text in each name."""
    if len(texts) * len(asked) > _MOST_LOOKS:
        raise ValueError(f"it lists {len(texts):,} names for {len(asked):,} modules, too many")


def _auto_round(
    default: Width,
    exact: Mapping[str, _Entry],
    verdicts: Verdicts,
    covered: tuple[str, ...],
    name: str,
) -> Width | Unknown | None:
    if name in exact:
        return _narrowed(exact[name], default)
    is_packed = name.startswith(covered) if covered else not name.endswith(_HEAD)
    return verdicts.of(name, default if is_packed else None)


def _gptq(
    default: Width, verdicts: Verdicts, listed: Sequence[str], packs_head: bool, name: str
) -> Width | Unknown | None:
    is_head = name.endswith(_HEAD)
    if is_head and not packs_head:
        return None
    is_packed = not listed or is_head or any(one in name for one in listed)
    return verdicts.of(name, default if is_packed else None)


def _said(default: Width, rule: Rule) -> Width | None:
    return None if rule.sign == _NOT else _narrowed(rule.entry, default)


def _narrowed(entry: _Entry, default: Width) -> Width | None:
    bits = entry.get("bits", default.bits)
    is_plain = isinstance(bits, int | float) and bits >= _PLAIN_BITS
    return None if is_plain else _width(entry, default)


def _width(entry: _Entry, default: Width | None) -> Width:
    """The width in an entry, its gaps filled by the default. Raises: ValueError."""
    given = {"sym": True} if default is None else _named(default)
    given |= {key: entry[key] for key in ("bits", "group_size", "sym") if key in entry}
    bits, size, symmetric = (given.get(key) for key in ("bits", "group_size", "sym"))
    if type(bits) is not int or bits not in WIDTHS:
        raise ValueError(f"bits {bits!r} are none of {', '.join(map(str, sorted(WIDTHS)))}")
    if type(size) is not int or (not 1 <= size <= _LARGEST_GROUP and size != WHOLE_ROW):
        raise ValueError(f"group_size {size!r} is no number of values")
    if type(symmetric) is not bool:
        raise ValueError(f"sym {symmetric!r} is neither true nor false")
    return Width(bits, size, symmetric)


def _named(width: Width) -> dict[str, Any]:
    return {"bits": width.bits, "group_size": width.group_size, "sym": width.symmetric}


def _texts(config: Mapping[str, Any], key: str) -> list[str]:
    """The texts of an entry, which may be one, a list, or lists in a list."""
    told = config.get(key) or []
    outer = told if isinstance(told, list) else [told]
    texts = [one for item in outer for one in (item if isinstance(item, list) else [item])]
    if not all(isinstance(one, str) for one in texts):
        raise ValueError(f"its {key} is no list of names")
    return texts
