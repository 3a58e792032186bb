"""The configuration of AutoRound's own dialect, from a plan.

Source: auto-round 0.16.1 and 0.12.2, their exports and loader; vLLM 0.33.0, its rule parser.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emitters.gptq.module_rules import blocks, exact_rules, expert_rules
from emitters.gptq.schemes import RTN, SEARCHES, STORAGE
from emitters.gptq.widths import AUTO_ROUND, Width
from policy_dsl.plan import Plan, coded_modules

SIDECAR = "quantization_config.json"
# Packing format -> version of the zero points; the first of each is what AutoRound writes.
VERSIONS: Mapping[str, str] = {
    "auto_round:auto_gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
_KEPT = {"bits": 16, "data_type": "float"}
_OLDEST = "0.12.2"


def quantization(plan: Plan, default: Width) -> dict[str, Any]:
    """`quantization_config`, its keys in the order of AutoRound's flow without a model."""
    modules = plan.modules
    methods = {coded.method for _, coded in coded_modules(modules)}
    version = STORAGE[next(coded_modules(modules))[1].scheme].version
    followed = {SEARCHES.get(method, "") for method in methods}
    rules = {**exact_rules(modules, default), **expert_rules(modules, default)}
    return {
        "quant_method": AUTO_ROUND,
        "packing_format": next(word for word, meant in VERSIONS.items() if meant == version),
        "bits": default.bits,
        "group_size": default.group_size,
        "sym": default.symmetric,
        "data_type": "int",
        "iters": 0,
        # AutoRound says so of plain rounding only: the rest needs the model.
        **({"model_free": True} if methods == {RTN} else {}),
        "autoround_version": _OLDEST if _OLDEST in followed else SEARCHES["opt-rtn"],
        "block_name_to_quantize": ",".join(blocks(modules)),
        "extra_config": {name: _entry(width, default) for name, width in rules.items()},
    }


def _entry(width: Width | None, default: Width) -> dict[str, Any]:
    if width is None:
        return dict(_KEPT)
    # Always with bits: vLLM takes a module whose entry has none for one that is not quantized.
    entry: dict[str, Any] = {"bits": width.bits}
    if width.group_size != default.group_size:
        entry["group_size"] = width.group_size
    if width.symmetric != default.symmetric:
        entry["sym"] = width.symmetric
    return entry
