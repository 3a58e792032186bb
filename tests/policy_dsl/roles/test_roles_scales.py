"""Scales go with the weight that they scale, and have the shape of its blocks."""

from __future__ import annotations

import pytest

from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory
from policy_dsl.roles.classify import classify


@pytest.fixture
def fp8(tensor, inventory, recorded):
    """(block, **quantization) -> a recorded model whose matrices are FP8 with scales."""

    def make(block=(16, 16), **quantization):
        source, _ = recorded("qwen3_moe")
        tensors = []
        for each in source.tensors.values():
            if not each.name.endswith("_proj.weight"):
                tensors.append(each)
                continue
            grid = [-(-size // step) for size, step in zip(each.shape, block, strict=True)]
            tensors.append(tensor(each.name, each.shape, "F8_E4M3"))
            tensors.append(tensor(f"{each.name}_scale_inv", grid, "F32"))
        quantization = {"quant_method": "fp8", "weight_block_size": list(block), **quantization}
        return inventory({**source.config, "quantization_config": quantization}, *tensors)

    return make


def test_scales_go_with_their_weight(fp8):
    model = classify(fp8(block=(48, 40)))
    found = {each.source.name: each for each in model.tensors}
    expert = found["model.layers.1.mlp.experts.0.up_proj.weight"]
    assert expert.scale.name == "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv"
    assert expert.scale.shape == (1, 2)
    assert not any("scale_inv" in name for name in found)


def test_scales_of_fused_experts_keep_the_expert_axis(tensor, recorded):
    source, _ = recorded("qwen3_moe", "memory")
    tensors = dict(source.tensors)
    for layer in (1, 2):
        for name, grid in (("gate_up_proj", [4, 4, 4]), ("down_proj", [4, 4, 2])):
            fused = f"model.layers.{layer}.mlp.experts.{name}"
            tensors[fused] = tensor(fused, tensors[fused].shape, "F8_E4M3")
            tensors[f"{fused}_scale_inv"] = tensor(f"{fused}_scale_inv", grid, "F32")
    config = {**source.config, "quantization_config": {"weight_block_size": [16, 16]}}
    model = classify(Inventory("tiny", config, tensors))
    assert all(each.scale for each in model.tensors if each.component == "experts" and each.layer)


def test_the_block_size_may_stand_in_the_text_config(fp8):
    source = fp8()
    nested = {"quantization_config": source.config["quantization_config"]}
    config = {**source.config, "quantization_config": None, "text_config": nested}
    assert classify(Inventory("tiny", config, source.tensors)).tensors


def test_scales_of_nothing_are_ignored(tensor, inventory, fp8):
    extra = tensor("model.layers.0.self_attn.z_proj.weight_scale_inv", [4, 4], "F32")
    source = fp8()
    source = inventory(source.config, *source.tensors.values(), extra)
    assert [each.name for each, _ in classify(source).ignored] == [extra.name]


def test_an_fp8_weight_without_scales_is_refused(inventory, message, fp8):
    source = fp8()
    kept = [
        each for each in source.tensors.values() if "experts.0.up_proj.weight_s" not in each.name
    ]
    text = message(inventory(source.config, *kept))
    assert "error[missing-scale]: 2 tensors of FP8" in text
    assert "model.layers.1.mlp.experts.0.up_proj.weight" in text


@pytest.mark.parametrize("grid", [[4, 3], [3, 4], [1, 1], [16], [4, 4, 1], [5, 4]])
def test_a_grid_that_is_not_that_of_the_blocks_is_refused(grid, tensor, codes, fp8):
    source = fp8()
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    wrong = {**source.tensors, name: tensor(name, grid, "F32")}
    assert codes(Inventory("tiny", source.config, wrong)) == ["wrong-scale-grid"]


@pytest.mark.parametrize(
    "block", [None, [128], [128, 0], ["128", "128"], 128, [True, 128], [1.5, 2]], ids=str
)
def test_without_a_block_size_nothing_is_guessed(block, codes, fp8):
    assert codes(fp8(weight_block_size=block)) == ["missing-block-size"]


def test_scales_on_plain_weights_are_refused(tensor, changed, codes):
    name = "model.layers.0.self_attn.q_proj.weight"
    extra = tensor(f"{name}_scale_inv", [4, 4], "F32")
    config = {"quantization_config": {"weight_block_size": [16, 16]}}
    source = changed("llama", with_tensors=[extra], config=config)
    assert codes(source) == ["wrong-scale-dtype"]


def test_mxfp4_blocks_need_scales_of_their_shape(tensor, changed, codes):
    blocks = tensor("model.layers.0.mlp.experts.down_proj_blocks", [4, 64, 4, 16], "U8")
    scales = tensor("model.layers.0.mlp.experts.down_proj_scales", [4, 64, 2], "U8")
    without = "layers.0.mlp.experts.down_proj"
    bias = tensor("model.layers.0.mlp.experts.down_proj_bias", [4, 64])
    assert codes(changed("gpt_oss", without=without, with_tensors=[blocks, bias])) == [
        "missing-scale"
    ]
    both = [blocks, scales, bias]
    assert codes(changed("gpt_oss", without=without, with_tensors=both)) == ["wrong-scale-grid"]


@pytest.mark.parametrize("dtype", ["F8_E8M0", "U8"])
def test_one_finding_says_that_powers_of_two_are_not_read(dtype, tensor, fp8):
    source = fp8()
    scales = {
        name: each._replace(dtype=dtype)
        for name, each in source.tensors.items()
        if name.endswith("_scale_inv")
    }
    with pytest.raises(PolicyError) as caught:
        classify(Inventory("tiny", source.config, {**source.tensors, **scales}))
    (found,) = caught.value.diagnostics
    assert (found.code, found.count) == ("wrong-scale-dtype", len(scales))
    assert "powers of two" in str(found.suggestion)
    assert f"in all {len(scales)}: model.layers." in found.notes[0]
