"""Every reader finds each module's own width in a configuration, by the names that it uses."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reader_lookups import Width, by_auto_round, by_gptqmodel, by_vllm, by_vllm_gptq
from tiny_models import FAMILIES, planned, tiny

from emitters import FORMATS
from policy_dsl.language.load import parse_policy
from policy_dsl.plan import Module, Plan
from policy_dsl.planning.resolve import resolve
from policy_dsl.treatments import Coded

ROOT = Path(__file__).parents[3]
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
LOW_RANK = ("q_a_proj", "kv_a_proj_with_mqa")
MOE = frozenset({"mixtral", "minimax_m2", "qwen3_moe", "glm4_moe", "olmoe", "glm4_moe_lite"})
# Rules after `all: 4bit`, for any family and for those with experts.
MIXED = {
    "uniform": "",
    "attention by layer": "attention in layers 1: 8bit g64",
    "kept attention": "attention: keep",
    "one kept": "o_proj in layers 0, 2: keep",
    "groups only": "attention: 4bit g64; o_proj: 4bit g-1",
    "head": "lm_head: 8bit optional",
    "head alike": "lm_head: 4bit optional",
    "head alone": "all: keep; lm_head: 4bit optional",
}
EXPERTS = {
    "layer of experts": "experts in layers 1: 8bit g-1",
    "layers of experts": "experts in layers 1-2: 8bit; attention: 8bit g64",
    "kept experts": "experts in layers 2: keep",
    "experts by group": "experts in layers 2: 4bit g-1",
    "experts only": "all: keep; experts: 4bit",
    "attention only": "all: keep; attention: 4bit",
    "all layers differ": "experts in layers 0: 8bit optional; experts in layers 1: 4bit g-1",
}


def width(module: Module) -> Width:
    treatment = module.treatment
    if not isinstance(treatment, Coded):
        return None
    return treatment.bits, treatment.group_size, treatment.symmetric


def linears(plan: Plan) -> dict[str, Module]:
    """The modules that are linears to readers: matrices with a weight of their own."""
    return {
        one.name: one
        for one in plan.modules
        if len(one.shape) == 2 and one.role != "embed" and one.tensors[0].name != one.name
    }


def config_of(plan: Plan) -> Any:
    files = FORMATS["gptq"].files().metadata(plan)
    return json.loads(files["config.json"])["quantization_config"]


def joined(plan: Plan) -> Mapping[str, tuple[str, ...]]:
    """What vLLM's class of the family joins, by the name that it gives it."""
    if plan.model.architecture.family in ("mixtral", "minimax_m2"):
        return {"qkv_proj": QKV}
    if plan.model.architecture.family == "glm4_moe_lite":
        return {"fused_qkv_a_proj": LOW_RANK, "gate_up_proj": GATE_UP}
    return {"qkv_proj": QKV, "gate_up_proj": GATE_UP}


def vllm_names(plan: Plan) -> dict[str, set[Width]]:
    """vLLM's names for the plan's linears -> the widths of what it holds there.

    It makes routers without asking how they are stored, but for Qwen3-MoE's.
    """
    family = plan.model.architecture.family
    words = {member: word for word, members in joined(plan).items() for member in members}
    found: dict[str, set[Width]] = defaultdict(set)
    for name, module in linears(plan).items():
        if module.role == "router" and family != "qwen3_moe":
            continue
        parent, _, last = name.rpartition(".")
        if match := re.fullmatch(r"(.+\.experts)\.\d+", parent):
            own = match[1]
        else:
            own = f"{parent}.{words.get(last, last)}".removeprefix(".")
        if family == "minimax_m2":
            own = own.replace(".block_sparse_moe", ".mlp")
        found[own].add(width(module))
    return found


CASES = [
    *((family, case) for family in FAMILIES for case in MIXED),
    *((family, case) for family in sorted(MOE) for case in EXPERTS),
]


def plan_of(family: str, case: str, dialect: str) -> Plan:
    rules = {**MIXED, **EXPERTS}[case]
    head = f"metadata dialect {dialect}"
    return planned(tiny(family), rules.replace("; ", "\n"), head=head)


@pytest.mark.parametrize(("family", "case"), CASES)
def test_auto_round_finds_every_linear_as_it_is_stored(family, case):
    for dialect in ("auto-round", "gptq"):
        plan = plan_of(family, case, dialect)
        config, found = config_of(plan), linears(plan)
        told = {name: by_auto_round(config, name, found) for name in found}
        assert told == {name: width(module) for name, module in found.items()}


@pytest.mark.parametrize(("family", "case"), CASES)
def test_vllm_finds_every_module_under_its_own_names(family, case):
    plan = plan_of(family, case, "auto-round")
    config, names = config_of(plan), vllm_names(plan)
    told = {name: {by_vllm(config, name, joined(plan))} for name in names}
    assert told == names


