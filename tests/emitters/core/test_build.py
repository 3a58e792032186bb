"""What a build writes: the planned bytes, the same ones every time, and nothing else."""

from __future__ import annotations

import hashlib
import json

import jsonschema
import numpy as np
import pytest
from recorded_bundles import metadata_texts, recorded_digests, recorded_texts, tensor_digests
from small_checkpoints import (
    Array,
    digests,
    e4m3_values,
    mixtral_config,
    mixtral_tensors,
    nearest_bf16,
    stored,
    widened,
    write_folder,
)

from emitters.core.build import build
from emitters.core.record import read_record
from policy_dsl import DOCUMENT_SCHEMAS, room

KEPT = "name: kept\ntarget: mlx_affine\nrules: |\n  all: keep\n  norm: keep\n"
POLICIES = sorted(path.stem for path in room("policies").glob("*.*"))
# policy -> values for `--set`, where the embedded model needs other numbers than the policy's.
NEEDED_VALUES = {"reap_w4a16": {"experts": "6"}}


# The like of each of these is fast.
SLOW = {"hipfire_mq2", "hipfire_mq2_lloyd", "hipfire_mq3", "jangtq_2", "jangtq_3", "jangtq_4"}


@pytest.mark.parametrize(
    "policy",
    [pytest.param(one, marks=[pytest.mark.slow] if one in SLOW else []) for one in POLICIES],
)
def test_planned_and_recorded_bytes_are_built_bytes(
    demo, imatrix, saliency, planned, tmp_path, policy
):
    files, values = {"imatrix": imatrix, "saliency": saliency}, NEEDED_VALUES.get(policy, {})
    plan, inventory = planned(demo, policy, **files, **values)
    build(plan, inventory, out=tmp_path / "out", jobs=2)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert sizes == {file.name: file.nbytes for file in plan.files}
    tensors = [tensor for module in plan.modules for tensor in module.tensors]
    facts = {tensor.name: (tensor.dtype, tensor.shape, tensor.nbytes) for tensor in tensors}
    built = stored(tmp_path / "out")
    assert {name: (*found[:2], len(found[2])) for name, found in built.items()} == facts
    # Compared here, where every policy is built, and not in a test that builds them again.
    digests_now, recorded = tensor_digests(tmp_path / "out"), recorded_digests(policy)
    assert digests_now.keys() == recorded.keys()
    assert [name for name, digest in recorded.items() if digests_now[name] != digest] == []
    assert metadata_texts(tmp_path / "out") == recorded_texts(policy)


@pytest.mark.parametrize("policy", ["config_i", "mlx_4bit", "hipfire_mq2"])
def test_workers_and_blocks_do_not_matter(demo, imatrix, planned, tmp_path, policy):
    plan, inventory = planned(demo, policy, imatrix=imatrix)
    found = []
    for jobs, max_memory in ((1, None), (2, None), (8, None), (3, 258 * 2**20)):
        out = tmp_path / f"{jobs}"
        build(plan, inventory, out=out, jobs=jobs, max_memory=max_memory)
        found.append(digests(out))
    assert found.count(found[0]) == 4


def test_the_record_tells_the_truth_and_no_place(demo, planned, tmp_path):
    plan, inventory = planned(demo, "config_i")
    report = build(plan, inventory, out=tmp_path / "out")
    text = (tmp_path / "out" / "policyc.json").read_text()
    record = json.loads(text)
    jsonschema.validate(record, json.loads((DOCUMENT_SCHEMAS / "bundle.json").read_text()))
    hashes = digests(tmp_path / "out")
    del hashes["policyc.json"]
    assert {name: file["sha256"] for name, file in record["files"].items()} == hashes
    tensors = {
        name: hashlib.sha256(content).hexdigest()
        for name, (_, _, content) in stored(tmp_path / "out").items()
    }
    read = read_record(tmp_path / "out")
    assert read is not None
    assert read.tensors == tensors
    assert record["digest"] == report.digest
    assert record["policy"]["text"] == (room("policies") / "config_i.yaml").read_text()
    assert str(tmp_path) not in text
    assert str(demo.parent) not in text


def test_the_record_holds_extended_rules_and_set_values(demo, planned, tmp_path):
    plan, inventory = planned(demo, "mlx_mixed_3_6", low="4")
    build(plan, inventory, out=tmp_path / "out")
    policy = json.loads((tmp_path / "out" / "policyc.json").read_text())["policy"]
    assert "all: 4bit" in policy["resolved"]
    assert hashlib.sha256(policy["resolved"].encode()).hexdigest() == policy["digest"]


