"""The files of a JANGTQ bundle beside its shards, with the keys and key order of JANG's writer.

Source: jang 2.5.50, `convert_minimax_jangtq`, `rebundle_jangtq_stacked`, `capabilities`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from emitters.checkpoints import CONFIG, INDEX, QUANTIZATIONS, written
from emitters.jangtq_prestack.side_files import SIDECAR, sidecar
from emitters.jangtq_prestack.spec import (
    JANG_CONFIG,
    MXTQ,
    NAME,
    READER,
    SEED,
    SENSES,
    SPEC,
    file_order,
    projection_of,
)
from emitters.jangtq_prestack.widths import (
    COUNTS,
    TEXT,
    Widths,
    expert_count,
    flat,
    row_length,
    widths_of,
)
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.plan import Plan, coded_modules
from policy_dsl.reader_config import written_config
from policy_dsl.roles.config_facts import rewritten
from policy_dsl.treatments import Coded, Plain, Stored, describe

# A path may have one slash as well, behind a dot or in front of all.
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_DROPPED = (*QUANTIZATIONS, "_name_or_path")


def metadata(plan: Plan) -> dict[str, bytes]:
    """`config.json`, `jang_config.json`, the index and the runtime's tables, by name."""
    widths = widths_of(plan)
    codes = (
        (module.shape[-1], coded.bits)
        for module, coded in coded_modules(plan.modules)
        if coded.scheme == MXTQ
    )
    return {
        CONFIG: written(_config(plan, widths)),
        JANG_CONFIG: written(_jang_config(plan, widths)),
        INDEX: written(_index(plan)),
        SIDECAR: sidecar(codes),
    }


def _index(plan: Plan) -> dict[str, Any]:
    files: dict[str, list[str]] = {}
    for tensor in file_order(plan.modules):
        files.setdefault(tensor.file, []).append(tensor.name)
    about: dict[str, Any] = {
        "format": "jangtq",
        # The files' bytes, headers included, as jang's rebundler counts them.
        "total_size": sum(file.nbytes or 0 for file in plan.files if file.kind == "tensors"),
    }
    if SPEC.layout(plan.policy) == "prestacked":
        about["rebundled_layout"] = "prestacked-switch_mlp"
    weight_map = {name: file for file, names in files.items() for name in names}
    return {"metadata": about, "weight_map": weight_map}


def _config(plan: Plan, widths: Widths) -> dict[str, Any]:
    """The source's config with its quantization replaced; widths are where readers look."""
    n_experts = _n_experts(plan)
    source = written_config(plan, READER).items()
    before = plan.model.n_experts

    def counted(key: str, value: Any) -> Any:
        """The value, with the bundle's count of experts wherever it is one."""
        is_count = key in COUNTS and type(value) is int and value == before
        return n_experts if is_count else value

    kept = rewritten({key: value for key, value in source if key not in _DROPPED}, counted)
    # Found here it costs nothing: the finished bundle would fail its own check.
    _ensure_sizes(kept, plan, n_experts)
    bits = _bits(widths)
    quantization: dict[str, Any] = {
        **_affine(widths.affine, ("bits", "mode", "group_size")),
        "routed_expert_bits": widths.routed,
        "mxtq_bits": bits,
    }
    # mlx-lm builds modules by these; codes are not modules of its own.
    for path, treatment in widths.modules.items():
        if isinstance(treatment, Plain):
            quantization[path] = False
        elif treatment.scheme == "affine":
            quantization[path] = _affine(treatment, ("group_size", "bits", "mode"))
    return kept | {"quantization": quantization, "mxtq_bits": bits, "weight_format": "mxtq"}


def _jang_config(plan: Plan, widths: Widths) -> dict[str, Any]:
    """What marks the bundle for JANG's engines."""
    is_mapping = isinstance(widths.routed, Mapping)
    document: dict[str, Any] = {
        "version": 2,
        "weight_format": "mxtq",
        "profile": widths.profile,
        "source_model": _source_model(plan),
        "mxtq_seed": SEED,
        "mxtq_bits": _bits(widths),
        "quantization": {
            "method": "affine+mxtq",
            "group_size": widths.affine.group_size,
            # For readers that want one: that of down where projections differ.
            "bits_default": _of_down(widths.routed) if is_mapping else widths.routed,
        },
    }
    if _n_experts(plan) > plan.model.n_experts:
        padding = SPEC.padding[plan.model.architecture.family]
        document["expert_padding"] = {
            "original_num_local_experts": plan.model.n_experts,
            "padded_num_local_experts": _n_experts(plan),
            "multiple": padding.multiple,
            "dummy_bias": padding.router_bias,
            "reason": "router decode speed alignment",
        }
    if widths.modules:
        document["modules"] = {path: _described(one) for path, one in widths.modules.items()}
    modality = dict(plan.policy.metadata).get("modality", "text")
    configured = {f"has_{sense}" for sense in SENSES if f"{sense}_config" in plan.model.config}
    # Flags where the config alone would say otherwise.
    flags = _flags(modality).items()
    document |= {flag: held for flag, held in flags if held or flag in configured}
    document["capabilities"] = _capabilities(plan, modality)
    if SPEC.layout(plan.policy) == "prestacked":
        document["routed_expert_layout"] = "prestacked"
    return document


