"""`config.json` and `jang_config.json`, with the keys and key order of JANG's own writer.

Source: jang 2.5.50, `convert_minimax_jangtq` and `rebundle_jangtq_stacked`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from emitters.jangtq_prestack.capabilities import senses, stamp
from emitters.jangtq_prestack.names import MXTQ, SEED
from emitters.jangtq_prestack.readers import READER
from emitters.jangtq_prestack.sizes import counted, ensure_told
from emitters.jangtq_prestack.spec import SPEC
from emitters.jangtq_prestack.widths import Widths
from policy_dsl.plan import Plan
from policy_dsl.reader_config import written_config
from policy_dsl.treatments import Coded, Plain, Stored, describe

_MINIMAX = "MiniMaxAI/MiniMax-M2.7"
# A path may have one slash as well, behind a dot or in front of all.
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_DROPPED = ("quantization", "quantization_config", "compression_config", "_name_or_path")


def config(plan: Plan, widths: Widths) -> dict[str, Any]:
    """The source's config with its quantization replaced; widths stand where readers look.

    Raises: PolicyError if the source's config tells readers other sizes than tensors have.
    """
    n_experts = _experts(plan)
    written = written_config(plan, READER)
    kept = {key: value for key, value in written.items() if key not in _DROPPED}
    source = counted(kept, plan.model.n_experts, n_experts)
    # Found here it costs nothing: the finished bundle would fail its own check.
    ensure_told(source, plan, n_experts)
    bits = _bits(widths)
    quantization: dict[str, Any] = {
        "bits": widths.affine.bits,
        "mode": "affine",
        "group_size": widths.affine.group_size,
        "routed_expert_bits": widths.routed,
        "mxtq_bits": bits,
    }
    # mlx-lm builds modules by these; codes are no modules of its own.
    for path, treatment in widths.modules.items():
        if isinstance(treatment, Coded) and treatment.scheme == "affine":
            quantization[path] = _affine(treatment)
        elif isinstance(treatment, Plain):
            quantization[path] = False
    added = {"quantization": quantization, "mxtq_bits": bits, "weight_format": "mxtq"}
    return source | added


def jang_config(plan: Plan, widths: Widths) -> dict[str, Any]:
    """What marks the bundle for JANG's engines."""
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
            "bits_default": _default_bits(widths),
        },
    }
    if _experts(plan) > plan.model.n_experts:
        padding = SPEC.padding[plan.model.architecture.family]
        document["expert_padding"] = {
            "original_num_local_experts": plan.model.n_experts,
            "padded_num_local_experts": _experts(plan),
            "multiple": padding.multiple,
            "dummy_bias": padding.router_bias,
            "reason": "router decode speed alignment",
        }
    if widths.modules:
        document["modules"] = {
            path: _described(treatment) for path, treatment in widths.modules.items()
        }
    document |= senses(plan)
    document["capabilities"] = stamp(plan)
    if SPEC.layout(plan.policy) == "prestacked":
        document["routed_expert_layout"] = "prestacked"
    return document


def _bits(widths: Widths) -> dict[str, Any]:
    return {"routed_expert": widths.routed, **widths.classes}


def _default_bits(widths: Widths) -> int | None:
    """One width for readers that want one: that of down where projections differ."""
    if isinstance(widths.routed, Mapping):
        return widths.routed.get("down_proj", max(widths.routed.values()))
    return widths.routed


def _experts(plan: Plan) -> int:
    """Experts of a layer in the bundle, added ones included."""
    return plan.model.n_experts + plan.added_experts


def _source_model(plan: Plan) -> dict[str, str]:
    """Whose model it is: the policy's word, else a hub id, else the source's own name."""
    named: Mapping[str, str] = dict(plan.policy.metadata).get("source_model", {})
    family = plan.model.architecture.family
    # JANG's writer for MiniMax says so of each of them.
    usual = _MINIMAX if family == "minimax_m2" else f"/{plan.model.id}"
    ids = [one for one in (plan.model.id, plan.policy.model or "") if _HUB_ID.fullmatch(one)]
    # The model that bundled policies are for; they are extended, and used for others.
    ids = [one for one in ids if one != _MINIMAX]
    org, _, name = (ids[0] if ids else usual).partition("/")
    return {"name": name, "org": org, "architecture": family, **named}


def _affine(treatment: Coded) -> dict[str, Any]:
    return {"group_size": treatment.group_size, "bits": treatment.bits, "mode": "affine"}


def _described(treatment: Stored) -> dict[str, Any]:
    if isinstance(treatment, Plain):
        return {"dtype": describe(treatment)}
    if treatment.scheme == MXTQ:
        return {"scheme": MXTQ, "bits": treatment.bits}
    return {"scheme": treatment.scheme, "bits": treatment.bits, "group_size": treatment.group_size}
