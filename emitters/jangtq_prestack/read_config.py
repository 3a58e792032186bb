"""What the files of a JANGTQ bundle say to readers, and what readers stumble over in them.

Source: jang 2.5.50, its converter for MiniMax, `load_jangtq` and `verify_jangtq_prestacked`;
osaurus-ai/vmlx-swift at b298324c (read).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from emitters.checkpoints import CONFIG, document, uneven_experts, wrong_metadata
from emitters.jangtq_prestack.side_files import SIDECAR
from emitters.jangtq_prestack.spec import JANG_CONFIG, MXTQ, PROJECTIONS, SEED, SPEC, projection_of
from policy_dsl.diagnostics import Diagnostic, fail
from policy_dsl.formats import Claim, Claims, FileContents, Forms, TensorForm, Tensors
from policy_dsl.roles.model import expert_of
from policy_dsl.treatments import Coded

_MXTQ_PARTS = {"tq_packed", "tq_norms", "tq_bits"}
_GROUP_PARTS = {"scales", "biases"}
# A cache that engines write for themselves; in a bundle it would hide the bundle's own stacks.
_CACHES = ("jangtq_stacked.safetensors", "jangtq_stacked.json")
_SHARDS = "model-*.safetensors"
# Tensors beside the stacks that have an entry for every expert.
_BY_EXPERT = frozenset({"gate", "e_score_correction_bias"})
_MXTQ, _AFFINE = SPEC.schemes
# Of these keys readers go by the first that is there and not 0.
COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "n_routed")
_INNER = ("moe_intermediate_size", "intermediate_size")
TEXT = "text_config"
# The width of expert codes: for all, by projection, or not stated.
Routed = int | Mapping[str, int] | None


class _Widths(NamedTuple):
    """The widths that a bundle's files state; and its config, flat.

    affine: of affine modules that `modules` lacks, of 0 bits if that is not stated.
    """

    config: Mapping[str, Any]
    routed: Routed
    affine: Coded
    modules: Mapping[str, Coded]


def claims(files: FileContents, forms: Forms) -> dict[str, Claim]:
    """What jang's readers understand of these files: quantized module -> scheme, width, shape.

    Modules that lack a part are among them, with the shape that the others show.
    Raises: ValueError if the files are not those of a JANGTQ bundle; PolicyError if
    config.json says that they are, and they are broken or of another seed.
    """
    known = document(files, CONFIG)
    marked = known.get("weight_format") == "mxtq"
    try:
        jang = _jang_config(files)
        if not marked and jang.get("weight_format") != "mxtq":
            raise ValueError("weight_format is not mxtq")
        if jang.get("mxtq_seed", SEED) != SEED:
            raise ValueError(f"mxtq_seed is {jang['mxtq_seed']!r}, and only {SEED} is known")
        widths = _read_widths(known, jang)
        claimed = {path: _claim(path, parts, widths) for path, parts in forms.items()}
    except ValueError as error:
        # No other format may make something of what this one's mark is on.
        if marked:
            path = f"{CONFIG} or {JANG_CONFIG}"
            raise fail("bad-bundle-metadata", path=path, reason=str(error)) from None
        raise
    return {path: claim for path, claim in claimed.items() if claim is not None}


def _jang_config(files: FileContents) -> dict[str, Any]:
    # jang's loader does without this one.
    return document({JANG_CONFIG: b"{}", **files}, JANG_CONFIG)


def _claim(path: str, parts: Mapping[str, TensorForm], widths: _Widths) -> Claim | None:
    if parts.keys() & _MXTQ_PARTS:
        return _mxtq_claim(path, parts, widths)
    (kind, words), (dtype, groups) = (parts.get(one, ("F16", ())) for one in ("weight", "scales"))
    if kind != "U32" and not parts.keys() & _GROUP_PARTS:
        return None
    treatment = widths.modules.get(path, widths.affine)
    columns = groups[-1] * treatment.group_size if groups else 0
    if not treatment.bits:
        bits = words[-1] * 32 // max(columns, 1) if words else 0
        treatment = replace(treatment, bits=bits if bits in _AFFINE.bits else 8)
    return Claim(treatment, (*words[:-1], columns) if columns else (), dtype)


def _mxtq_claim(path: str, parts: Mapping[str, TensorForm], widths: _Widths) -> Claim:
    packed = parts["tq_packed"][1] if "tq_packed" in parts else ()
    rows = parts["tq_norms"][1] if "tq_norms" in parts else packed[:-1]
    key, columns = row_length(widths.config, path)
    if type(columns) is not int:
        raise ValueError(f"{key} is {columns!r}, not a length of rows")
    own, bits = widths.modules.get(path), widths.routed
    if own is not None:
        bits = own.bits
    elif isinstance(bits, Mapping):
        bits = bits.get(projection_of(path) or "")
    if bits is None:
        words = packed[-1] if packed else 0
        fitting = (width for width in range(1, 5) if -(-columns // (32 // width)) == words)
        bits = next(fitting, 0)
    return Claim(Coded(MXTQ, bits, 0, True, ""), (*rows, columns), "F32")


def _read_widths(config: Mapping[str, Any], jang: Mapping[str, Any]) -> _Widths:
    """The widths, in any of the forms that readers know. Raises: ValueError."""
    quantization = _mapping(config, "quantization")
    affine = _affine({"bits": 8, "group_size": 64, **quantization})
    # The first converter wrote the experts' width there; readers go by shapes anyway.
    affine = affine if "mode" in quantization else replace(affine, bits=0)
    modules = {
        path: _affine(entry)
        for path, entry in quantization.items()
        # These are about no module.
        if isinstance(entry, Mapping) and path not in ("routed_expert_bits", "mxtq_bits")
    }
    described = _mapping(jang, "modules")
    for path in described:
        entry = _mapping(described, path)
        if entry.get("scheme") == MXTQ:
            bits = _known(f"modules {path}: bits", entry.get("bits"), _MXTQ.bits)
            modules[path] = Coded(MXTQ, bits, 0, True, "")
    routed = next(iter(_expert_widths(config, jang).values()), None)
    return _Widths(flat(config), routed, affine, modules)


def _expert_widths(config: Mapping[str, Any], jang: Mapping[str, Any]) -> dict[str, Routed]:
    """Place -> the widths of experts that it states; each reader has a favourite of its own.

    Raises: ValueError if one of them is not a width.
    """
    quantization = _mapping(config, "quantization")
    places = {
        "mxtq_bits": config.get("mxtq_bits"),
        "quantization.routed_expert_bits": quantization.get("routed_expert_bits"),
        "quantization.mxtq_bits": quantization.get("mxtq_bits"),
        "mxtq_bits of jang_config.json": jang.get("mxtq_bits"),
    }
    stated = {place: _stated(place, entry) for place, entry in places.items()}
    return {place: widths for place, widths in stated.items() if widths is not None}


def _stated(place: str, entry: Any) -> Routed:
    """The width of experts in an entry: a number, one for each projection, or either inside."""
    if isinstance(entry, Mapping) and not entry.keys() & set(PROJECTIONS):
        entry = entry.get("routed_expert")
    if not isinstance(entry, Mapping):
        return None if entry is None else _known(f"{place}: width", entry, _MXTQ.bits)
    named = (name for name in PROJECTIONS if name in entry)
    return shortest({name: _known(f"{place}: {name}", entry[name], _MXTQ.bits) for name in named})


def shortest(routed: Mapping[str, int]) -> Routed:
    """One width where all projections share it, as published bundles say it, else one each."""
    shared = len(routed) == len(PROJECTIONS) and len({*routed.values()}) == 1
    return next(iter(routed.values())) if shared else routed or None


def flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of a config, those of its text part included where it has none itself.

    Raises: ValueError if the text part is not a mapping.
    """
    text = config.get(TEXT) or {}
    if not isinstance(text, Mapping):
        raise ValueError(f"{TEXT} is {text!r}, not a part of a config")
    return {**text, **config}


