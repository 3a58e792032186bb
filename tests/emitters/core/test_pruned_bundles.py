"""Bundles of a pruned model: the experts and rows of the whole model's bundle, renumbered."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child_builds import StoppedAt
from small_checkpoints import (
    digests,
    e4m3_values,
    mixtral_config,
    mixtral_tensors,
    nearest_bf16,
    stored,
    write_folder,
)

from emitters.core.build import build
from emitters.core.bundle_reading import Bundle, open_bundle
from emitters.core.decoding import opened
from emitters.core.record import BundleModule
from emitters.core.verify import VerifyReport, verify_bundle
from emitters.numerics.column_weights import awq_scale, forms_of_scale, gate_up_sums
from emitters.tensor_io.imatrix import open_imatrix
from policy_dsl.diagnostics import PolicyError
from policy_dsl.language.load import parse_policy
from policy_dsl.plan import Plan
from policy_dsl.planning.record import record_digest
from policy_dsl.sources.reference import open_source
from policyc.workflow import plan_for
from tests.models import IMATRIX, REAP, TINY, tiny

ROOT = Path(__file__).parents[3]
TO_SIX = "prune experts to 6 by reap"
# Routers too, and experts in every way that a target stores them.
RULES = {
    "mlx_affine": "all, router: 4bit g32",
    "jangtq_prestack": "all: 8bit g32; experts: 4bit",
    "jangtq_prestack apart": "all: 8bit g32; experts: 2bit; output layout per_expert",
    "jangtq_prestack unpadded": "all: 8bit g32; experts: 2bit; output pad_experts false",
    "hipfire_hfq": "all, router: q8; experts: mq4",
    "gptq": "attention, experts: 4bit int g32; embed, lm_head: keep",
    "gptq searched": "attention: 4bit int g32; experts: 4bit int g128 by opt-rtn; embed: keep",
    "gptq plain": "attention: 4bit int g32; experts, embed, lm_head: keep",
}
CASES = pytest.mark.parametrize("case", RULES)


def planned(case: str, prune: str = "", saliency: Path | None = None) -> Plan:
    target = case.partition(" ")[0]
    text = f"target {target}\n{prune}\n{RULES[case]}"
    policy, _ = parse_policy(text, "p.qpol")
    given = {"saliency": str(saliency)} if saliency else {}
    if "opt-rtn" in text or "awq" in text:
        given["imatrix"] = str(IMATRIX)
    return plan_for(policy, tiny(), None, statistics=given)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Bundle]:
    """Builds the embedded model once for each case, whole or pruned to six experts."""
    built: dict[tuple[str, bool], Bundle] = {}

    def make(case: str, *, pruned: bool) -> Bundle:
        if (case, pruned) not in built:
            folder = tmp_path_factory.mktemp("bundles") / "bundle"
            plan = planned(case, TO_SIX, REAP) if pruned else planned(case)
            build(plan, tiny(), out=folder, jobs=1)
            built[case, pruned] = open_bundle(folder)
        return built[case, pruned]

    return make


def contents(bundle: Bundle, module: BundleModule) -> dict[str, bytes]:
    """The bytes of each part of a module."""
    source = opened(bundle.inventory, bundle.folder)
    return {
        part: source.read(one.file or "", one.start, one.nbytes).tobytes()
        for part, one in module.tensors.items()
    }


def entries(content: bytes, module: BundleModule) -> list[bytes]:
    """The share of each expert, without those that were added."""
    count = module.shape[0]
    size = len(content) // count
    shares = [content[at * size : (at + 1) * size] for at in range(count)]
    return shares[: count - module.added]


@CASES
def test_a_pruned_bundle_holds_the_whole_ones_experts_and_rows(
    bundles: Callable[..., Bundle], case: str
) -> None:
    whole, pruned = bundles(case, pruned=False), bundles(case, pruned=True)
    assert pruned.record is not None
    assert pruned.record.pruning is not None
    kept = pruned.record.pruning.kept
    modules = {module.name: module for module in whole.modules}
    for module in pruned.modules:
        # An expert that was added.
        if module.added and module.added == module.shape[0]:
            continue
        old = kept[module.layer] if module.layer is not None else ()

        def called(found: re.Match[str], old: tuple[int, ...] = old) -> str:
            return f".experts.{old[int(found[1])]}"

        same = modules[re.sub(r"\.experts\.(\d+)", called, module.name)]
        stacked = module.role.startswith("router") or len(module.shape) == 3
        found, wanted = contents(pruned, module), contents(whole, same)
        for part, content in found.items():
            # The width of all experts is one byte.
            if not stacked or len(content) == 1:
                assert content == wanted[part], f"{module.name}.{part}"
            else:
                shares = entries(wanted[part], same)
                assert entries(content, module) == [shares[number] for number in old]


@CASES
def test_readers_are_told_the_new_count_and_the_record_the_old_numbers(
    bundles: Callable[..., Bundle], case: str
) -> None:
    bundle = bundles(case, pruned=True)
    added = {module.added for module in bundle.modules if module.role == "router"}
    assert added == ({26} if case in ("jangtq_prestack", "jangtq_prestack apart") else {0})
    assert bundle.inventory.config["num_local_experts"] == 6 + added.pop()
    assert bundle.inventory.config["num_experts_per_tok"] == 2
    record = json.loads((bundle.folder / "policyc.json").read_text())
    (transform,) = record["transforms"]
    kept = transform.pop("kept")
    assert transform == {"prune": "experts", "by": "reap", "before": 8, "to": 6}
    assert kept["0"] == [0, 1, 2, 3, 6, 7]
    assert sorted(kept, key=int) == [str(layer) for layer in range(6)]
    assert record["statistics"]["saliency"]["file"] == "reap.safetensors"
    assert record["omitted"] == []


@CASES
def test_a_pruned_bundle_is_compared_with_the_experts_that_it_kept(
    bundles: Callable[..., Bundle], case: str
) -> None:
    bundle = bundles(case, pruned=True)
    report = verify_bundle(_path(bundle), tiny(), jobs=1)
    assert report.findings == ()
    assert report.errors is not None
    by_role = {one.role: one.sums.relative or 0.0 for one in report.errors}
    assert by_role.keys() >= {"router", "router_bias", "experts.down_proj"}
    # Of other experts they would be as far away as they are large.
    assert max(by_role.values()) < 0.4


def _path(bundle: Bundle) -> Path:
    containers = sorted(bundle.folder.glob("*.mq4"))
    return containers[0] if containers else bundle.folder


def verified(folder: Path, source: Path = TINY) -> VerifyReport:
    return verify_bundle(folder, open_source(str(source)), jobs=1)


@pytest.mark.parametrize("case", ["mlx_affine", "gptq"])
def test_without_a_record_nobody_knows_which_experts_a_bundle_kept(
    bundles: Callable[..., Bundle], case: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(bundles(case, pruned=True).folder, tmp_path / "bundle")
    (folder / "policyc.json").unlink()
    (told,) = [one for one in verified(folder).findings if one.severity == "error"]
    assert told.code == "not-comparable"
    assert "it has 6 experts a layer and tiny-minimax-m2 has 8" in told.message


def test_padded_bundles_of_other_tools_are_no_pruned_ones(
    bundles: Callable[..., Bundle], tmp_path: Path
) -> None:
    folder = bundles("jangtq_prestack", pruned=False).folder
    folder = shutil.copytree(folder, tmp_path / "bundle")
    (folder / "policyc.json").unlink()
    assert verified(folder).ok


def test_a_source_that_never_had_these_experts(
    bundles: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = bundles("mlx_affine", pruned=True)
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    record = json.loads((folder / "policyc.json").read_bytes())
    record["transforms"][0]["before"] = 16
    record["digest"] = record_digest(record)
    (folder / "policyc.json").write_text(json.dumps(record))
    (told,) = verified(folder).findings
    assert "it keeps 6 of 16 experts in 6 layers; tiny-minimax-m2 has 8 in 6" in told.message


@pytest.mark.parametrize("kept", [{}, {"0": []}, {"x": [1]}, {"0": [-1]}, [[0]]])
def test_records_of_what_was_pruned_are_checked(
    bundles: Callable[..., Bundle], kept: Any, tmp_path: Path
) -> None:
    bundle = bundles("mlx_affine", pruned=True)
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    record = json.loads((folder / "policyc.json").read_bytes())
    record["transforms"][0]["kept"] = kept
    record["digest"] = record_digest(record)
    (folder / "policyc.json").write_text(json.dumps(record))
    assert [one.code for one in verified(folder).findings] == ["bad-record"]


def test_other_saliencies_are_another_build(tmp_path: Path) -> None:
    source, out = tiny(), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(planned("gptq", TO_SIX, REAP), source, out=out, jobs=1, progress=StoppedAt(30))
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"reap": [list(range(8))] * 6}))
    plan = planned("gptq", TO_SIX, other)
    with pytest.raises(PolicyError, match="the unfinished build of another file of statistics"):
        build(plan, source, out=out, jobs=1)
    moved = shutil.copy(REAP, tmp_path / "moved.safetensors")
    resumed = build(planned("gptq", TO_SIX, Path(moved)), source, out=out, jobs=1)
    assert resumed.resumed_nbytes > 0


def test_a_list_says_the_same_as_saliencies_that_choose_it(tmp_path: Path) -> None:
    chosen = tmp_path / "keep.json"
    chosen.write_text(json.dumps({"keep": [[7, 0, 2, 3, 4, 5]] * 6}))
    source = tiny()
    build(planned("mlx_affine", "prune experts keep 0,2-5,7"), source, out=tmp_path / "a")
    build(planned("mlx_affine", "prune experts to 6 by keep", chosen), source, out=tmp_path / "b")
    one, other = (digests(tmp_path / name) for name in ("a", "b"))
    assert {name for name in one if one[name] != other[name]} == {"policyc.json"}


def test_scales_of_columns_are_those_of_the_experts_that_stay(tmp_path: Path) -> None:
    rules = "all, router: q8; experts: mq4; experts.gate_proj, experts.up_proj: mq4 by awq"
    policy, _ = parse_policy(f"target hipfire_hfq\n{TO_SIX}\n{rules}", "p.qpol")
    source = tiny()
    given = {"saliency": str(REAP), "imatrix": str(IMATRIX)}
    plan = plan_for(policy, source, None, statistics=given)
    build(plan, source, out=tmp_path / "out", jobs=1)
    assert verified(tmp_path / "out").findings == ()
    bundle, imatrix = open_bundle(tmp_path / "out"), open_imatrix(IMATRIX)
    for module in bundle.modules:
        if module.role != "awq_scale":
            continue
        sums = [
            imatrix.sums(role, module.layer, n_matrices=8, columns=256)
            .of(plan.old_experts(module.layer))
            .sums
            for role in ("experts.gate_proj", "experts.up_proj")
        ]
        scale = forms_of_scale(awq_scale(gate_up_sums(*sums), 0.55), exact=True)
        assert contents(bundle, module)["weight"] == scale.stored.tobytes()


def test_a_build_needs_to_know_who_stays(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="pending-statistics"):
        build(planned("mlx_affine", TO_SIX), tiny(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_experts_of_a_fused_source_are_pruned_too(tmp_path: Path, *, fused: bool) -> None:
    """FP8 with a grid of scales for each expert, of which two of four stay."""
    tensors = mixtral_tensors(fused=fused, inner=192)
    scales = np.random.default_rng(3).uniform(0.001, 0.002, (4, 3, 2)).astype(np.float32)
    down = np.random.default_rng(4).integers(0, 126, (4, 64, 192)).astype(np.uint8)
    path = "model.layers.0"
    if fused:
        grid = {f"{path}.mlp.experts.down_proj_scale_inv": ("F32", scales[:, :1])}
        tensors |= {f"{path}.mlp.experts.down_proj": ("F8_E4M3", down), **grid}
    else:
        for number in range(4):
            name = f"{path}.block_sparse_moe.experts.{number}.w2.weight"
            grid = {f"{name}_scale_inv": ("F32", scales[number, :1])}
            tensors |= {name: ("F8_E4M3", down[number]), **grid}
    described = {"quant_method": "fp8", "weight_block_size": [128, 96]}
    config = {**mixtral_config(inner=192), "quantization_config": described}
    write_folder(tmp_path / "source", config, tensors)
    (tmp_path / "source" / "tokenizer.json").write_text('{"model": {}}')
    policy, _ = parse_policy("target mlx_affine\nprune experts keep 1,3\nall: keep", "p.qpol")
    source = open_source(str(tmp_path / "source"))
    plan = plan_for(policy, source, None)
    build(plan, source, out=tmp_path / "out", jobs=1)
    assert verified(tmp_path / "out", tmp_path / "source").findings == ()
    kept, spread = [1, 3], scales[:, :1].repeat(64, axis=1).repeat(96, axis=2)
    expected = nearest_bf16(e4m3_values()[down] * spread)[kept]
    moe = f"{path}.block_sparse_moe"
    whole = mixtral_tensors(fused=False, inner=192)
    found = stored(tmp_path / "out")
    assert found[f"{moe}.switch_mlp.down_proj.weight"][1:] == ((2, 64, 192), expected.tobytes())
    for part, word in (("gate_proj", "w1"), ("up_proj", "w3")):
        rows = [whole[f"{moe}.experts.{number}.{word}.weight"][1] for number in kept]
        assert found[f"{moe}.switch_mlp.{part}.weight"][2] == np.stack(rows).tobytes()
    router = whole[f"{moe}.gate.weight"][1][kept]
    assert found[f"{moe}.gate.weight"][1:] == ((2, 64), router.tobytes())
    # Two of four experts, and their scales.
    experts = 3 * 2 * 192 * 64 * 2 - 2 * 192 * 64
    assert sum(one.nbytes for one in plan.omitted) == experts + 2 * scales[0, :1].nbytes
