"""Bundles of families whose tensors mlx-lm rearranges, against what it made of the same sources.

The cases are small checkpoints as publishers write them, with the digests of stock mlx-lm's own
conversion: 4 bits in groups of 32, and what each class decides otherwise.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from family_cases import (
    CASES,
    GOLDEN,
    MLX_4BIT,
    OF_LATENT_LAYERS,
    TIED,
    expected,
    planned,
    rules_for,
    source_of,
)

from emitters.core.build import build
from emitters.core.verify import verify_bundle
from emitters.mlx_affine import FORMAT
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import coded_modules
from policy_dsl.reader_config import written_config
from policy_dsl.roles.architecture import architecture, family_of
from policy_dsl.roles.model import is_one_of
from policy_dsl.sources.reference import open_source
from policy_dsl.treatments import Coded, Plain


def digests(folder: Path) -> dict[str, dict[str, Any]]:
    """Every tensor of a bundle, as the golden files list them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        n = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + n]).items():
            if name != "__metadata__":
                start, stop = (8 + n + at for at in entry["data_offsets"])
                digest = hashlib.sha256(content[start:stop]).hexdigest()
                form = {"dtype": entry["dtype"], "shape": entry["shape"]}
                found[name] = {**form, "sha256": digest}
    return found


@pytest.mark.parametrize("case", [one for one in CASES if one != TIED])
def test_the_bundled_policy_has_the_widths_of_stocks_default(case: str, tmp_path: Path) -> None:
    source, stock = open_source(str(source_of(case, tmp_path))), expected(case)
    family = family_of(source.config)
    if family is None or architecture(family).refusal("mlx_affine") or not stock["bundle"]:
        pytest.skip("one of the two does not take it")
    coded = coded_modules(planned(source, MLX_4BIT, "p.yaml").modules)
    widths = {module.name: one.bits for module, one in coded}
    forms = stock["quantization"].items()
    wanted = {name: form["bits"] for name, form in forms if isinstance(form, dict)}
    differing = {name for name in widths if widths[name] != wanted.get(name)}
    assert differing <= OF_LATENT_LAYERS
    assert not wanted.keys() - widths.keys()


@pytest.mark.parametrize("case", CASES)
def test_tables_name_all_that_stock_treats_otherwise(case: str, tmp_path: Path) -> None:
    source, stock = open_source(str(source_of(case, tmp_path))), expected(case)
    model_table = architecture(family_of(source.config) or "")
    if model_table.refusal("mlx_affine") or not stock["bundle"] or case == TIED:
        pytest.skip("one of the two does not take it")
    plan, differing = planned(source, "all: keep"), {}
    for module in plan.modules:
        form, own = (
            stock["quantization"].get(module.name),
            FORMAT.review.usual(module, plan.model),
        )
        is_bare = is_one_of(module.name, model_table.mlx.bare)
        is_matrix = len(module.shape) > 1 and module.tensors[0].name != module.name
        bits = form["bits"] if form else 16
        if form or (is_matrix and not is_bare and module.shape[-1] % 32 == 0):
            differing |= {} if own == (None if bits == 4 else bits) else {module.name: bits}
    # Only in layers of one kind, which no pattern of names knows.
    assert differing.keys() <= OF_LATENT_LAYERS


def warned(case: str, rules: str) -> list[str]:
    """The warnings of a plan for a case, which has no tokenizer."""
    findings = planned(open_source(str(GOLDEN / case)), rules).findings
    return [one.message for one in findings if one.code != "no-tokenizer"]


def test_fewer_bits_than_stock_gives_are_a_finding() -> None:
    gates = "all: 4bit g32; router, shared_expert_gate: 6bit g32"
    wanted = "get 6 bits; the readers' own conversion gives them 8"
    assert warned("qwen3_5_moe", gates) == [
        f"2 modules of router {wanted}",
        f"2 modules of shared_expert_gate {wanted}",
    ]
    assert not warned("qwen3_5_moe", gates.replace("6bit", "8bit"))
    plain = "embed: 8bit g32"
    assert warned("bailing_moe_v3", f"all, router: keep; {plain}") == [
        "1 module of embed get 8 bits; the readers' own conversion gives them 16"
    ]


def test_a_router_that_nobody_protects_is_a_finding() -> None:
    assert warned("mistral4", "all: 4bit g32; router: 8bit g32") == [
        "the policy quantizes 1 router"
    ]
    assert not warned("mistral4", "all: 4bit g32")


def test_the_gate_of_a_shared_expert_is_touched_only_by_name() -> None:
    plan = planned(
        open_source(str(GOLDEN / "qwen3_5_moe")), "all: 4bit g32; shared_experts: 4bit g32"
    )
    gates = [one for one in plan.modules if one.role == "shared_expert_gate"]
    assert [type(one.treatment) for one in gates] == [Plain] * 2
    assert "unreached-matrices" not in {one.code for one in plan.findings}


