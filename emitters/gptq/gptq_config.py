"""The configuration of the GPTQ dialect, from a plan.

Source: gptqmodel 7.7.0, `QuantizeConfig`; auto-round 0.16.1, its `auto_gptq` export;
vLLM 0.33.0, `AutoGPTQConfig`; optimum 2.3.0, `GPTQQuantizer`.
"""

from __future__ import annotations

from typing import Any

from emitters.gptq.module_rules import expert_rules, layer_rules
from emitters.gptq.schemes import STORAGE
from emitters.gptq.widths import GPTQ, Width
from policy_dsl.plan import Plan, coded_modules

SIDECAR = "quantize_config.json"


def quantization(plan: Plan, default: Width) -> dict[str, Any]:
    """`quantization_config`: what its readers look up, and nothing about how it was made."""
    modules = plan.modules
    packed = {module.name: coded for module, coded in coded_modules(modules)}
    scheme = next(iter(packed.values())).scheme
    rules = {**layer_rules(modules, default), **expert_rules(modules, default)}
    dynamic = dict(_rule(pattern, width) for pattern, width in rules.items())
    return {
        "bits": default.bits,
        "group_size": default.group_size,
        "desc_act": False,
        "sym": default.symmetric,
        "lm_head": "lm_head" in packed,
        "quant_method": GPTQ,
        "checkpoint_format": STORAGE[scheme].version,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _rule(pattern: str, width: Width | None) -> tuple[str, dict[str, Any]]:
    if width is None:
        return f"-:{pattern}", {}
    entry = {"bits": width.bits, "group_size": width.group_size, "sym": width.symmetric}
    return f"+:{pattern}", entry
