"""Experts as modules: stacked or apart, some added, and what no bundle can hold of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from emitters.mlx_affine import FORMAT
from emitters.mlx_affine.spec import SPEC
from policy_dsl.diagnostics import PolicyError
from policy_dsl.formats import ExpertPadding, ExpertsApart, FormatSpec
from policy_dsl.inventory import Inventory
from policy_dsl.language.load import parse_policy
from policy_dsl.plan import Plan
from policy_dsl.planning.resolve import resolve
from tests.models import families_of, tiny

BLOCK = "model.layers.3.block_sparse_moe"


def path_apart(path: str, expert: int) -> str:
    return path.replace("switch_mlp", f"experts.{expert}")


# The embedded model has 8 experts: 4 are added.
PADDED = replace(SPEC, padding={"minimax_m2": ExpertPadding(12, -100.0)})
APART = replace(PADDED, layouts={"apart": ExpertsApart(path_apart, ("affine",))})
ANY_FAMILY = replace(SPEC, families={**families_of(SPEC.name), "gpt_oss": None})


def planned(text: str, spec: FormatSpec = SPEC, inventory: Inventory | None = None) -> Plan:
    policy, _ = parse_policy(text, "p.qpol")
    formats = {spec.name: replace(FORMAT, spec=spec)}
    return resolve(policy, inventory or tiny(), formats, target=spec.name)


def errors_of(text: str, spec: FormatSpec, inventory: Inventory | None = None) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        planned(text, spec, inventory)
    return [found.code for found in caught.value.diagnostics if found.severity == "error"]


@pytest.mark.parametrize("spec", [SPEC, PADDED, APART], ids=["stacks", "padded", "apart"])
def test_single_experts_cannot_be_dropped(spec: FormatSpec) -> None:
    """The others would move up, and the router would still choose by the old numbers."""
    assert errors_of("all: 8bit; experts[0-1]: drop", spec) == ["partial-stack"]
    assert errors_of("all: 8bit; experts[7]: drop", spec) == ["partial-stack"]


@pytest.mark.parametrize("spec", [SPEC, APART], ids=["stacks", "apart"])
def test_a_stack_is_not_called_partial_for_experts_that_are_wrong(spec: FormatSpec) -> None:
    assert errors_of("all: 8bit; experts[0-1]: 8bit g100", spec) == ["unsupported-group-size"]


def test_all_experts_of_a_layer_can_be_dropped() -> None:
    plan = planned("all: 8bit; experts in layers 3: drop")
    assert not [one for one in plan.modules if one.name.startswith(f"{BLOCK}.switch_mlp")]


def test_added_experts_are_as_large_as_the_others_and_have_no_parameters() -> None:
    whole, padded, apart = (planned("all: 8bit", spec) for spec in (SPEC, PADDED, APART))
    experts = [
        [one for one in plan.modules if one.role.startswith("experts.")]
        for plan in (whole, padded, apart)
    ]
    sizes = [sum(one.nbytes for one in found) for found in experts]
    assert sizes == [sizes[0], sizes[0] * 12 // 8, sizes[0] * 12 // 8]
    assert len({sum(one.parameters for one in found) for found in experts}) == 1
    assert len(experts[2]) == 6 * 12 * 3


@pytest.mark.parametrize(("wish", "told"), [("true", ["p.qpol:1:20"]), ("false", [])])
def test_experts_that_are_wanted_and_not_added_are_told(
    recorded: Callable[..., tuple[Inventory, object]], wish: str, told: list[str]
) -> None:
    spec = replace(PADDED, settings=("output.pad_experts",))
    text = f"output pad_experts {wish}; all: 8bit g32"
    plan = planned(text, spec, recorded("qwen3_moe")[0])
    found = [one for one in plan.findings if one.code == "experts-not-added"]
    assert [one.span.location for one in found if one.span] == told
    assert "experts-not-added" not in {one.code for one in planned(text, spec).findings}


def test_the_correction_of_added_experts_is_stored_in_the_dtype_of_the_others() -> None:
    tails = {}
    for word in ("f32", "f16", "bf16"):
        plan = planned(f"all: 8bit; router_bias: {word}", PADDED)
        bias = next(one for one in plan.modules if one.role == "router_bias")
        tails[word] = bias.tensors[0].tail.hex()
    # -100 is a number in each of them.
    assert tails == {"f32": "0000c8c2" * 4, "f16": "40d6" * 4, "bf16": "c8c2" * 4}


@pytest.mark.parametrize(
    ("treatment", "code"),
    [
        ("keep", "unsupported-source-layout"),
        ("4bit", "unsupported-source-layout"),
        ("raw", "raw-unreadable"),
    ],
)
@pytest.mark.parametrize("projection", ["gate_proj", "down_proj"])
def test_packed_values_cannot_be_rows(
    packed_gpt_oss: Inventory, projection: str, treatment: str, code: str
) -> None:
    text = f"experts: drop; experts.{projection}: {treatment}"
    assert errors_of(text, ANY_FAMILY, packed_gpt_oss) == [code]
