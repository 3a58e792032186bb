"""What a configuration of either dialect says to readers about a module: its width, or nothing.

Source: vLLM 0.33.0 (`INCConfigParser`, `get_dynamic_override`), auto-round 0.16.1
(`get_layer_config`), gptqmodel 7.7.0 (`dynamic_get`), as far as they agree; and where the last
two look for a configuration, read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from emitters.checkpoints import CONFIG, document, uneven_experts, wrong_metadata, wrong_tensor
from emitters.gptq.config import PACKING_FORMATS
from emitters.gptq.rule_patterns import Rule, Verdicts
from emitters.gptq.spec import AUTO_ROUND, GPTQ, READ, SIDECARS, WIDTHS, Storage, Width
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import (
    Claim,
    FileContents,
    ForeignMetadataError,
    Forms,
    TensorForm,
    Tensors,
    UnreadError,
)
from policy_dsl.roles.architecture import architecture, families
from policy_dsl.roles.config_facts import written_value
from policy_dsl.treatments import WHOLE_ROW, Coded, Unread

_Entry = Mapping[str, Any]
_Said = Width | Unread | None

_QUANTIZATION = "quantization_config"
_CODES = ".qweight"
_PARTS = frozenset({"qweight", "qzeros", "scales"})
_WORD_BITS = 32
_PROJECTION = re.compile(r".*(?:_proj|\.w[123])")
_USUAL = "auto_round:auto_gptq"
_PLAIN_BITS = 16
_HEAD = "lm_head"
_NOT = "-:"
_SIGNS = ("+:", _NOT)
# More values than any row has: a number of this size in a config is a mistake.
_LARGEST_GROUP = 2**20
# A name of a list is looked for in the name of a module so often.
_MOST_LOOKS = 5 * 10**7
# What the copy must say too; the rest is notes about how it was made.
_SHARED = (
    *("bits", "group_size", "sym", "desc_act", "lm_head", "dynamic", "checkpoint_format"),
    *("packing_format", "block_name_to_quantize", "extra_config"),
)


class _Description(NamedTuple):
    """What a configuration says. version: of the zero points. width(module): None if plain.

    covers: whether linears that are not quantized must be named. act_order: whether groups may
    be of any columns, where they are numbered.
    """

    version: str
    width: Callable[[str], _Said]
    covers: bool
    act_order: bool = False


def claims(files: FileContents, forms: Forms) -> dict[str, Claim]:
    """What readers understand of these files: packed module -> scheme, width, shape.

    Linears that they take for packed and that are not are among them, without a shape.
    Raises: ValueError without a config, or if it is another format's.
    """
    described = _quantization(files)
    if described is None:
        return {}
    asked = [name for name, parts in forms.items() if _may_be_packed(name, parts)]
    try:
        if not isinstance(described, Mapping):
            raise ValueError(f"its {_QUANTIZATION} is not an object")
        method = described.get("quant_method")
        if method not in (AUTO_ROUND, GPTQ):
            raise ValueError(f"its quant_method is {method!r}")
        default = _width(described, None)
        if method == AUTO_ROUND:
            description = _auto_round(described, default, forms.keys(), asked)
        else:
            description = _gptq(described, default, asked)
    except ValueError as error:
        if isinstance(described, Mapping) and described.get("quant_method") in [*SIDECARS]:
            raise UnreadError(str(error)) from None
        raise
    made = {name: _claim(description, name, forms[name]) for name in asked}
    return {name: claim for name, claim in made.items() if claim is not None}


def _quantization(files: FileContents) -> Any:
    """What `quantization_config` says, or the sidecar of a tool that writes none; else None."""
    if (held := _described(document(files, CONFIG))) is not None:
        return held
    for dialect, file in SIDECARS.items():
        copy = document(files, file) if file in files else {}
        # Older releases of AutoGPTQ do not say who they are.
        if "bits" in copy:
            return {"quant_method": dialect, **copy}
    return None


def _described(config: Mapping[str, Any]) -> Any:
    """The `quantization_config` of a config, or of its text part."""
    levels = (level for level in (config, config.get("text_config")) if isinstance(level, Mapping))
    held = (level.get(_QUANTIZATION) for level in levels)
    return next((one for one in held if one is not None), None)


def _may_be_packed(name: str, parts: Collection[str]) -> bool:
    """Whether readers look for the width of a module; scales without codes were packed once."""
    linear = "weight" in parts and bool(_PROJECTION.fullmatch(name))
    return linear or not _PARTS.isdisjoint(parts)


def _claim(said: _Description, name: str, parts: Mapping[str, TensorForm]) -> Claim | None:
    width = said.width(name) if said.covers or not _PARTS.isdisjoint(parts) else None
    if width is None:
        return None
    if isinstance(width, Unread):
        return Claim(width, (), "")
    numbered = "g_idx" in parts
    stored = Storage(said.version, numbered, numbered and said.act_order)
    scheme = next(scheme for scheme, storage in READ.items() if storage == stored)
    words = parts["qweight"][1] if "qweight" in parts else ()
    # No words are a matrix of any size.
    known = len(words) == 2 and 0 not in words
    shape = (words[1], words[0] * _WORD_BITS // width.bits) if known else ()
    return Claim(Coded(scheme, *width, ""), shape, parts.get("scales", ("F16",))[0])


def _auto_round(
    config: _Entry, default: Width, names: Collection[str], asked: Collection[str]
) -> _Description:
    kind, packing = config.get("data_type", "int"), config.get("packing_format", _USUAL)
    if kind != "int":
        raise ValueError(f"its data_type is {kind!r}")
    if packing not in [*PACKING_FORMATS]:
        raise ValueError(f"its packing_format is {packing!r}")
    entries = _entries(config, "extra_config")
    # Named are modules; all other names are patterns, in their order.
    rules = [_rule(name, entry) for name, entry in entries.items() if name not in names]
    verdicts = Verdicts(rules, asked, "anywhere", lambda rule: _narrowed(rule.entry, default))
    keys = "block_name_to_quantize", "to_quant_block_names"
    texts = _texts(config, next((key for key in keys if key in config), keys[0]))
    # What the names of packed modules begin with; empty if nothing is said.
    covered = tuple(part for text in texts for part in text.split(",") if part)
    _ensure_few(covered, asked)

    def width(name: str) -> _Said:
        if name in entries:
            return _narrowed(entries[name], default)
        is_packed = name.startswith(covered) if covered else not name.endswith(_HEAD)
        return verdicts.of(name, default if is_packed else None)

    return _Description(PACKING_FORMATS[packing], width, covers=True)


def _gptq(config: _Entry, default: Width, asked: Collection[str]) -> _Description:
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    if version not in [*PACKING_FORMATS.values()]:
        raise ValueError(f"its checkpoint_format is {version!r}")
    listed = _texts(config, "modules_in_block_to_quantize")
    _ensure_few(listed, asked)
    rules = [_rule(name, entry) for name, entry in _entries(config, "dynamic").items()]

    def said(rule: Rule) -> Width | None:
        return None if rule.sign == _NOT else _narrowed(rule.entry, default)

    verdicts = Verdicts(rules, asked, "start", said)

    def width(name: str) -> _Said:
        is_head = name.endswith(_HEAD)
        if is_head and not config.get("lm_head"):
            return None
        is_packed = not listed or is_head or any(text in name for text in listed)
        return verdicts.of(name, default if is_packed else None)

    acts = any(entry.get("desc_act") is True for entry in (config, *(one.entry for one in rules)))
    return _Description(version, width, covers=False, act_order=acts)


def _entries(config: _Entry, key: str) -> Mapping[str, _Entry]:
    """What differs, by names of modules and patterns. Raises: ValueError."""
    entries = config.get(key) or {}
    if not isinstance(entries, Mapping):
        raise ValueError(f"its {key} is not an object")
    for name, entry in entries.items():
        if not isinstance(entry, Mapping):
            raise ValueError(f"its {key} has no object for {name!r}")
    return entries


def _rule(name: str, entry: _Entry) -> Rule:
    sign = name[:2] if name[:2] in _SIGNS else ""
    return Rule(sign, name[len(sign) :], entry)


def _ensure_few(texts: Sequence[str], asked: Collection[str]) -> None:
    """Raises: ValueError if it takes long to look for each text in each name."""
    if len(texts) * len(asked) > _MOST_LOOKS:
        raise ValueError(f"it lists {len(texts):,} names for {len(asked):,} modules, too many")


def _narrowed(entry: _Entry, default: Width) -> Width | None:
    bits = entry.get("bits", default.bits)
    is_plain = isinstance(bits, int | float) and bits >= _PLAIN_BITS
    return None if is_plain else _width(entry, default)


def _width(entry: _Entry, default: Width | None) -> Width:
    """The width in an entry, its gaps filled by the default. Raises: ValueError."""
    usual: _Entry = {"sym": True} if default is None else default.entry()
    bits, size, symmetric = (
        entry.get(key, usual.get(key)) for key in ("bits", "group_size", "sym")
    )
    if type(bits) is not int or bits not in WIDTHS:
        raise ValueError(f"bits {bits!r} are none of {', '.join(map(str, sorted(WIDTHS)))}")
    if type(size) is not int or (not 1 <= size <= _LARGEST_GROUP and size != WHOLE_ROW):
        raise ValueError(f"group_size {size!r} is not a number of values")
    if type(symmetric) is not bool:
        raise ValueError(f"sym {symmetric!r} is neither true nor false")
    return Width(bits, size, symmetric)


def _texts(config: _Entry, key: str) -> list[str]:
    """The texts of an entry, which may be one, a list, or lists in a list."""
    entry = config.get(key) or []
    outer = entry if isinstance(entry, list) else [entry]
    texts = [text for item in outer for text in (item if isinstance(item, list) else [item])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"its {key} is not a list of names")
    return texts


def _expert_keys() -> Iterator[str]:
    """The names under which configs of any family may say how many experts a layer has."""
    for family in families():
        yield from architecture(family).experts


def defects(
    folder: Path, files: FileContents, tensors: Tensors, claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """What readers would miss, or read without a word of complaint.

    claims: of every packed module, found to be right.
    """
    config = document(files, CONFIG)
    for file in reversed(SIDECARS.values()):
        if file in files:
            yield from _copy_defects(files, file, _described(config))
    count = next(filter(None, (written_value(config, key) for key in _expert_keys())), None)
    if count is not None:
        yield from uneven_experts(claims, count)
    for name, tensor in tensors.items():
        # Codes that readers take for nothing they know, and leave the linear random.
        if name.endswith(_CODES) and name.removesuffix(_CODES) not in claims:
            reason = f"{CONFIG} says that its module is not quantized"
            yield wrong_tensor(tensor.file or "", name, reason)


def _copy_defects(files: FileContents, file: str, described: Any) -> Iterator[Diagnostic]:
    if described is None:
        reason = f"only {file} describes the packed weights; most readers look here"
        yield diagnostic("metadata-elsewhere", file=CONFIG, reason=reason)
        return
    try:
        copy = document(files, file)
    except ForeignMetadataError:
        yield wrong_metadata(file, "it is not a JSON object, and some readers look there first")
        return
    wrong = [key for key in _SHARED if copy.get(key) != described.get(key)]
    if wrong:
        reason = f"its {wrong[0]} differs from that in {CONFIG}, and readers look at either"
        yield wrong_metadata(file, reason)
