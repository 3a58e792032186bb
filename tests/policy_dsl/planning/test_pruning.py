"""Pruning experts: which stay, what is left of the model, and what cannot be pruned."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emitters import FORMATS
from emitters.mlx_affine import FORMAT
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory
from policy_dsl.language.load import parse_policy
from policy_dsl.plan import Plan, Pruning
from policy_dsl.planning.pruning import highest, pruned
from policy_dsl.planning.resolve import resolve
from policy_dsl.roles.classify import classify
from policy_dsl.sources.reference import open_source
from policy_dsl.sources.saliency import Saliency, read_saliency
from policy_dsl.views import Picked
from tests.models import REAP, minimax, tiny

ROOT = Path(__file__).parents[3]
RECORDED = json.loads((ROOT / "tests" / "golden" / "reap" / "pruned.json").read_text())
TO_SIX = "prune experts to 6 by reap\n"
RULES = {
    "mlx_affine": "all: 4bit g32",
    "jangtq_prestack": "all: 8bit g32; experts: 2bit",
    "hipfire_hfq": "all, router: q8; experts: mq4",
    "gptq": "attention, experts: 4bit int g32; embed, lm_head: keep",
}
# Models of four experts, and where their names come from.
MODELS = [
    *(("saved", name) for name in ("minimax_m2", "mixtral", "qwen3_moe", "qwen3_next")),
    *(("saved", name) for name in ("deepseek_v3", "glm4_moe", "gpt_oss", "qwen3_5_moe")),
    *(("memory", name) for name in ("minimax_m2", "qwen3_moe", "kimi_k25", "gpt_oss")),
]


def planned(
    text: str,
    saliency: Saliency | None = None,
    *,
    target: str = "mlx_affine",
    inventory: Inventory | None = None,
) -> Plan:
    policy, _ = parse_policy(text, "p.qpol")
    inventory = inventory or tiny()
    return resolve(policy, inventory, FORMATS, target=target, saliency=saliency)


def refusal(text: str, inventory: Inventory | None = None) -> Any:
    with pytest.raises(PolicyError) as caught:
        planned(f"{text}\nall: 4bit g32", inventory=inventory)
    (found,) = caught.value.diagnostics
    return found


def with_config(**values: object) -> Inventory:
    found = tiny()
    return replace(found, config={**found.config, **values})


@pytest.mark.parametrize("case", RECORDED)
def test_the_same_experts_are_pruned_as_by_reap(case: str) -> None:
    saliency, gone = RECORDED[case]["saliency"], RECORDED[case]["pruned"]
    kept = highest(saliency, len(saliency) - len(gone))
    assert sorted({*range(len(saliency))} - {*kept}) == gone


@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, float("inf")]), min_size=1), st.data())
def test_those_that_stay_rank_before_those_that_go(ranks: list[float], data: Any) -> None:
    count = data.draw(st.integers(1, len(ranks)))
    kept = highest(ranks, count)
    assert len(kept) == count
    assert list(kept) == sorted(set(kept))
    for gone in {*range(len(ranks))} - {*kept}:
        # Of equal ones the lower number stays.
        assert all((-ranks[one], one) < (-ranks[gone], gone) for one in kept)


def fewer(inventory: Inventory, count: int, before: int = 4) -> Inventory:
    """The checkpoint of a model that has only the first experts, written by hand."""
    tensors = {}
    for name, tensor in inventory.tensors.items():
        path = name.split(".")
        at = path.index("experts") + 1 if "experts" in path else 0
        if at and path[at].isdecimal() and int(path[at]) >= count:
            continue
        entries = "experts" in path and not path[at].isdecimal()
        entries = entries or path[-2] in ("gate", "router") or "e_score" in name
        shape = (count, *tensor.shape[1:]) if entries else tensor.shape
        tensors[name] = tensor._replace(shape=shape)
    config = dict(inventory.config)
    for place in (config, config.get("text_config") or {}):
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            if key in place:
                place[key] = count
    return replace(inventory, tensors=tensors, config=config)


def test_experts_that_are_the_identity_stay_behind_the_others() -> None:
    source = open_source(str(ROOT / "tests" / "golden" / "families" / "longcat_flash"))
    plan = planned("prune experts keep 1-3\nall: keep", inventory=source)
    routers = [one for one in plan.modules if one.role.startswith("router")]
    assert {one.role: one.shape for one in routers} == {"router": (5, 64), "router_bias": (5,)}
    # Of four experts, and two that are the identity.
    kept = {view.operations[-1] for one in routers for view in one.sources}
    assert kept == {Picked((1, 2, 3, 4, 5))}


@pytest.mark.parametrize(("form", "case"), MODELS)
def test_a_pruned_model_is_the_model_of_fewer_experts(
    form: str, case: str, recorded: Callable[..., Any]
) -> None:
    whole = classify(recorded(case, form)[0])
    layers = {one.layer for one in whole.tensors if one.expert is not None}
    kept = dict.fromkeys(sorted(layers), (0, 1, 2))
    less, lost = pruned(whole, Pruning(4, kept))
    wanted = classify(fewer(recorded(case, form)[0], 3))
    assert less.config == wanted.config
    assert less.n_experts == wanted.n_experts == 3

    def seen(model: Any) -> Counter[Any]:
        return Counter((t.source.name, t.role, t.layer, t.expert, t.shape) for t in model.tensors)

    assert seen(less) == seen(wanted)
    # A quarter of the experts' bytes is left out.
    assert {one.expert for one in lost} == {3}
    sources = {t.source for t in whole.tensors if t.expert is not None}
    assert 4 * sum(one.nbytes for one in lost) == sum(one.nbytes for one in sources)


def test_experts_are_renumbered_in_their_old_order() -> None:
    plan = planned(f"{TO_SIX}all: 4bit g32", read_saliency(REAP, "reap"))
    assert plan.pruning is not None
    kept = plan.pruning.kept[1]
    assert kept == (0, 2, 3, 4, 6, 7)
    (stack,) = (m for m in plan.modules if m.layer == 1 and m.role == "experts.down_proj")
    path = "model.layers.1.block_sparse_moe.experts"
    assert [one.tensor.name for one in stack.sources] == [f"{path}.{old}.w2.weight" for old in kept]
    routers = [m for m in plan.modules if m.layer == 1 and m.role in ("router", "router_bias")]
    assert {(module.shape, module.sources[0].operations) for module in routers} == {
        ((6, 256), (Picked(kept),)),
        ((6,), (Picked(kept),)),
    }


@pytest.mark.parametrize("target", RULES)
def test_without_saliencies_sizes_are_known_all_the_same(target: str) -> None:
    rules = RULES[target]
    stand_in = planned(f"{TO_SIX}{rules}", target=target)
    known = planned(f"{TO_SIX}{rules}", read_saliency(REAP, "reap"), target=target)
    (cure,) = stand_in.pending
    assert "run REAP's observer" in cure
    assert "`prune experts keep …`" in cure
    assert (known.pending, known.statistics[0].name) == ((), "saliency")
    for one, other in zip(stand_in.modules, known.modules, strict=True):
        assert (one.name, one.shape, one.tensors) == (other.name, other.shape, other.tensors)


def test_the_published_model_has_the_published_parameters() -> None:
    inventory = minimax()
    plan = planned("prune experts to 192 by reap\nall: 4bit", inventory=inventory)
    assert sum(module.parameters for module in plan.modules) == 172_507_452_032
    assert len({rows.tensor.name for m in plan.modules for rows in m.sources}) == 36_335
    assert len(plan.omitted) == 3 * 3_968
    assert plan.pruning is not None
    assert plan.pruning.about.startswith("256 -> 192 experts in 62 layers by reap; not ranked yet")


def test_rules_choose_by_the_new_numbers_and_patterns_by_the_old_names() -> None:
    text = "prune experts keep 0,2,4,5,6,7\nall, router: q8\nexperts: mq4\n"
    with pytest.raises(PolicyError, match=r"expert 6 is outside .* has experts 0-5"):
        planned(f"{text}experts[6]: mq4", target="hipfire_hfq")
    # The old 7 is the new 5: the second rule takes all that the first one has.
    text += '"*.experts.7.w2.*": mq4\nexperts[5].w2: mq4'
    found = planned(text, target="hipfire_hfq").findings
    assert [one.span.place[1] for one in found if one.code == "shadowed-rule" and one.span] == [4]


@pytest.mark.parametrize("to", ["to 8", "keep 0-7"])
def test_pruning_to_all_changes_nothing(to: str) -> None:
    whole, same = planned("all: 4bit g32"), planned(f"prune experts {to}\nall: 4bit g32")
    assert [(m.sources, m.tensors) for m in same.modules] == [
        (m.sources, m.tensors) for m in whole.modules
    ]
    assert same.omitted == ()


@pytest.mark.parametrize(
    ("text", "inventory", "code", "told"),
    [
        ("prune experts to 9", None, "prune-count", "cannot be pruned to 9: the model has 8"),
        ("prune experts keep 0-8", None, "prune-count", "to 9: the model has 8"),
        ("prune experts keep 0,8", None, "number-outside-model", "expert 8 is outside"),
        ("prune experts to 1", None, "prune-below-routed", "num_experts_per_tok"),
        ("prune experts to 6", {"n_group": 2}, "prune-in-groups", "2 groups of them (n_group)"),
        ("prune experts to 6", {"text_config": {"n_group": 8}}, "prune-in-groups", "8 groups"),
    ],
)
def test_what_cannot_be_pruned(text: str, inventory: Any, code: str, told: str) -> None:
    found = refusal(text, with_config(**inventory) if inventory else None)
    assert found.code == code
    assert told in found.message
    assert found.span.location == "p.qpol:1:1"


def test_one_group_is_no_group() -> None:
    assert planned(f"{TO_SIX}all: 4bit g32", inventory=with_config(n_group=1)).pruning


def test_a_model_without_experts_has_none_to_prune(recorded: Callable[..., Any]) -> None:
    found = refusal("prune experts to 1", recorded("qwen3")[0])
    assert (found.code, found.message[-15:]) == ("prune-count", "the model has 0")


def test_experts_of_mtp_blocks_must_not_be_left_over(
    changed: Callable[..., Any], mtp_block: Callable[..., Any]
) -> None:
    """mlx-lm leaves the blocks out; a target that carries them has no count for them."""
    block = mtp_block("model.layers.3.", "glm4_moe", 2)
    config = {"num_nextn_predict_layers": 1}
    inventory = changed("glm4_moe", with_tensors=block, config=config)
    text = "prune experts to 3 by reap\nall: 8bit g32\n"
    assert planned(text, inventory=inventory).pruning
    carrying = replace(FORMAT, review=replace(FORMAT.review, left_out=lambda tensor, model: None))
    policy, _ = parse_policy(text, "p.qpol")
    with pytest.raises(PolicyError) as caught:
        resolve(policy, inventory, {"mlx_affine": carrying}, target="mlx_affine")
    (found,) = caught.value.diagnostics
    assert found.code == "prune-beside-mtp"
    assert found.suggestion == "leave them out with `mtp: drop`"
    policy, _ = parse_policy(f"{text}mtp: drop", "p.qpol")
    assert resolve(policy, inventory, {"mlx_affine": carrying}, target="mlx_affine").pruning


@pytest.mark.parametrize("text", ["", "prune experts keep 0-5\n"])
def test_a_ranking_that_nothing_asks_for_is_told(text: str) -> None:
    text = f'{text}calibration saliency "x.json"\nall: 4bit g32'
    (found,) = [one for one in planned(text).findings if one.code == "unused-statistics"]
    assert found.span is not None
    policy, _ = parse_policy("all: 4bit g32", "p.qpol")
    given = {"saliency": "x.json"}
    plan = resolve(policy, tiny(), FORMATS, target="mlx_affine", statistics=given)
    assert [one.code for one in plan.findings] == ["unused-statistics"]
    assert plan.statistics == ()


def test_layers_of_a_saved_plan_without_numbers_share_them():
    # As a tuple for each layer they would take 34 GB.
    entry = {"before": 65536, "to": 65535, "layers": 65536, "kept": None, "by": "reap"}
    kept = Pruning.of_entries([entry]).kept
    assert len(kept) == 65536
    assert len({id(numbers) for numbers in kept.values()}) == 1