def _capabilities(plan: Plan, modality: str) -> dict[str, Any]:
    """What JANG's engines take from a bundle instead of guessing, in twelve keys."""
    said = {**plan.model.architecture.facts(NAME)["capabilities"], **dict(plan.policy.metadata)}
    return {
        "reasoning_parser": said["reasoning_parser"],
        "tool_parser": said["tool_parser"],
        "think_in_template": said["think_in_template"],
        "supports_tools": said.get("supports_tools", True),
        "supports_thinking": said.get("supports_thinking", True),
        "family": said["family"],
        "modality": modality,
        "modalities": {"text": True, **{sense: sense == modality for sense in SENSES}},
        **_flags(modality),
        "cache_type": said["cache_type"],
    }


def _flags(modality: str) -> dict[str, bool]:
    return {f"has_{sense}": sense == modality for sense in SENSES}


def _bits(widths: Widths) -> dict[str, Any]:
    return {"routed_expert": widths.routed, **widths.classes}


def _of_down(routed: Any) -> int:
    return int(routed.get("down_proj", max(routed.values())))


def _n_experts(plan: Plan) -> int:
    """Experts of a layer in the bundle, added ones included."""
    return plan.model.n_experts + plan.added_experts


def _source_model(plan: Plan) -> dict[str, str]:
    """Whose model it is: the policy's word, else a hub id, else the source's own name."""
    named: Mapping[str, str] = dict(plan.policy.metadata).get("source_model", {})
    table = plan.model.architecture
    usual = table.facts(NAME).get("source_model", f"/{plan.model.id}")
    ids = [one for one in (plan.model.id, plan.policy.model or "") if _HUB_ID.fullmatch(one)]
    # The model that bundled policies are for; they are extended, and used for others.
    ids = [one for one in ids if one != _POLICIES_MODEL]
    org, _, name = (ids[0] if ids else usual).partition("/")
    return {"name": name, "org": org, "architecture": table.family, **named}


_POLICIES_MODEL = "MiniMaxAI/MiniMax-M2.7"


def _affine(treatment: Coded, order: tuple[str, ...]) -> dict[str, Any]:
    words = {"bits": treatment.bits, "group_size": treatment.group_size, "mode": "affine"}
    return {key: words[key] for key in order}


def _described(treatment: Stored) -> dict[str, Any]:
    if isinstance(treatment, Plain):
        return {"dtype": describe(treatment)}
    size = {} if treatment.scheme == MXTQ else {"group_size": treatment.group_size}
    return {"scheme": treatment.scheme, "bits": treatment.bits, **size}


def _ensure_sizes(config: Mapping[str, Any], plan: Plan, n_experts: int) -> None:
    """Raises: PolicyError unless the bundle's config has the sizes of its experts."""
    try:
        known = flat(config)
    except ValueError as error:
        raise _wrong(plan, TEXT, config[TEXT], str(error)) from None
    key, value = expert_count(known)
    if value is not None and value != n_experts:
        raise _wrong(plan, key, value, f"readers go by it, and there are {n_experts} experts")
    # One of each kind: there are tens of thousands of them where experts are apart.
    lengths = {
        (projection_of(module.name), module.shape[-1]): module
        for module, coded in coded_modules(plan.modules)
        if coded.scheme == MXTQ
    }
    for module in lengths.values():
        key, value = row_length(known, module.name)
        if type(value) is not int or value != module.shape[-1]:
            length = f"rows of {module.shape[-1]} values"
            reason = f"readers go by it, and {module.name} has {length}"
            raise _wrong(plan, key, value, reason)


def _wrong(plan: Plan, key: str, value: Any, reason: str) -> PolicyError:
    shown = repr(value)[:60]
    return fail("bad-config-value", model=plan.model.id, key=key, value=shown, notes=[reason])
