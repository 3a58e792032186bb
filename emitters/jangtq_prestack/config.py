"""The files of a JANGTQ bundle beside its shards, with the keys and key order of JANG's writer.

Source: jang 2.5.50, `convert_minimax_jangtq`, `rebundle_jangtq_stacked`, `capabilities`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from statistics import mode
from typing import Any, NamedTuple

from emitters.checkpoints import CONFIG, INDEX, QUANTIZATIONS, written
from emitters.jangtq_prestack import read_config, spec
from emitters.jangtq_prestack.read_config import COUNTS, TEXT, Routed, added, claims, defects
from emitters.jangtq_prestack.side_files import SIDECAR, edited, sidecar
from emitters.jangtq_prestack.spec import MXTQ, NAME, PROJECTIONS, SENSES, SPEC, projection_of
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.formats import Files
from policy_dsl.plan import Module, Plan, coded_modules
from policy_dsl.reader_config import written_config
from policy_dsl.roles.config_facts import rewritten
from policy_dsl.treatments import Coded, Plain, Stored, describe, scheme_of

# A path may have one slash as well, behind a dot or in front of all.
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_DROPPED = (*QUANTIZATIONS, "_name_or_path")
# The model that bundled policies are for; they are extended, and used for others.
_POLICIES_MODEL = "MiniMaxAI/MiniMax-M2.7"
_CUSTOM = "custom"
_STANDARD = Coded("affine", 8, 64, False, "rtn")
_PLAIN_BITS = 16
# Widths of gate, down and up -> profile, where all else is standard affine or F16.
_PROFILES: Mapping[tuple[int, ...], str] = {
    **{(bits, bits, bits): f"JANGTQ{bits}" for bits in (2, 3, 4)},
    (2, 4, 2): "JANGTQ_K",
}
# Entry of `mxtq_bits` -> how the roles that it is about begin.
_CLASSES = {
    "attention": "attention.",
    "shared_expert": "shared_experts.",
    "embed_tokens": "embed",
    "lm_head": "lm_head",
}
_CAPABILITIES = (
    *("reasoning_parser", "tool_parser", "think_in_template", "supports_tools"),
    *("supports_thinking", "family", "modality", "modalities"),
)


class _Widths(NamedTuple):
    """routed: bits of expert codes. bits: what `mxtq_bits` says. affine: of most such modules.

    modules: the treatments of all, in custom bundles.
    """

    profile: str
    routed: Routed
    bits: Mapping[str, Any]
    affine: Coded
    modules: Mapping[str, Stored]


def metadata(plan: Plan) -> dict[str, bytes]:
    """`config.json`, `jang_config.json`, the index and the runtime's tables, by name."""
    widths = _widths_of(plan)
    about: dict[str, Any] = {
        "format": "jangtq",
        # The files' bytes, headers included, as jang's rebundler counts them.
        "total_size": sum(file.nbytes or 0 for file in plan.tensor_files),
    }
    if SPEC.layout(plan.policy) == "prestacked":
        about["rebundled_layout"] = "prestacked-switch_mlp"
    places = {tensor.name: tensor.file for tensor in spec.file_order(plan.modules)}
    return {
        CONFIG: written(_config(plan, widths)),
        spec.JANG_CONFIG: written(_jang_config(plan, widths)),
        INDEX: written({"metadata": about, "weight_map": places}),
        SIDECAR: sidecar(plan.modules),
    }


def _widths_of(plan: Plan) -> _Widths:
    matrices = [module for module in plan.modules if len(module.shape) > 1]
    experts: dict[str, list[Stored]] = {name: [] for name in PROJECTIONS}
    rest: list[Module] = []
    for module in matrices:
        if projection := projection_of(module.name):
            experts[projection].append(module.treatment)
        else:
            rest.append(module)
    # Of several widths the most frequent is taken, and the first of these.
    mxtq = {}
    for name, held in experts.items():
        if widths := [_bits(one) for one in held if scheme_of(one) == MXTQ]:
            mxtq[name] = mode(widths)
    routed = read_config.shortest(mxtq)
    bits: dict[str, Any] = {"routed_expert": routed}
    for entry, begin in _CLASSES.items():
        widths = [_bits(module.treatment) for module in rest if module.role.startswith(begin)]
        bits[entry] = mode(widths or [8])
    bits["norms_router_biases"] = _PLAIN_BITS
    affine = [coded for _, coded in coded_modules(rest) if coded.scheme == "affine"]
    profile = _profile([set(held) for held in experts.values()], rest)
    modules = {one.name: one.treatment for one in matrices} if profile == _CUSTOM else {}
    return _Widths(profile, routed, bits, mode(affine or [_STANDARD]), modules)


def _profile(experts: Sequence[Set[Stored]], rest: Iterable[Module]) -> str:
    """The published profile whose widths these are, else `custom`."""
    # More or fewer than one a projection have no name.
    widths = tuple(_bits(*held) if len(held) == 1 else 0 for held in experts)
    usual = all(scheme_of(one) == MXTQ for held in experts for one in held)
    for module in rest:
        plain, how = module.role in ("router", "shared_expert_gate"), module.treatment
        is_standard = isinstance(how, Plain) if plain else how == _STANDARD
        usual = usual and module.dtype == "F16" and is_standard
    return _PROFILES.get(widths, _CUSTOM) if usual else _CUSTOM


def _bits(treatment: Stored) -> int:
    return treatment.bits if isinstance(treatment, Coded) else _PLAIN_BITS


