"""Policy text in, plan out, for the JANGTQ target: widths, sizes, layouts, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hash_sources import Recipe, write_source

from emitters import FORMATS
from emitters.checkpoints import forms_of
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory
from policy_dsl.language.load import load, parse_policy
from policy_dsl.plan import Module, Plan
from policy_dsl.planning.resolve import resolve
from policy_dsl.roles.architecture import architecture
from policy_dsl.sources.reference import open_source
from policy_dsl.treatments import describe
from tests.models import minimax, tiny

USUAL = "experts: 2bit; attention, embed, lm_head: 8bit; router, norm, router_bias: f16\n"


def planned(text: str, inventory: Inventory | None = None) -> Plan:
    policy, _ = parse_policy(text, "p.qpol")
    return resolve(policy, inventory or tiny(), FORMATS, target="jangtq_prestack")


def module(plan: Plan, name: str) -> Module:
    (found,) = [one for one in plan.modules if one.name == name]
    return found


def errors_of(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        planned(text)
    return [found.code for found in caught.value.diagnostics if found.severity == "error"]


def jang_config(plan: Plan) -> dict:
    return json.loads(FORMATS["jangtq_prestack"].files().metadata(plan)["jang_config.json"])


STACK = "model.layers.3.block_sparse_moe.switch_mlp"


def treated(module: Module) -> str:
    stored = describe(module.treatment)
    return f"keep ({stored})" if module.written == "keep" else stored


@pytest.mark.parametrize(
    ("text", "role", "treatment"),
    [
        ("experts: 1bit", "experts.up_proj", "1bit mxtq"),
        ("experts: 2bit", "experts.up_proj", "2bit mxtq"),
        ("experts: 3bit", "experts.down_proj", "3bit mxtq"),
        ("experts: 4bit", "experts.gate_proj", "4bit mxtq"),
        ("experts: 8bit", "experts.gate_proj", "8bit affine g64"),
        ("experts: 4bit affine g32", "experts.gate_proj", "4bit affine g32"),
        ("attention: 4bit", "attention.o_proj", "4bit affine g64"),
        ("all: 8bit", "embed", "8bit affine g64"),
        ("all: 8bit", "router", "keep (f16)"),
    ],
)
def test_gaps_are_filled_by_role_and_width(text: str, role: str, treatment: str) -> None:
    found = {treated(one) for one in planned(text).modules if one.role == role}
    assert found == {treatment}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("experts: 8bit mxtq", "unsupported-bits"),
        ("experts: 2bit mxtq g64", "unsupported-group-size"),
        ("experts: mxfp4", "foreign-scheme"),
        ("router_bias: 8bit", "not-a-matrix"),
        ("output layout stacked; all: 8bit", "unknown-layout"),
        ('metadata tool_parser "minimx"; all: 8bit', "bad-metadata-value"),
        ('metadata supports_tools "yes"; all: 8bit', "bad-metadata-value"),
        ("attention.o_proj: 4bit mxtq", "unsupported-treatment"),
        ("router: 4bit mxtq", "unsupported-treatment"),
        ("experts: 2bit; experts[0-3]: 4bit", "mixed-stack"),
        ("output layout per_expert; experts: 2bit; experts[0-3]: 4bit", "mixed-stack"),
    ],
)
def test_what_the_format_cannot_hold_is_an_error(text: str, code: str) -> None:
    assert errors_of(text) == [code]


def test_rows_too_short_for_a_codebook_are_refused(tmp_path: Path) -> None:
    recipe = Recipe(form="bf16", seed=1, H=64, I=3, E=32, L=1, V=64, heads=2, kv=1, hd=32)
    short = open_source(str(write_source(tmp_path / "source", recipe)))
    with pytest.raises(PolicyError, match="down_proj as 2bit mxtq: rows of fewer than 4"):
        planned(USUAL, short)
    planned(USUAL + "experts.down_proj: f16", short)


@pytest.mark.parametrize(
    ("policy", "nbytes"),
    [
        ("jangtq_2", 60_671_526_074),
        pytest.param("jangtq_k", 79_394_899_130, marks=pytest.mark.slow),
        pytest.param("jangtq_3", 94_607_639_738, marks=pytest.mark.slow),
        pytest.param("jangtq_4", 116_841_645_242, marks=pytest.mark.slow),
    ],
)
def test_the_real_model_has_the_published_sizes(policy: str, nbytes: int) -> None:
    plan = resolve(load(policy), minimax(), FORMATS)
    assert sum(one.nbytes for one in plan.modules) == nbytes
    assert plan.findings == ()
    assert plan.refusals == ()


def test_the_sentence_of_the_readme_does_what_it_says() -> None:
    text = "down_proj: 4bit mxtq; boundary layers 0-1,60-61: 8bit"
    plan = planned(text, minimax())
    found = {
        (one.role, one.layer in (0, 1, 60, 61)): treated(one)
        for one in plan.modules
        if one.layer is not None
    }
    assert found["experts.down_proj", False] == "4bit mxtq"
    assert found["experts.down_proj", True] == "8bit affine g64"
    assert found["experts.gate_proj", True] == "8bit affine g64"
    assert found["attention.q_proj", True] == "8bit affine g64"
    assert found["router", True] == "keep (f16)"
    assert [one.reader for one in plan.refusals] == ["vmlx-swift"]


def test_experts_are_added_up_to_a_multiple_of_32() -> None:
    plan = planned(USUAL)
    stack = module(plan, f"{STACK}.up_proj")
    assert (stack.shape, stack.added, len(stack.sources)) == ((32, 256, 256), 24, 8)
    assert stack.parameters == 8 * 256 * 256
    bias = module(plan, "model.layers.3.block_sparse_moe.e_score_correction_bias")
    assert bias.shape == (32,)
    # -10000 in float16.
    assert bias.tensors[0].tail == bytes.fromhex("e2f0") * 24
    assert module(plan, "model.layers.3.block_sparse_moe.gate").shape == (32, 256)
    files = FORMATS["jangtq_prestack"].files().metadata(plan)
    assert json.loads(files["config.json"])["num_local_experts"] == 32
    assert jang_config(plan)["expert_padding"]["original_num_local_experts"] == 8
    (told,) = [found for found in plan.findings if found.code == "experts-added"]
    assert "jangtq_prestack adds 24 experts to the 8 of every layer" in told.message


def test_a_rule_is_not_blamed_for_added_experts() -> None:
    """The routers have 32 rows instead of 8, each as large as in the source."""
    plan = planned("all: 8bit; experts: 2bit; router: f32; router_bias, norm: keep")
    assert module(plan, "model.layers.3.block_sparse_moe.gate").added == 24
    assert "larger-than-source" not in {found.code for found in plan.findings}


def test_a_policy_may_leave_the_expert_count_alone() -> None:
    plan = planned("output pad_experts false\n" + USUAL)
    assert module(plan, f"{STACK}.up_proj").shape == (8, 256, 256)
    assert not any(one.added for one in plan.modules)
    assert "expert_padding" not in jang_config(plan)
    assert "experts-added" not in {found.code for found in plan.findings}


def test_experts_can_lie_apart() -> None:
    plan = planned("output layout per_expert\n" + USUAL)
    block = "model.layers.3.block_sparse_moe.experts"
    one = module(plan, f"{block}.7.w3")
    assert one.sources[0].tensor.name == f"{block}.7.w3.weight"
    assert [tensor.shape for tensor in one.tensors] == [(256, 16), (256,), (1,)]
    added = module(plan, f"{block}.31.w2")
    assert (added.sources, added.parameters) == ((), 0)
    assert "routed_expert_layout" not in jang_config(plan)


def test_only_codes_lie_apart() -> None:
    plan = planned("output layout per_expert\n" + USUAL + "boundary 1: 8bit")
    assert module(plan, "model.layers.0.block_sparse_moe.switch_mlp.up_proj").shape[0] == 32
    assert module(plan, "model.layers.1.block_sparse_moe.experts.0.w1")


@pytest.mark.parametrize(
    ("rules", "profile"),
    [
        ("", "JANGTQ2"),
        ("down_proj: 4bit", "JANGTQ_K"),
        ("experts: 3bit", "JANGTQ3"),
        ("experts: 4bit", "JANGTQ4"),
        ("experts: 1bit", "custom"),
        ("experts.gate_proj: 4bit", "custom"),
        ("experts in layers 2-3: 4bit", "custom"),
        ("boundary 1: 8bit", "custom"),
        ("attention: 4bit", "custom"),
        ("attention: 8bit g32", "custom"),
        ("lm_head: f16", "custom"),
        ("router: bf16", "custom"),
    ],
)
def test_what_no_published_profile_names_is_custom(rules: str, profile: str) -> None:
    document = jang_config(planned(USUAL + rules))
    assert document["profile"] == profile
    assert ("modules" in document) == (profile == "custom")


def test_a_custom_bundle_names_every_matrix() -> None:
    plan = planned(USUAL + "boundary 1: 8bit; attention.q_proj: 4bit g32; lm_head: f16")
    modules = jang_config(plan)["modules"]
    assert modules[f"{STACK}.up_proj"] == {"scheme": "mxtq", "bits": 2}
    assert modules["model.layers.3.self_attn.q_proj"] == {
        "scheme": "affine",
        "bits": 4,
        "group_size": 32,
    }
    assert modules["lm_head"] == {"dtype": "f16"}
    files = FORMATS["jangtq_prestack"].files().metadata(plan)
    quantization = json.loads(files["config.json"])["quantization"]
    assert quantization["lm_head"] is False
    boundary = quantization["model.layers.0.block_sparse_moe.switch_mlp.up_proj"]
    assert boundary == {"group_size": 64, "bits": 8, "mode": "affine"}
    # The map of codes is no business of mlx-lm.
    assert f"{STACK}.up_proj" not in quantization


def test_a_width_of_the_head_alone_is_read_back() -> None:
    plan = planned(USUAL + "lm_head: 4bit g128")
    files = FORMATS["jangtq_prestack"].files()
    tensors = [tensor for one in plan.modules for tensor in one.tensors]
    forms = forms_of({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    head = files.claims(files.metadata(plan), forms)["lm_head"]
    assert (head.treatment.bits, head.treatment.group_size) == (4, 128)
    assert head.shape == module(plan, "lm_head").shape


@pytest.mark.parametrize(
    ("rules", "refusals"),
    [
        ("", []),
        ("experts.gate_proj: 4bit", ["jang", "vmlx-swift"]),
        ("experts.down_proj: 8bit", ["jang", "vmlx-swift"]),
        ("boundary 1: 8bit", ["vmlx-swift"]),
        ("experts in layers 2-3: 4bit", ["vmlx-swift", "vmlx-swift"]),
        ("attention.k_proj: 4bit", ["vmlx-swift"]),
        ("router: 8bit g32", ["jang"]),
        ("router_bias: f32", ["jang-runtime"]),
    ],
)
def test_readers_that_cannot_load_a_bundle_are_named(rules: str, refusals: list[str]) -> None:
    plan = planned(USUAL + rules)
    assert sorted({one.reader for one in plan.refusals}) == sorted(set(refusals))
    assert "runtime-refuses" not in {found.code for found in plan.findings}


def test_a_reader_that_the_author_named_is_warned_about() -> None:
    plan = planned("runtime vmlx-swift\n" + USUAL + "boundary 1: 8bit")
    told = [found for found in plan.findings if found.code == "runtime-refuses"]
    assert told
    assert all("vmlx-swift" in found.message for found in told)
    assert all(found.span is not None for found in told)


def test_the_stamp_takes_the_policys_words() -> None:
    text = 'metadata tool_parser "hunyuan"\nmetadata supports_thinking false\n' + USUAL
    stamp = jang_config(planned(text))["capabilities"]
    assert (stamp["tool_parser"], stamp["supports_thinking"]) == ("hunyuan", False)
    assert (stamp["reasoning_parser"], stamp["family"]) == ("qwen3", "minimax_m2")
    assert len(stamp) == 12


@pytest.mark.parametrize(
    ("family", "written", "name", "org"),
    [
        # What JANG's converter says of every MiniMax.
        ("minimax_m2", "", "MiniMax-M2.7", "MiniMaxAI"),
        ("minimax_m2", "model Org/Name\n", "Name", "Org"),
        ("minimax_m2", "model ./Name\n", "MiniMax-M2.7", "MiniMaxAI"),
        ("qwen3_moe", "", "tiny-minimax-m2", ""),
        ("qwen3_moe", "model Qwen/Qwen3-30B-A3B\n", "Qwen3-30B-A3B", "Qwen"),
        # Bundled policies are for that model, and used for others.
        ("qwen3_moe", "model MiniMaxAI/MiniMax-M2.7\n", "tiny-minimax-m2", ""),
    ],
)
def test_whose_model_it_is(family: str, written: str, name: str, org: str) -> None:
    plan = planned(f"{written}output pad_experts false\n{USUAL}")
    renamed = replace(plan.model, facts=replace(plan.model.facts, table=architecture(family)))
    found = jang_config(replace(plan, model=renamed))["source_model"]
    assert found == {"name": name, "org": org, "architecture": family}


def test_planned_files_are_complete_and_exact() -> None:
    plan = planned(USUAL)
    sizes = {file.name: file.nbytes for file in plan.files}
    assert None not in sizes.values()
    assert {"jangtq_runtime.safetensors", "tokenizer_config.json"} <= sizes.keys()


def test_a_family_without_experts_is_refused_by_name(write_llama) -> None:
    with pytest.raises(PolicyError) as caught:
        planned("all: 8bit", open_source(str(write_llama())))
    (found,) = caught.value.diagnostics
    assert found.code == "unsupported-family"
    assert "family llama: it has no experts" in found.message
