"""`config.json`, the copy of its quantization, and the index of a planned bundle.

Source: auto-round 0.16.1 and 0.12.2, exports and loader, its flow without a model; gptqmodel
7.7.0, `QuantizeConfig`; vLLM 0.33.0, `AutoGPTQConfig` and its rule parser; optimum 2.3.0,
`GPTQQuantizer`; transformers 5.23.0, `save_pretrained`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emitters.checkpoints import CONFIG, INDEX, QUANTIZATIONS, index, written
from emitters.gptq.module_rules import blocks, exact_rules, expert_rules, layer_rules
from emitters.gptq.spec import (
    AUTO_ROUND,
    GPTQ,
    READERS,
    RTN,
    SEARCHES,
    SIDECARS,
    STORAGE,
    Width,
    default_width,
    dialect_of,
)
from policy_dsl.formats import in_order
from policy_dsl.plan import Plan, coded_modules
from policy_dsl.reader_config import written_config
from policy_dsl.sources.checkpoint import finite

# Packing format of AutoRound -> version of the zero points; the first of each is what it writes.
PACKING_FORMATS: Mapping[str, str] = {
    "auto_round:auto_gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
_OLDEST = "0.12.2"


def metadata(plan: Plan) -> dict[str, bytes]:
    """`config.json`, its `quantization_config` once more, and the index of several shards.

    The config is the source's, key by key; then what readers need and it lacks, and at its end
    the new quantization. A single shard has no index: its readers look for `model.safetensors`.
    """
    source = written_config(plan, *READERS).items()
    config = {key: finite(value) for key, value in source if key not in QUANTIZATIONS}
    default, files = default_width(plan.modules), {}
    if default is not None:
        dialect = dialect_of(plan)
        config["quantization_config"] = _DIALECTS[dialect](plan, default)
        files[SIDECARS[dialect]] = written(config["quantization_config"])
    tensors = in_order(plan.modules)
    if len({tensor.file for tensor in tensors}) > 1:
        files[INDEX] = written(index(tensors))
    return {CONFIG: written(config), **files}


def _auto_round(plan: Plan, default: Width) -> dict[str, Any]:
    """Its keys in the order of AutoRound's flow without a model."""
    coded = [coded for _, coded in coded_modules(plan.modules)]
    methods, version = {one.method for one in coded}, STORAGE[coded[0].scheme].version
    followed = {SEARCHES.get(method, "") for method in methods}
    rules = {**exact_rules(plan.modules, default), **expert_rules(plan.modules, default)}
    return {
        "quant_method": AUTO_ROUND,
        "packing_format": next(word for word, of in PACKING_FORMATS.items() if of == version),
        **default.entry(),
        "data_type": "int",
        "iters": 0,
        # AutoRound says so of plain rounding only: the rest needs the model.
        **({"model_free": True} if methods == {RTN} else {}),
        "autoround_version": _OLDEST if _OLDEST in followed else SEARCHES["opt-rtn"],
        "block_name_to_quantize": ",".join(blocks(plan.modules)),
        "extra_config": {name: _extra(width, default) for name, width in rules.items()},
    }


def _extra(width: Width | None, default: Width) -> dict[str, Any]:
    if width is None:
        return {"bits": 16, "data_type": "float"}
    usual = default.entry()
    # Always with bits: vLLM takes a module whose entry has none for one that is not quantized.
    changed = (
        pair for pair in width.entry().items() if pair[0] == "bits" or pair[1] != usual[pair[0]]
    )
    return dict(changed)


def _gptq(plan: Plan, default: Width) -> dict[str, Any]:
    """What its readers look up, and nothing about how it was made."""
    packed = {module.name: coded for module, coded in coded_modules(plan.modules)}
    version = STORAGE[next(iter(packed.values())).scheme].version
    rules = {**layer_rules(plan.modules, default), **expert_rules(plan.modules, default)}
    dynamic = {
        f"-:{pattern}" if width is None else f"+:{pattern}": width.entry() if width else {}
        for pattern, width in rules.items()
    }
    return {
        "bits": default.bits,
        "group_size": default.group_size,
        "desc_act": False,
        "sym": default.symmetric,
        "lm_head": "lm_head" in packed,
        "quant_method": GPTQ,
        "checkpoint_format": version,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


_DIALECTS = {AUTO_ROUND: _auto_round, GPTQ: _gptq}
