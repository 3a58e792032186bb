"""MTP blocks are treated as the model's own blocks: the same guards, classes and refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import emitters
from policy_dsl.diagnostics import PolicyError, SourceText
from policy_dsl.inventory import Inventory
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.plan import Plan
from policy_dsl.planning.fill import role_class
from policy_dsl.planning.lint import lint
from policy_dsl.planning.matching import is_guarded
from policy_dsl.planning.resolve import resolve
from policy_dsl.roles.classify import ModelTensor, classify
from policy_dsl.treatments import Coded, Plain, describe

SPECS = emitters.FORMATS
# Recorded model, a block of it, where its MTP block stands, config keys.
BLOCKS = [
    ("glm4_moe", 2, "model.layers.3.", {"num_nextn_predict_layers": 1}),
    ("deepseek_v3", 2, "model.layers.3.", {"num_nextn_predict_layers": 1}),
    ("qwen3_next", 1, "mtp.layers.0.", {}),
    ("qwen3_next", 2, "mtp.layers.0.", {}),
    ("qwen3_5_moe", 1, "mtp.layers.0.", {}),
    ("qwen3_5_moe", 2, "mtp.0.", {}),
    ("qwen3_5", 2, "mtp.layers.0.", {}),
]
TREATMENTS = [
    Coded("int", 4, 32, symmetric=True, method="rtn"),
    Coded("affine", 4, 64, symmetric=False, method="rtn"),
    Plain("BF16"),
]


def glm(changed: Callable[..., Any], tensor: Any, mtp_block: Any) -> Inventory:
    """GLM-4.5 with an MTP block that has an embedding, a head and a projection of its own."""
    extra = [tensor("model.layers.3.enorm.weight", [64])]
    extra += [
        tensor(f"model.layers.3.{name}.weight", [96, 64])
        for name in ("embed_tokens", "shared_head.head")
    ]
    extra += [tensor("model.layers.3.eh_proj.weight", [64, 128])]
    block = mtp_block("model.layers.3.", "glm4_moe", 2)
    inventory: Inventory = changed(
        "glm4_moe", with_tensors=[*extra, *block], config={"num_nextn_predict_layers": 1}
    )
    return inventory


@pytest.fixture
def plan_of(changed: Callable[..., Any], tensor: Any, mtp_block: Any) -> Callable[[str], Plan]:
    """Plans a policy for the GLM-4.5 with an MTP block."""

    def plan(text: str) -> Plan:
        policy = read_dsl(SourceText("p.qpol", text), "p")
        return resolve(policy, glm(changed, tensor, mtp_block), SPECS)

    return plan


def _treated(tensor: ModelTensor, model: Any) -> list[object]:
    """All that guards, tables and formats say of a tensor."""
    found: list[object] = [tensor.is_matrix, is_guarded(tensor), role_class(tensor)]
    for format in SPECS.values():
        found += [format.review.held(tensor, model, treatment) for treatment in TREATMENTS]
    return found


@pytest.mark.parametrize(("case", "layer", "prefix", "config"), BLOCKS)
def test_a_tensor_of_an_mtp_block_is_treated_as_its_namesake(
    changed: Callable[..., Any],
    mtp_block: Callable[..., Any],
    case: str,
    layer: int,
    prefix: str,
    config: dict[str, int],
) -> None:
    block = mtp_block(prefix, case, layer)
    model = classify(changed(case, with_tensors=block, config=config))
    own = {
        tensor.source.name.split(f"layers.{layer}.")[1]: tensor
        for tensor in model.tensors
        if tensor.layer == layer
    }
    compared = 0
    for tensor in model.tensors:
        if tensor.component == "mtp":
            namesake = own[tensor.source.name.removeprefix(prefix)]
            assert _treated(tensor, model) == _treated(namesake, model), tensor.source.name
            compared += 1
    assert compared >= len(own) > 5


def test_no_rule_packs_an_mtp_router_unless_it_names_it(plan_of: Callable[[str], Plan]) -> None:
    plan = plan_of(
        "target gptq\nall except embed, mtp.embed: 4bit g32\nmtp except mtp.embed: 8bit g32\n"
        '"model.layers.3.*" except mtp.embed: 8bit g32'
    )
    treatments = {
        module.name: (module.written, describe(module.treatment)) for module in plan.modules
    }
    assert treatments["model.layers.3.mlp.gate"] == ("keep", "bf16")
    assert treatments["model.layers.3.mlp.gate.e_score_correction_bias"] == ("keep", "bf16")
    assert treatments["model.layers.3.enorm"] == ("keep", "bf16")
    assert treatments["model.layers.3.self_attn.q_proj"] == ("quantize", "8bit int g32 sym")
    assert treatments["model.layers.3.shared_head.head"] == ("quantize", "8bit int g32 sym")


@pytest.mark.parametrize(
    ("role", "reason"),
    [("mtp.embed", "no reader looks rows up"), ("mtp.router", "no reader packs routers")],
)
def test_readers_refuse_what_they_refuse_of_the_model(
    plan_of: Callable[[str], Plan], role: str, reason: str
) -> None:
    with pytest.raises(PolicyError, match=reason) as caught:
        plan_of(f"target gptq\nattention: 4bit g32\n{role}: 4bit g32")
    (found,) = caught.value.diagnostics
    assert found.suggestion == f'write "{role}: keep" after it'
    # What the message offers is a policy, with the model and without it.
    cured = f"target gptq\nattention: 4bit g32\n{role}: keep"
    assert lint(read_dsl(SourceText("p.qpol", cured), "p"), SPECS) == ()
    plan_of(cured)


@pytest.mark.parametrize("named", ["mtp", '"model.layers.3.*"', "/.*layers.3.*/"])
def test_a_block_is_dropped_with_its_norms_and_routers(
    plan_of: Callable[[str], Plan], named: str
) -> None:
    plan = plan_of(f"target gptq\nattention: 4bit g32\n{named}: drop")
    assert not [module.name for module in plan.modules if module.role.startswith("mtp.")]
    assert {one.role for one in plan.omitted} >= {"mtp.router", "mtp.norm", "mtp.embed"}
    # Those of the model itself are dropped by name alone.
    kept = plan_of("target gptq\nattention: 4bit g32\nlayers 1: drop")
    assert {"router", "norm"} <= {module.role for module in kept.modules if module.layer == 1}
