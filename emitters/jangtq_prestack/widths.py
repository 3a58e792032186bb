"""The widths and sizes that JANG's files state: written from a plan, read from a bundle.

Plan ── widths_of ──> Widths <── read_widths ── config.json, jang_config.json
Source: jang 2.5.50, `convert_minimax_jangtq`, profiles and `mxtq_bits`; `load_jangtq` and
`verify_jangtq_prestacked` for sizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from emitters.jangtq_prestack.spec import MXTQ, PROJECTIONS, SPEC, projection_of
from policy_dsl.plan import Module, Plan, coded_modules
from policy_dsl.treatments import Coded, Plain, Stored

_Value = TypeVar("_Value")

_CUSTOM = "custom"
_STANDARD = Coded("affine", 8, 64, False, "rtn")
_PLAIN_BITS = 16
_MXTQ, _AFFINE = SPEC.schemes
# Widths of gate, down and up -> profile, where all else is standard affine or F16.
_PROFILES: Mapping[tuple[int, ...], str] = {
    (2, 2, 2): "JANGTQ2",
    (3, 3, 3): "JANGTQ3",
    (4, 4, 4): "JANGTQ4",
    (2, 4, 2): "JANGTQ_K",
}
# Entry of `mxtq_bits` -> how the roles that it is about begin.
_CLASSES = {
    "attention": "attention.",
    "shared_expert": "shared_experts.",
    "embed_tokens": "embed",
    "lm_head": "lm_head",
}
# Of these keys readers go by the first that is there and not 0.
COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "n_routed")
_INNER = ("moe_intermediate_size", "intermediate_size")
TEXT = "text_config"


@dataclass(frozen=True)
class Widths:
    """The widths of a bundle. routed: of expert codes, for all or by projection, or not stated.

    classes: what `mxtq_bits` says besides. affine: the treatment of affine modules without an
    entry of their own; its width is only known if `affine_is_stated`. modules: treatments by
    module, in custom bundles.
    """

    profile: str
    routed: int | Mapping[str, int] | None
    classes: Mapping[str, int]
    affine: Coded
    modules: Mapping[str, Stored]
    affine_is_stated: bool = True

    def coded(self, path: str) -> int | None:
        """The width of a module of expert codes; None if nothing states it."""
        own = self.modules.get(path)
        if own is not None:
            return own.bits if isinstance(own, Coded) else None
        if isinstance(self.routed, Mapping):
            return self.routed.get(projection_of(path) or "")
        return self.routed


def widths_of(plan: Plan) -> Widths:
    """The widths of a planned bundle, and the profile that names them."""
    matrices = [module for module in plan.modules if len(module.shape) > 1]
    experts: dict[str, list[Module]] = {name: [] for name in PROJECTIONS}
    rest: list[Module] = []
    for module in matrices:
        projection = projection_of(module.name)
        (experts[projection] if projection else rest).append(module)
    routed = {
        name: _most(coded.bits for _, coded in coded_modules(held) if coded.scheme == MXTQ)
        for name, held in experts.items()
    }
    profile = _profile(experts, rest)
    affine = _most(coded for _, coded in coded_modules(rest) if coded.scheme == "affine")
    classes = {
        entry: _most(_bits(module) for module in rest if module.role.startswith(begin)) or 8
        for entry, begin in _CLASSES.items()
    }
    return Widths(
        profile=profile,
        routed=_shortest(routed),
        classes=classes | {"norms_router_biases": _PLAIN_BITS},
        affine=affine or _STANDARD,
        modules={one.name: one.treatment for one in matrices} if profile == _CUSTOM else {},
    )


def read_widths(config: Mapping[str, Any], jang: Mapping[str, Any]) -> Widths:
    """The widths that a bundle's files state, in any of the forms that readers know.

    Raises: ValueError if an entry is broken.
    """
    quantization = _mapping(config, "quantization")
    affine = _affine({"bits": 8, "group_size": 64, **quantization})
    modules: dict[str, Stored] = {
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
    routed = next(iter(expert_widths(config, jang).values()), None)
    # The first converter wrote the experts' width there; readers go by shapes anyway.
    stated = "mode" in quantization
    return Widths(str(jang.get("profile", "")), routed, {}, affine, modules, stated)


def expert_widths(
    config: Mapping[str, Any], jang: Mapping[str, Any]
) -> dict[str, int | dict[str, int]]:
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
    stated = {}
    for place, entry in places.items():
        try:
            widths = _stated(entry)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if widths is not None:
            stated[place] = widths
    return stated


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
    inner = projection_of(path) == "down_proj"
    return _first(known, _INNER) if inner else ("hidden_size", known.get("hidden_size"))


def expert_count(known: Mapping[str, Any]) -> tuple[str, Any]:
    """The entry by which readers count experts, and its value, None if there is none."""
    return _first(known, COUNTS)


def _first(known: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
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


def _stated(entry: Any) -> int | dict[str, int] | None:
    """The width of experts in an entry: a number, one for each projection, or either inside."""
    if isinstance(entry, Mapping) and not entry.keys() & set(PROJECTIONS):
        entry = entry.get("routed_expert")
    if not isinstance(entry, Mapping):
        return None if entry is None else _known("width", entry, _MXTQ.bits)
    named = (name for name in PROJECTIONS if name in entry)
    return _shortest({name: _known(name, entry[name], _MXTQ.bits) for name in named})


def _known(called: str, value: Any, known: tuple[int, ...]) -> int:
    # JSON has true and 2.0, which Python takes for 1 and 2.
    if type(value) is not int or value not in known:
        raise ValueError(f"{called} {value!r} is none of {', '.join(map(str, known))}")
    return value


def _bits(module: Module) -> int:
    return module.treatment.bits if isinstance(module.treatment, Coded) else _PLAIN_BITS


def _most(values: Iterable[_Value]) -> _Value | None:
    """The most frequent of the values, the first of several; None if there are none."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else None


def _shortest(routed: Mapping[str, int | None]) -> int | dict[str, int] | None:
    """One width where all projections share it, as published bundles say it, else one each."""
    known = {name: bits for name, bits in routed.items() if bits is not None}
    if len(known) == len(PROJECTIONS) and len(set(known.values())) == 1:
        return next(iter(known.values()))
    return known or None


def _profile(experts: Mapping[str, Iterable[Module]], rest: Iterable[Module]) -> str:
    """The published profile whose widths these are, else `custom`."""
    widths: list[int] = []
    for held in experts.values():
        treatments = {module.treatment for module in held}
        only = next(iter(treatments)) if len(treatments) == 1 else None
        # More or fewer than one a projection have no name.
        if not isinstance(only, Coded) or only.scheme != MXTQ:
            return _CUSTOM
        widths.append(only.bits)
    for module in rest:
        plain = module.role in ("router", "shared_expert_gate")
        if module.dtype != "F16" or plain != isinstance(module.treatment, Plain):
            return _CUSTOM
        if not plain and module.treatment != _STANDARD:
            return _CUSTOM
    return _PROFILES.get(tuple(widths), _CUSTOM)
