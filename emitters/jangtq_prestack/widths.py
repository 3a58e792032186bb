"""The widths of a bundle as JANG's files tell them: one for all experts, or a map of modules.

Plan ── widths_of ──> Widths <── read_widths ── config.json, jang_config.json
Source: jang 2.5.50, `convert_minimax_jangtq`, profiles and `mxtq_bits`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from emitters.jangtq_prestack.names import MXTQ, PROJECTIONS, projection_of
from emitters.jangtq_prestack.spec import SPEC
from policy_dsl.plan import Module, Plan, coded_modules
from policy_dsl.treatments import Coded, Plain, Stored

_Value = TypeVar("_Value")

CUSTOM = "custom"
STANDARD = Coded("affine", 8, 64, False, "rtn")
PLAIN_BITS = 16
_MXTQ, _AFFINE = SPEC.schemes
# Widths of gate, down and up -> profile, where all else is standard affine or F16.
_PROFILES: Mapping[tuple[int, ...], str] = {
    (2, 2, 2): "JANGTQ2",
    (3, 3, 3): "JANGTQ3",
    (4, 4, 4): "JANGTQ4",
    (2, 4, 2): "JANGTQ_K",
}
# Entry of `mxtq_bits` -> how the roles that it speaks of begin.
_CLASSES = {
    "attention": "attention.",
    "shared_expert": "shared_experts.",
    "embed_tokens": "embed",
    "lm_head": "lm_head",
}
# Mappings of `quantization` that speak of no module.
_NO_MODULES = ("routed_expert_bits", "mxtq_bits")


@dataclass(frozen=True)
class Widths:
    """The widths of a bundle. routed: of expert codes, for all or by projection, or not told.

    classes: what `mxtq_bits` says besides. affine: the treatment of affine modules without an
    entry of their own; its width is only known if `affine_is_told`. modules: treatments by
    module, in custom bundles.
    """

    profile: str
    routed: int | Mapping[str, int] | None
    classes: Mapping[str, int]
    affine: Coded
    modules: Mapping[str, Stored]
    affine_is_told: bool = True

    def coded(self, path: str) -> int | None:
        """The width of a module of expert codes; None if nothing tells it."""
        own = self.modules.get(path)
        if own is not None:
            return own.bits if isinstance(own, Coded) else None
        if isinstance(self.routed, Mapping):
            return self.routed.get(projection_of(path) or "")
        return self.routed


def widths_of(plan: Plan) -> Widths:
    """The widths of a planned bundle, and the profile that names them."""
    matrices = [module for module in plan.modules if is_matrix(module)]
    experts: dict[str, list[Module]] = {name: [] for name in PROJECTIONS}
    rest: list[Module] = []
    for module in matrices:
        projection = projection_of(module.name)
        (experts[projection] if projection else rest).append(module)
    routed = {
        name: _most(coded.bits for _, coded in coded_modules(found) if coded.scheme == MXTQ)
        for name, found in experts.items()
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
        classes=classes | {"norms_router_biases": PLAIN_BITS},
        affine=affine or STANDARD,
        modules={one.name: one.treatment for one in matrices} if profile == CUSTOM else {},
    )


def read_widths(config: Mapping[str, Any], jang: Mapping[str, Any]) -> Widths:
    """The widths that a bundle's files tell readers, in any of the forms that they know.

    Raises: ValueError if an entry is broken.
    """
    quantization = _mapping(config, "quantization")
    affine = _affine({"bits": 8, "group_size": 64, **quantization})
    modules: dict[str, Stored] = {
        path: _affine(one)
        for path, one in quantization.items()
        if isinstance(one, Mapping) and path not in _NO_MODULES
    }
    described = _mapping(jang, "modules")
    for path in described:
        entry = _mapping(described, path)
        if entry.get("scheme") == MXTQ:
            bits = _known(f"modules {path}: bits", entry.get("bits"), _MXTQ.bits)
            modules[path] = Coded(MXTQ, bits, 0, True, "")
    routed = next(iter(told_widths(config, jang).values()), None)
    profile = str(jang.get("profile", ""))
    # Without a mode the first converter wrote the experts' width; readers go by shapes anyway.
    return Widths(profile, routed, {}, affine, modules, affine_is_told="mode" in quantization)


def told_widths(
    config: Mapping[str, Any], jang: Mapping[str, Any]
) -> dict[str, int | dict[str, int]]:
    """Place -> the widths of experts that it tells; each reader has a favourite of its own.

    Raises: ValueError if one of them is no width.
    """
    quantization = _mapping(config, "quantization")
    places = {
        "mxtq_bits": config.get("mxtq_bits"),
        "quantization.routed_expert_bits": quantization.get("routed_expert_bits"),
        "quantization.mxtq_bits": quantization.get("mxtq_bits"),
        "mxtq_bits of jang_config.json": jang.get("mxtq_bits"),
    }
    found = {}
    for place, entry in places.items():
        try:
            widths = _told(entry)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if widths is not None:
            found[place] = widths
    return found


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    entry = document.get(key) or {}
    if not isinstance(entry, Mapping):
        raise ValueError(f"{key} is {entry!r}, and no mapping")
    return entry


def is_matrix(module: Module) -> bool:
    """Whether it could be quantized: a matrix or a stack of them."""
    return len(module.shape) > 1


def _affine(entry: Mapping[str, Any]) -> Coded:
    bits = _known("bits", entry.get("bits"), _AFFINE.bits)
    group_size = _known("group_size", entry.get("group_size"), _AFFINE.group_sizes)
    return Coded("affine", bits, group_size, False, "")


def _told(entry: Any) -> int | dict[str, int] | None:
    """The width of experts in an entry: a number, one for each projection, or either inside."""
    if isinstance(entry, Mapping) and not entry.keys() & set(PROJECTIONS):
        entry = entry.get("routed_expert")
    if not isinstance(entry, Mapping):
        return None if entry is None else _known("width", entry, _MXTQ.bits)
    told = (name for name in PROJECTIONS if name in entry)
    return _shortest({name: _known(name, entry[name], _MXTQ.bits) for name in told})


def _known(called: str, value: Any, known: tuple[int, ...]) -> int:
    # JSON has true and 2.0, which Python takes for 1 and 2.
    if type(value) is not int or value not in known:
        raise ValueError(f"{called} {value!r} is none of {', '.join(map(str, known))}")
    return value


def _bits(module: Module) -> int:
    return module.treatment.bits if isinstance(module.treatment, Coded) else PLAIN_BITS


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
    found = [{module.treatment for module in held} for held in experts.values()]
    first = [treatment for treatments in found for treatment in treatments]
    # More or fewer than one a projection have no name.
    if [len(treatments) for treatments in found] != [1] * len(found):
        return CUSTOM
    coded = [one for one in first if isinstance(one, Coded) and one.scheme == MXTQ]
    if len(coded) != len(first):
        return CUSTOM
    for module in rest:
        plain = module.role in ("router", "shared_expert_gate")
        if module.dtype != "F16" or plain != isinstance(module.treatment, Plain):
            return CUSTOM
        if not plain and module.treatment != STANDARD:
            return CUSTOM
    return _PROFILES.get(tuple(one.bits for one in coded), CUSTOM)