def _config(plan: Plan, widths: _Widths) -> dict[str, Any]:
    """The source's config with its quantization replaced; widths are where readers look."""
    source = written_config(plan, spec.READER).items()
    before, n_experts = plan.model.n_experts, plan.model.n_experts + plan.added_experts

    def counted(key: str, value: Any) -> Any:
        is_count = key in COUNTS and type(value) is int and value == before
        return n_experts if is_count else value

    kept = rewritten({key: value for key, value in source if key not in _DROPPED}, counted)
    # Found here it costs nothing: the finished bundle would fail its own check.
    _ensure_sizes(kept, plan, n_experts)
    quantization: dict[str, Any] = {
        **{"bits": widths.affine.bits, "mode": "affine", "group_size": widths.affine.group_size},
        "routed_expert_bits": widths.routed,
        "mxtq_bits": widths.bits,
    }
    # mlx-lm builds modules by these; codes are not modules of its own.
    for path, treatment in widths.modules.items():
        if isinstance(treatment, Plain):
            quantization[path] = False
        elif treatment.scheme == "affine":
            size, bits = treatment.group_size, treatment.bits
            quantization[path] = {"group_size": size, "bits": bits, "mode": "affine"}
    return kept | {"quantization": quantization, "mxtq_bits": widths.bits, "weight_format": "mxtq"}


def _jang_config(plan: Plan, widths: _Widths) -> dict[str, Any]:
    """What marks the bundle for JANG's engines."""
    routed = widths.routed
    # For readers that want one: that of down where projections differ.
    one = routed.get("down_proj", max(routed.values())) if isinstance(routed, Mapping) else routed
    document: dict[str, Any] = {
        "version": 2,
        "weight_format": "mxtq",
        "profile": widths.profile,
        "source_model": _source_model(plan),
        "mxtq_seed": spec.SEED,
        "mxtq_bits": widths.bits,
        "quantization": {
            "method": "affine+mxtq",
            "group_size": widths.affine.group_size,
            "bits_default": one,
        },
    }
    if plan.added_experts:
        padding = SPEC.padding[plan.model.architecture.family]
        document["expert_padding"] = {
            "original_num_local_experts": plan.model.n_experts,
            "padded_num_local_experts": plan.model.n_experts + plan.added_experts,
            "multiple": padding.multiple,
            "dummy_bias": padding.router_bias,
            "reason": "router decode speed alignment",
        }
    if widths.modules:
        document["modules"] = {path: _described(how) for path, how in widths.modules.items()}
    modality = dict(plan.policy.metadata).get("modality", "text")
    configured = {f"has_{sense}" for sense in SENSES if f"{sense}_config" in plan.model.config}
    flags = {f"has_{sense}": sense == modality for sense in SENSES}
    # Flags where the config alone would say otherwise.
    document |= {flag: held for flag, held in flags.items() if held or flag in configured}
    document["capabilities"] = _capabilities(plan, modality, flags)
    if SPEC.layout(plan.policy) == "prestacked":
        document["routed_expert_layout"] = "prestacked"
    return document


def _described(treatment: Stored) -> dict[str, Any]:
    if isinstance(treatment, Plain):
        return {"dtype": describe(treatment)}
    size = {} if treatment.scheme == MXTQ else {"group_size": treatment.group_size}
    return {"scheme": treatment.scheme, "bits": treatment.bits, **size}


def _capabilities(plan: Plan, modality: str, flags: Mapping[str, bool]) -> dict[str, Any]:
    """What JANG's engines take from a bundle instead of guessing, in twelve keys."""
    said = {
        **{"supports_tools": True, "supports_thinking": True},
        **plan.model.architecture.facts(NAME)["capabilities"],
        **dict(plan.policy.metadata),
        "modality": modality,
        "modalities": {"text": True, **{sense: sense == modality for sense in SENSES}},
        **flags,
    }
    return {key: said[key] for key in (*_CAPABILITIES, *flags, "cache_type")}


def _source_model(plan: Plan) -> dict[str, str]:
    """Whose model it is: the policy's word, else a hub id, else the source's own name."""
    named: Mapping[str, str] = dict(plan.policy.metadata).get("source_model", {})
    table = plan.model.architecture
    usual = table.facts(NAME).get("source_model", f"/{plan.model.id}")
    ids = filter(_HUB_ID.fullmatch, (plan.model.id, plan.policy.model or ""))
    org, _, name = next((one for one in ids if one != _POLICIES_MODEL), usual).partition("/")
    return {"name": name, "org": org, "architecture": table.family, **named}


def _ensure_sizes(config: Mapping[str, Any], plan: Plan, n_experts: int) -> None:
    """Raises: PolicyError unless the bundle's config has the sizes of its experts."""
    try:
        known = read_config.flat(config)
    except ValueError as error:
        raise _wrong(plan, TEXT, config[TEXT], str(error)) from None
    key, value = read_config.first_of(known, COUNTS)
    if value is not None and value != n_experts:
        raise _wrong(plan, key, value, f"readers go by it, and there are {n_experts} experts")
    # One of each kind: there are tens of thousands of them where experts are apart.
    lengths = {
        (projection_of(module.name), module.shape[-1]): module
        for module, coded in coded_modules(plan.modules)
        if coded.scheme == MXTQ
    }
    for (_, columns), module in lengths.items():
        key, value = read_config.row_length(known, module.name)
        if type(value) is not int or value != columns:
            reason = f"readers go by it, and {module.name} has rows of {columns} values"
            raise _wrong(plan, key, value, reason)


def _wrong(plan: Plan, key: str, value: Any, reason: str) -> PolicyError:
    shown = repr(value)[:60]
    return fail("bad-config-value", model=plan.model.id, key=key, value=shown, notes=[reason])


FILES = Files(metadata=metadata, claims=claims, defects=defects, added=added, edited=edited)