@pytest.mark.parametrize(("family", "case"), CASES)
def test_readers_of_the_gptq_dialect_find_the_same(family, case):
    plan = plan_of(family, case, "gptq")
    config, names, found = config_of(plan), vllm_names(plan), linears(plan)
    packed = [name for name, module in found.items() if width(module)]
    told = {name: {by_vllm_gptq(config, name, joined(plan), packed)} for name in names}
    assert told == names
    told = {name: by_gptqmodel(config, name) for name in found if found[name].role != "router"}
    assert told == {name: width(found[name]) for name in told}


def test_projections_of_experts_that_differ_are_told_one_by_one():
    # vLLM has one width for them, which the plan says; other readers do not mind.
    plan = planned(tiny("minimax_m2"), "experts.down_proj in layers 0, 2: 8bit")
    config, found = config_of(plan), linears(plan)
    told = {name: by_auto_round(config, name, found) for name in found}
    assert told == {name: width(module) for name, module in found.items()}
    assert any(one.reader == "vllm" for one in plan.refusals)


def test_rules_for_many_experts_are_few():
    plan = planned(tiny("minimax_m2"), "experts in layers 0, 2: keep")
    told = config_of(plan)["extra_config"]
    (pattern,) = [key for key in told if "experts" in key]
    assert pattern == r".*layers\.(0|2)\.(mlp|block_sparse_moe)\.experts.*"
    assert told[pattern] == {"bits": 16, "data_type": "float"}


def test_rules_for_experts_name_the_block_that_holds_them():
    plan = planned(tiny("jamba"), "experts in layers 3: keep; linear_attention: keep")
    assert r".*layers\.3\.feed_forward\.experts.*" in config_of(plan)["extra_config"]


def test_shared_experts_are_no_experts():
    plan = planned(tiny("glm4_moe"), "experts in layers 1: 8bit")
    config, found = config_of(plan), linears(plan)
    shared = [name for name, one in found.items() if one.role.startswith("shared_experts")]
    assert shared
    assert {by_auto_round(config, name, found) for name in shared} == {(4, 32, True)}


@pytest.mark.parametrize("packed", [False, True])
def test_prediction_blocks_are_not_layers_of_the_model(packed):
    """Their first block is number 0 too, and stays plain: the model's own experts do not."""
    source, block = tiny("qwen3_5_moe"), "model.language_model.layers.0."
    alike = [one for one in source.tensors.values() if one.name.startswith(block)]
    named = [one._replace(name=one.name.replace(block, "mtp.layers.0.")) for one in alike]
    tensors = {**source.tensors, **{one.name: one for one in named}}
    source = replace(source, tensors=tensors)
    mtp = "mtp: 4bit\nmtp.shared_expert_gate, mtp.conv, mtp.in_proj_a, mtp.in_proj_b: keep optional"
    rules = mtp if packed else "mtp: keep"
    wanted = {f"{block}mlp.experts": (4, 32, True), "mtp.layers.0.mlp.experts": None}
    if packed:
        wanted["mtp.layers.0.mlp.experts"] = (4, 32, True)
    plan = planned(source, rules)
    config = config_of(plan)
    assert {name: by_vllm(config, name, joined(plan)) for name in wanted} == wanted
    plan = planned(source, rules, head="metadata dialect gptq")
    config = config_of(plan)
    assert {name: by_vllm_gptq(config, name, joined(plan), ()) for name in wanted} == wanted


def test_the_layout_of_the_publishers_of_qwen3_5():
    """Of their GPTQ-Int4 releases: routed experts, or the blocks of a dense model, alone."""
    text = (ROOT / "policies" / "qwen3_5_gptq_int4.yaml").read_text().replace("g128", "g32")
    policy, _ = parse_policy(text, "p.yaml")
    for family, words in (("qwen3_5_moe", ".mlp.experts."), ("qwen3_5", ".mlp.")):
        plan = resolve(policy, tiny(family), FORMATS)
        packed = {name for name, module in linears(plan).items() if width(module)}
        assert packed == {
            one.name
            for one in plan.modules
            if words in one.name and one.role.endswith("_proj") and "visual" not in one.name
        }
        config = config_of(plan)
        assert {key: config[key] for key in ("quant_method", "bits", "sym", "desc_act")} == {
            "quant_method": "gptq",
            "bits": 4,
            "sym": True,
            "desc_act": False,
        }
        parts = {tensor.name for one in plan.modules for tensor in one.tensors}
        assert all(f"{name}.g_idx" in parts for name in packed)
        assert [one for one in plan.refusals if one.reader == "vllm"] == []