def test_side_files_are_copied_and_the_source_is_not_touched(write_llama, planned, tmp_path):
    source = write_llama()
    before = digests(source), {path: path.stat().st_mtime_ns for path in source.iterdir()}
    plan, inventory = planned(source)
    build(plan, inventory, out=tmp_path / "out")
    after = digests(source), {path: path.stat().st_mtime_ns for path in source.iterdir()}
    assert before == after
    built = digests(tmp_path / "out")
    assert built["LICENSE"] == before[0]["LICENSE"]
    assert built["tokenizer.json"] == before[0]["tokenizer.json"]
    assert "notes.md" not in built
    assert not (tmp_path / "out.partial").exists()


def test_plain_tensors_are_kept_cast_or_copied(write_llama, planned, tmp_path):
    source = write_llama()
    rules = "  all: keep\n  lm_head: f32\n  o_proj: f16\n  embed: raw\n  norm: keep\n"
    plan, inventory = planned(source, f"name: plain\ntarget: mlx_affine\nrules: |\n{rules}")
    build(plan, inventory, out=tmp_path / "out")
    before, after = stored(source), stored(tmp_path / "out")
    assert after["model.norm.weight"] == before["model.norm.weight"]
    assert after["model.embed_tokens.weight"] == before["model.embed_tokens.weight"]
    exact = widened(before["lm_head.weight"][2])
    assert after["lm_head.weight"] == ("F32", (96, 64), exact.tobytes())
    name = "model.layers.1.self_attn.o_proj.weight"
    assert after[name] == ("F16", (64, 64), widened(before[name][2]).astype("f2").tobytes())
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(("dtype", "storage"), [("F16", "f2"), ("F32", "f4")])
def test_other_floats_of_the_same_values_give_the_same_bytes(
    write_llama, planned, tmp_path, dtype, storage
):
    def change(tensors: dict[str, tuple[str, Array]]) -> None:
        for name, (_, bits) in tensors.items():
            tensors[name] = (dtype, widened(bits.tobytes()).reshape(bits.shape).astype(storage))

    found = []
    for name, changed in (("bf16", None), (dtype, change)):
        plan, inventory = planned(write_llama(changed, name=name))
        build(plan, inventory, out=tmp_path / f"{name}-built")
        found.append(stored(tmp_path / f"{name}-built"))
    assert found[0] == found[1]


def test_fused_experts_give_what_single_ones_give(tmp_path, planned):
    found = []
    for name in ("single", "fused"):
        source = tmp_path / name
        tensors = mixtral_tensors(fused=name == "fused", inner=128)
        write_folder(source, mixtral_config(inner=128), tensors)
        plan, inventory = planned(source)
        build(plan, inventory, out=tmp_path / f"{source.name}-built", jobs=2)
        found.append(stored(tmp_path / f"{source.name}-built"))
    assert found[0] == found[1]


def test_fused_fp8_experts_are_dequantized_block_by_block(tmp_path, planned):
    # `up` begins at row 192, inside a block; every row ends with a smaller block.
    tensors = mixtral_tensors(fused=True, inner=192)
    random = np.random.default_rng(3)
    codes = random.choice(np.delete(np.arange(256), (127, 255)), (4, 384, 64)).astype(np.uint8)
    scales = random.uniform(0.001, 0.002, (4, 3, 2)).astype(np.float32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors |= {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F32", scales)}
    described = {"quant_method": "fp8", "weight_block_size": [128, 48]}
    config = {**mixtral_config(inner=192), "quantization_config": described}
    write_folder(tmp_path / "source", config, tensors)
    plan, inventory = planned(tmp_path / "source", KEPT)
    build(plan, inventory, out=tmp_path / "out", max_memory=258 * 2**20)
    spread = scales.repeat(128, axis=1).repeat(48, axis=2)[:, :384, :64]
    expected = nearest_bf16(e4m3_values()[codes] * spread)
    built = stored(tmp_path / "out")
    for part, rows in (("gate_proj", slice(0, 192)), ("up_proj", slice(192, 384))):
        dtype, shape, content = built[f"model.layers.0.block_sparse_moe.switch_mlp.{part}.weight"]
        assert (dtype, shape) == ("BF16", (4, 192, 64))
        assert content == expected[:, rows].tobytes()
    assert b"weight_block_size" not in (tmp_path / "out" / "config.json").read_bytes()