def test_a_correction_that_the_reader_does_without_is_a_finding() -> None:
    reason = "mlx-lm chooses experts without the correction of the router, so its answers differ"
    assert warned("ernie4_5_moe", "all: 4bit g32") == [f"mlx-lm, mlx-swift-lm: {reason}"]


def test_a_group_that_does_not_divide_a_part_is_refused_with_the_role_of_the_part() -> None:
    source = open_source(str(GOLDEN / "glm_moe_dsa_fp8"))
    rules = "all: keep; attention.kv_b_proj: 4bit g64"
    with pytest.raises(PolicyError) as caught:
        planned(source, rules)
    (finding,) = caught.value.diagnostics
    assert finding.message == "groups of 64 do not divide the 96 columns"
    assert finding.suggestion == "g32 would, also in a rule for attention.embed_q alone"
    plan = planned(source, f"{rules}; attention.embed_q: keep")
    coded = {one.role for one in plan.modules if isinstance(one.treatment, Coded)}
    assert coded == {"attention.unembed_out"}


def test_a_bundle_without_the_second_attention_of_a_layer_is_refused(tmp_path: Path) -> None:
    source = open_source(str(GOLDEN / "longcat_flash"))
    plan = planned(source, "all: keep; mlp.gate_proj: 4bit g32")
    build(plan, source, out=tmp_path / "out", jobs=1)
    assert not missing(tmp_path / "out")
    for path in (tmp_path / "out").glob("model*"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"self_attn.1.o_proj", b"self_attn.2.o_proj"))
    # What made it is not known any more.
    (tmp_path / "out" / "policyc.json").unlink()
    assert missing(tmp_path / "out") == ["out has no attention.o_proj in layer 0"]


def test_tables_of_n_grams_are_refused_by_the_key_that_announces_them(tmp_path: Path) -> None:
    folder = source_of("deepseek_v41", tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"engram_layer_ids": [1]}
    source = open_source(str(folder))
    shapes = {"embed": (512, 32), "wkv": (192, 96), "q_weight": (2, 64), "k_weight": (2, 64)}
    tensors = {}
    for word, shape in shapes.items():
        name = f"layers.1.engram.{word}" + ".weight" * ("_" not in word)
        tensors[name] = TensorInfo(name, "BF16", shape, 2 * shape[0] * shape[1])
    source = replace(source, config=config, tensors={**source.tensors, **tensors})
    with pytest.raises(PolicyError) as caught:
        planned(source, "all: keep")
    (finding,) = caught.value.diagnostics
    assert finding.code == "no-reader"
    assert "it computes with `engram_layer_ids` [], and this model has [1]" in finding.message


def test_sizes_of_layers_by_number_reach_the_reader() -> None:
    source = open_source(str(GOLDEN / "gemma4"))
    text = dict(source.config["text_config"])
    size = text.pop("global_head_dim")
    text["per_layer_config"] = {"1": {"head_dim": size}, "3": {"head_dim": size}}
    source = replace(source, config={**source.config, "text_config": text})
    written = written_config(planned(source, "all: keep"), "mlx_lm")
    assert written["text_config"]["global_head_dim"] == size


def missing(folder: Path) -> list[str]:
    """What a bundle's readers look for and do not find."""
    findings = verify_bundle(folder, None, jobs=1).findings
    return [one.message for one in findings if one.code == "missing-tensor"]


@pytest.mark.parametrize("case", CASES)
def test_bundles_are_those_of_stock_mlx_lm(case: str, tmp_path: Path) -> None:
    source = open_source(str(source_of(case, tmp_path)))
    family = family_of(source.config)
    if family is None or architecture(family).refusal("mlx_affine") is not None:
        pytest.skip("not taken")
    stock = expected(case)
    # Where stock refuses the source, the plain tensors are known.
    known = stock["bundle"] or stock["tensors"]
    rules = rules_for(source, stock["quantization"]) if stock["bundle"] else "all: keep"
    plan = planned(source, rules)
    build(plan, source, out=tmp_path / "out", jobs=1)
    found = digests(tmp_path / "out")
    keys = ("dtype", "shape", "sha256")
    wanted = {name: {key: one[key] for key in keys} for name, one in known.items()}
    if case == TIED:
        kept = [name for name in wanted if "embed_tokens" in name]
        for name in kept:
            wanted.pop(name)
            found.pop(name, None)
    assert {name: (one["dtype"], one["shape"]) for name, one in found.items()} == {
        name: (one["dtype"], one["shape"]) for name, one in wanted.items()
    }
    assert [name for name in wanted if found[name] != wanted[name]] == []
    report = verify_bundle(tmp_path / "out", source, jobs=1)
    assert [str(one) for one in report.findings if one.severity == "error"] == []
    assert report.ok
