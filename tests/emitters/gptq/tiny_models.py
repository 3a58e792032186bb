"""Tiny models of the families, by the names and shapes that transformers saves, and plans."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from emitters import FORMATS
from emitters.checkpoints import forms_of
from policy_dsl.formats import Forms
from policy_dsl.inventory import Inventory, TensorInfo, tensor_nbytes
from policy_dsl.language.load import parse_policy
from policy_dsl.plan import Module, Plan
from policy_dsl.planning.resolve import resolve
from policy_dsl.treatments import Coded

GOLDEN = Path(__file__).parents[2] / "golden"
FAMILIES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "minimax_m2", "glm4_moe"),
    *("olmo2", "olmo3", "olmoe", "glm4_moe_lite"),
)
# What no reader packs, and a head that is not tied.
KEPT = """
embed, lm_head, norm, bias, router, router_bias, shared_expert_gate, conv, ssm: keep optional
linear_attention.in_proj_a, linear_attention.in_proj_b: keep optional
linear_attention.in_proj_ba, vision: keep optional
attention.wk, attention.weights_proj: keep optional
"""


@cache
def tiny(family: str) -> Inventory:
    """The recorded model of a family: three layers, rows of 32 to 128 values."""
    record = json.loads((GOLDEN / "architectures" / f"{family}.json").read_text())
    tensors = {}
    for key, found in record["saved"].items():
        pattern, written = key.split(" ")
        shape = tuple(map(int, written.split("x")))
        for numbers in found.partition(":")[2].split() or [""]:
            name = pattern
            for number in filter(None, numbers.split(".")):
                name = name.replace("#", number, 1)
            tensors[name] = TensorInfo(name, "BF16", shape, tensor_nbytes("BF16", shape))
    return Inventory("tiny", record["config"], tensors)


def planned(source: Inventory, rules: str, *, head: str = "") -> Plan:
    """The plan of rules for a model: linears at 4 bits but for them. head: other statements."""
    text = f"name p\ntarget gptq\ndefault group_size 32\n{head}\nall: 4bit\n{KEPT}\n{rules}\n"
    policy, _ = parse_policy(text, "p.qpol")
    return resolve(policy, source, FORMATS)


def packed(plan: Plan) -> dict[str, Module]:
    """The quantized modules of a plan."""
    return {one.name: one for one in plan.modules if isinstance(one.treatment, Coded)}


def forms(plan: Plan) -> Forms:
    """Dtypes and shapes of the plan's tensors, by module and part."""
    tensors = [tensor for module in plan.modules for tensor in module.tensors]
    return forms_of({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
