"""Policy text in, plan out: who decides, what is refused, what is warned about."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from emitters.mlx_affine import FORMAT
from policy_dsl.diagnostics import PolicyError, SourceText
from policy_dsl.inventory import Inventory
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.plan import Plan
from policy_dsl.planning.outline import treatment_of
from policy_dsl.planning.resolve import resolve
from policy_dsl.quantities import both_units, parse_size
from tests.models import minimax, tiny

SPECS = {FORMAT.name: FORMAT}


def planned(text: str, inventory: Inventory | None = None) -> Plan:
    policy = read_dsl(SourceText("p.qpol", text), "p")
    return resolve(policy, inventory or tiny(), SPECS, target="mlx_affine")


def treatments(plan: Plan, role: str) -> dict[int | None, str]:
    return {m.layer: treatment_of(m) for m in plan.modules if m.role == role}


def codes(text: str, inventory: Inventory | None = None) -> list[str]:
    try:
        plan = planned(text, inventory)
    except PolicyError as error:
        return sorted({found.code for found in error.diagnostics if found.severity == "error"})
    return sorted({found.code for found in plan.findings})


def test_the_last_matching_rule_decides_whole() -> None:
    plan = planned("all: 4bit g128; experts.down_proj: 3bit; boundary 1: 8bit")
    assert treatments(plan, "experts.down_proj") == {
        0: "8bit affine g64",
        **dict.fromkeys(range(1, 5), "3bit affine g64"),
        5: "8bit affine g64",
    }
    assert treatments(plan, "attention.q_proj")[1] == "4bit affine g128"
    assert treatments(plan, "attention.q_proj")[0] == "8bit affine g64"
    assert treatments(plan, "embed") == {None: "4bit affine g128"}


def test_routers_norms_and_biases_are_touched_only_by_name() -> None:
    plan = planned(
        'all: 4bit; boundary 6: 8bit; "*block_sparse_moe*": 4bit; all except embed: 4bit; '
        r"experts, all: 4bit; attention, layers 0-5: 4bit; /.*(gate|norm|q_proj)\.weight/: 4bit"
    )
    assert set(treatments(plan, "router").values()) == {"keep (f32)"}
    assert set(treatments(plan, "norm").values()) == {"keep (bf16)"}
    assert set(treatments(plan, "router_bias").values()) == {"keep (f32)"}


@pytest.mark.parametrize(
    "selector",
    ["router", "router in layers 0-5", '"*.block_sparse_moe.gate.weight"', "all, router"],
)
def test_a_rule_that_names_the_router_touches_it(selector: str) -> None:
    plan = planned(f"all: 4bit; {selector}: 8bit")
    assert set(treatments(plan, "router").values()) == {"8bit affine g64"}


@pytest.mark.parametrize(
    ("selector", "layers"),
    [
        ("layers 0-1,4", {0, 1, 4}),
        ("layers -2..-1", {4, 5}),
        ("layers where i % 2 == 0 and i < n // 2", {0, 2}),
        ("boundary 2", {0, 1, 4, 5}),
        ("boundary layers 0,5", {0, 5}),
        ("layers 0-5 except layers 2-3", {0, 1, 4, 5}),
    ],
)
def test_layer_selectors(selector: str, layers: set[int]) -> None:
    body = f"({selector})" if "except" in selector else selector
    plan = planned(f"all: 4bit; attention.q_proj in {body}: 8bit")
    chosen = {at for at, how in treatments(plan, "attention.q_proj").items() if "8bit" in how}
    assert chosen == layers


def test_middle_is_the_complement_of_the_boundary() -> None:
    plan = planned("all: 4bit; boundary 2: 8bit; experts.down_proj in middle: 3bit")
    downs = treatments(plan, "experts.down_proj")
    assert [at for at, how in downs.items() if "3bit" in how] == [2, 3]


@pytest.mark.parametrize(
    "alias", ["w2", "experts.w2", "experts.down_proj", "down_proj", "experts except gate_up_proj"]
)
def test_aliases_of_the_architecture(alias: str) -> None:
    plan = planned(f"all: 4bit; {alias}: 3bit")
    assert set(treatments(plan, "experts.down_proj").values()) == {"3bit affine g64"}
    assert set(treatments(plan, "experts.up_proj").values()) == {"4bit affine g64"}


@pytest.mark.parametrize(
    ("text", "treatment"),
    [
        ("all: 4bit", "4bit affine g64"),
        ("default scheme mxfp4; all: 4bit", "4bit mxfp4 g32"),
        ("default scheme mxfp4; all: 4bit affine", "4bit affine g64"),
        ("default group_size 128; all: 4bit", "4bit affine g128"),
        ("default group_size 128; all: 4bit g32", "4bit affine g32"),
        ("default group_size 128; all: nvfp4", "4bit nvfp4 g16"),
        ("default bits 3; all: affine", "3bit affine g64"),
        ("default bits 3; all: 5bit affine", "5bit affine g64"),
    ],
)
def test_gaps_are_filled_by_the_defaults_then_by_the_target(text: str, treatment: str) -> None:
    assert set(treatments(planned(text), "experts.up_proj").values()) == {treatment}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("experts.dwon_proj: 4bit", "unknown-role"),
        ("mlp: 4bit", "matches-nothing"),
        ("attention in layers 4-6: 4bit", "number-outside-model"),
        ("attention in layers -7..-1: 4bit", "number-outside-model"),
        ("all: 4bit; experts[6-9]: 4bit", "number-outside-model"),
        ("middle: 4bit", "middle-without-boundary"),
        ("all: 7bit", "unsupported-bits"),
        ("all: 4bit g16", "unsupported-group-size"),
        ("all: 4bit sym", "no-symmetric-choice"),
        ("all: 4bit by gptq", "unsupported-method"),
        ("all: 4bit mxtq", "foreign-scheme"),
        ("all: mxfp4 g64", "unsupported-group-size"),
        ("all: affine", "missing-bits"),
        ("norm: 4bit", "not-a-matrix"),
        ("router_bias: 8bit", "not-a-matrix"),
        ("attention: raw", "raw-unreadable"),
        ("experts[0-3]: 4bit; experts[4-7]: 8bit", "mixed-stack"),
        ("experts[0-3]: 4bit", "mixed-stack"),
    ],
)
def test_what_the_target_or_the_model_cannot_do_is_an_error(text: str, code: str) -> None:
    assert codes(text) == [code]


def test_a_group_must_divide_the_rows(recorded) -> None:
    llama, _ = recorded("llama")
    widths = {tensor.shape[-1] for tensor in llama.tensors.values() if len(tensor.shape) > 1}
    assert any(width % 128 for width in widths)
    assert codes("all: 4bit g128", llama) == ["group-does-not-divide"]


def test_group_sizes_that_would_do_are_named(recorded, changed, tensor) -> None:
    llama, _ = recorded("llama")
    with pytest.raises(PolicyError, match=r"\^ g64 or g32 would\n"):
        planned("all: 4bit g128; norm, mlp: keep", llama)
    mlp = [one for one in llama.tensors.values() if ".mlp." in one.name]
    sizes = {"intermediate_size": 100}
    odd = [tensor(one.name, [100 if n == 128 else n for n in one.shape]) for one in mlp]
    with pytest.raises(PolicyError, match=r"\^ no group size of affine does: `keep` it\n"):
        planned("mlp: 4bit", changed("llama", without=".mlp.", with_tensors=odd, config=sizes))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("all: 4bit; all: 3bit", "shadowed-rule"),
        ("experts: 4bit", "unreached-matrices"),
        ("all: 4bit; router: 6bit", "below-usual-width"),
        ("all: 8bit; attention: bf16", "larger-than-source"),
        ("all: 4bit; embed: drop", "dropped-tensors"),
        ('metadata licence "mit"; all: 4bit', "unused-setting"),
        ('calibration imatrix "x.gguf"; all: 4bit', "unused-setting"),
        ("output layout per_expert; all: 4bit", "unused-setting"),
        ("runtime mlx-lmm; all: 4bit", "unknown-runtime"),
        ("all: 4bit; boundary layers 0-1: 8bit", "not-the-boundary"),
    ],
)
def test_what_is_legal_and_often_a_mistake_is_a_warning(text: str, code: str) -> None:
    assert code in codes(text)


def test_as_many_bits_as_the_source_has_are_no_waste() -> None:
    """FP8 has 8 bits, and 8-bit groups have 8.5 with their scales: nobody can change that."""
    assert "larger-than-source" not in codes("all: 8bit")


def test_one_foreign_scheme_is_one_error_that_names_its_home() -> None:
    text = "down_proj: 4bit mxtq; boundary layers 0-1,60-61: 8bit"
    with pytest.raises(PolicyError) as caught:
        planned(text, minimax())
    (found,) = [d for d in caught.value.diagnostics if d.severity == "error"]
    assert found.code == "foreign-scheme"
    assert "jangtq_prestack" in found.message
    assert found.span is not None
    assert found.span.location == "p.qpol:1:12"


def test_rules_of_other_families_and_optional_rules_may_match_nothing() -> None:
    text = "all: 4bit; router and family mixtral: 4bit; mlp: 3bit optional"
    text += "; shared_experts.up_proj: 2bit optional"
    assert codes(text) == []


def test_widths_are_told_for_the_tensors_that_lack_them() -> None:
    with pytest.raises(PolicyError, match="mlx_affine cannot store matrices at 7 bits; it has"):
        planned("attention: 7bit; all except attention: keep")


def test_an_unnamed_tensor_takes_otherwise_but_a_router_never_does() -> None:
    plan = planned("otherwise 4bit; embed: 8bit")
    assert set(treatments(plan, "attention.q_proj").values()) == {"4bit affine g64"}
    assert set(treatments(plan, "router").values()) == {"keep (f32)"}


def test_every_source_tensor_is_used_once_or_left_out_with_a_reason() -> None:
    plan = planned("all: 4bit; lm_head: drop")
    used = [rows.tensor.name for module in plan.modules for rows in module.sources]
    scales = [rows.scale.name for m in plan.modules for rows in m.sources if rows.scale]
    omitted = [left.tensor.name for left in plan.omitted]
    assert omitted == ["lm_head.weight"]
    assert sorted([*used, *scales, *omitted]) == sorted(tiny().tensors)


def test_the_order_of_the_sources_tensors_does_not_matter() -> None:
    backwards = dict(reversed(tiny().tensors.items()))
    plan = planned("all: 4bit", dataclasses.replace(tiny(), tensors=backwards))
    assert plan.modules == planned("all: 4bit").modules


def test_files_are_filled_without_gaps_in_the_order_of_the_safetensors_library() -> None:
    plan = planned("output shard_size 2MiB; all: 4bit; router: bf16")
    assert len({t.file for m in plan.modules for t in m.tensors}) > 2
    for file in (file for file in plan.files if file.kind == "tensors"):
        inside = sorted(
            (t for m in plan.modules for t in m.tensors if t.file == file.name),
            key=lambda tensor: tensor.start,
        )
        for one, following in pairwise(inside):
            assert one.start + one.nbytes == following.start
        assert inside[-1].start + inside[-1].nbytes == file.nbytes
        assert sum(tensor.nbytes for tensor in inside) <= 2 * 2**20


@pytest.mark.parametrize("text", ["all: 4bit", "all: nvfp4; router: keep; norm: f32"])
def test_places_are_those_that_the_safetensors_library_gives(text: str) -> None:
    # The library's numpy part does not know bfloat16.
    config = {**tiny().config, "torch_dtype": "float16"}
    half = dataclasses.replace(tiny(), config=config)
    plan = planned(f"output shard_size 2MiB; {text}", half)
    types = {"F32": np.float32, "U32": np.uint32, "F16": np.float16, "U8": np.uint8}
    for file in plan.tensor_files:
        inside = [t for m in plan.modules for t in m.tensors if t.file == file.name]
        content = save(
            {t.name: np.zeros(t.shape, types[t.dtype]) for t in inside}, {"format": "mlx"}
        )
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        places = {t.name: start + header[t.name]["data_offsets"][0] for t in inside}
        assert places == {t.name: t.start for t in inside}
        assert len(content) == file.nbytes


def test_a_shard_takes_what_just_fits_and_none_is_empty() -> None:
    size = sum(tensor.nbytes for m in planned("all: 4bit").modules for tensor in m.tensors)
    for limit, count in ((size, 1), (size - 1, 2)):
        plan = planned(f"output shard_size {limit}; all: 4bit")
        assert len({tensor.file for m in plan.modules for tensor in m.tensors}) == count
    plan = planned("output shard_size 1KiB; all: 4bit")
    used = {tensor.file for module in plan.modules for tensor in module.tensors}
    assert used == {file.name for file in plan.files if file.kind == "tensors"}


def test_sizes_are_read_as_they_are_printed() -> None:
    written = {"2.5 kB": 2500, "2.5KB": 2500, "3 KiB": 3072, "1MB": 10**6, "4096": 4096}
    assert {text: parse_size(text) for text in written} == written
    assert parse_size(both_units(3072).partition(" = ")[0]) == 3070
    assert [parse_size(text) for text in ("", "5kb", "5 k", "iB", "-1")] == [None] * 5


def test_a_policy_without_a_target_says_so() -> None:
    policy = read_dsl(SourceText("p.qpol", "all: 4bit"), "p")
    with pytest.raises(PolicyError, match="no-target"):
        resolve(policy, tiny(), SPECS)
    with pytest.raises(PolicyError, match="cannot write gptq yet"):
        resolve(policy, tiny(), SPECS, target="gptq")


def test_refused_families_say_why() -> None:
    config = tiny().config
    renamed = dataclasses.replace(tiny(), config={**config, "model_type": "no_such_model"})
    assert codes("all: 4bit", renamed) == ["unknown-architecture"]


_NAMES = ["all", "experts", "down_proj", "attention.q_proj", "router", "norm", "embed", "w1"]
_WHERE = ["", " in layers 0-1", " in boundary 1", " in layers where i % 2 == 0"]
_HOW = ["2bit", "3bit g32", "8bit g128", "mxfp4", "nvfp4", "keep", "bf16", "drop"]
_RULE = st.builds(
    "{}{}: {}".format, st.sampled_from(_NAMES), st.sampled_from(_WHERE), st.sampled_from(_HOW)
)


@settings(max_examples=40)
@given(st.lists(_RULE, min_size=1, max_size=6).map("; ".join))
def test_resolve_is_total_and_deterministic(text: str) -> None:
    try:
        plan = planned(text)
    except PolicyError as error:
        found = error.diagnostics
        assert found
        return
    assert planned(text) == plan