def row_length(known: Mapping[str, Any], path: str) -> tuple[str, Any]:
    """The entry with the length of a module's rows, and its value. known: as `flat`.

    Readers take it from the model: in the last word of a row may be room.
    """
    return first_of(known, _INNER if projection_of(path) == "down_proj" else ("hidden_size",))


def first_of(known: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """The key by which readers go, and its value, None if there is none."""
    key = next((key for key in keys if known.get(key)), keys[-1])
    return key, known.get(key)


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    entry = document.get(key) or {}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{key} is {entry!r}, not a mapping")
    return entry


def _affine(entry: Mapping[str, Any]) -> Coded:
    bits = _known("bits", entry.get("bits"), _AFFINE.bits)
    group_size = _known("group_size", entry.get("group_size"), _AFFINE.group_sizes)
    return Coded("affine", bits, group_size, False, "")


def _known(called: str, value: Any, known: tuple[int, ...]) -> int:
    # JSON has true and 2.0, which Python takes for 1 and 2.
    if type(value) is not int or value not in known:
        raise ValueError(f"{called} {value!r} is none of {', '.join(map(str, known))}")
    return value


def added(files: FileContents, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Module -> how many of its first axis, at its end, are experts that only pad.

    shapes: logical, by module. Modules without such experts are left out.
    """
    padding = _jang_config(files).get("expert_padding")
    keys = "original_num_local_experts", "padded_num_local_experts"
    own, padded = (padding.get(key) if isinstance(padding, Mapping) else None for key in keys)
    if type(own) is not int or type(padded) is not int or not 0 < own < padded:
        return {}
    counts = {}
    for path, shape in shapes.items():
        number, by_expert = expert_of(path), path.rpartition(".")[2] in _BY_EXPERT
        # A module of its own is nothing but added rows.
        if number is not None and number >= own and shape:
            counts[path] = shape[0]
        elif number is None and shape[:1] == (padded,) and (by_expert or projection_of(path)):
            counts[path] = padded - own
    return counts


def defects(
    folder: Path, files: FileContents, tensors: Tensors, claims: Claims
) -> Iterator[Diagnostic]:
    """What readers of the format would miss, or read without a word of complaint.

    claims: of every module, found to be right.
    """
    known = document(files, CONFIG)
    for file in sorted({tensor.file or "" for tensor in tensors.values()}):
        if not fnmatchcase(file, _SHARDS):
            reason = f"jang's loader reads {_SHARDS} only, and leaves experts random"
            yield wrong_metadata(file, reason)
    jang = _jang_config(files)
    if JANG_CONFIG not in files:
        yield wrong_metadata(JANG_CONFIG, "it is missing; engines know the format by it")
    for file in _CACHES:
        if (folder / file).exists():
            yield wrong_metadata(file, "it hides the bundle's own experts from jang's loader")
    stated = _expert_widths(known, jang)
    if len({json.dumps(widths, sort_keys=True) for widths in stated.values()}) > 1:
        shown = ", ".join(f"{place} {json.dumps(widths)}" for place, widths in stated.items())
        yield wrong_metadata(CONFIG, f"the width of experts differs from place to place: {shown}")
    _, count = first_of(flat(known), COUNTS)
    if count is not None:
        apart = {path for path in claims if expert_of(path) is not None}
        stacks = [path for path in claims if path not in apart and projection_of(path)]
        for path in (path for path in stacks if claims[path].shape[0] != count):
            reason = f"it has {count!r} experts, {path} has {claims[path].shape[0]}"
            yield wrong_metadata(CONFIG, reason, of=path)
        yield from uneven_experts(claims, count)
        if apart and jang.get("routed_expert_layout") == "prestacked":
            yield wrong_metadata(JANG_CONFIG, "it says prestacked, but experts are apart")
    if not (folder / SIDECAR).exists():
        reason = "it is missing; Osaurus and older Swift readers demand it"
        yield wrong_metadata(SIDECAR, reason)
