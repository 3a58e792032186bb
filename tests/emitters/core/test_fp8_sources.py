"""FP8 sources with a scale for a matrix, a row or a block, by whatever name: code times scale.

torch says what the values are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_checkpoints import Array, stored, widened

from emitters.core.build import build
from emitters.core.verify import verify_bundle
from policy_dsl.diagnostics import PolicyError
from policy_dsl.sources.reference import open_source
from policyc.reports.inspect_report import survey

torch = pytest.importorskip("torch")

SAFE = pytest.importorskip("safetensors.torch")
FP8 = torch.float8_e4m3fn
CHANNELS = {"strategy": "channel", "num_bits": 8, "type": "float"}
BLOCKS = {"strategy": "block", "num_bits": 8, "type": "float", "block_structure": [16, 32]}
# kind -> name of the scales, what they are of a matrix [out, in], what the config says
KINDS: dict[str, tuple[str, Callable[[int, int], tuple[int, ...]], dict[str, object]]] = {
    "tensor": ("weight_scale", lambda out, columns: (1,), {"quant_method": "modelopt"}),
    "scalar": (
        "weight_scale_inv",
        lambda out, columns: (),
        {"quant_method": "fp8", "weight_block_size": None},
    ),
    "channel": (
        "weight_scale",
        lambda out, columns: (out, 1),
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": CHANNELS}}},
    ),
    "row": ("weight_scale", lambda out, columns: (out,), {"quant_method": "fbgemm_fp8"}),
    "block": (
        "weight_scale",
        lambda out, columns: (-(-out // 16), -(-columns // 32)),
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": BLOCKS}}},
    ),
}
PLAIN = "name: plain\ntarget: {target}\nfp8_dequant: {rule}\nrules: |\n  all: {dtype}\n"


def spread(scale: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The scales with the shape of the matrix that they scale."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(shape)
    if scale.numel() == shape[0]:
        return scale.reshape(-1, 1).expand(shape)
    tall = scale.repeat_interleave(16, 0)[: shape[0]]
    return tall.repeat_interleave(32, 1)[:, : shape[1]]


@pytest.fixture
def fp8(write_llama, tmp_path) -> Callable[..., tuple[Path, dict[str, torch.Tensor]]]:
    """Writes a small Llama in FP8 of a kind; gives the codes and scales in float32 too."""

    def make(kind: str, *, dtype: torch.dtype = torch.float32, **config: object):
        name, shape_of, entry = KINDS[kind]
        folder, values = write_llama(name=kind), {}
        tensors = SAFE.load_file(folder / "model.safetensors")
        generator = torch.Generator().manual_seed(5)
        for weight in [one for one in tensors if "_proj" in one]:
            shape = tuple(tensors[weight].shape)
            scale = (torch.rand(shape_of(*shape), generator=generator) + 0.5).to(dtype)
            codes = (tensors[weight].float() * 100).to(FP8)
            tensors[weight] = codes
            base = weight.removesuffix("weight")
            tensors[base + name], tensors[base + "input_scale"] = scale, torch.ones(())
            values[weight] = codes.float() * spread(scale.float(), shape)
        SAFE.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        said = json.loads((folder / "config.json").read_text())
        said["quantization_config"] = {**entry, **config}
        (folder / "config.json").write_text(json.dumps(said))
        return folder, values

    return make


def built(planned, folder: Path, out: Path, policy: str, **given: Path):
    """The tensors of the bundle of a policy, which verifies against its source."""
    plan, inventory = planned(folder, policy, **given)
    build(plan, inventory, out=out, jobs=2)
    report = verify_bundle(out, open_source(str(folder)), jobs=2)
    assert report.ok
    assert report.errors
    return stored(out)


@pytest.mark.parametrize("target", ["mlx_affine", "gptq"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_codes_times_scales(kind, target, fp8, planned, tmp_path):
    folder, values = fp8(kind)
    policy = PLAIN.format(target=target, rule="bf16", dtype="bf16")
    found = built(planned, folder, tmp_path / "out", policy)
    for name, wanted in values.items():
        got = widened(found[name][2]).reshape(wanted.shape)
        np.testing.assert_array_equal(got, wanted.to(torch.bfloat16).float().numpy())


@pytest.mark.parametrize("rule", ["f32", "bf16", "bf16_bf16"])
@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_rules_round_as_they_say(kind, rule, fp8, planned, tmp_path):
    folder, values = fp8(kind)
    policy = PLAIN.format(target="mlx_affine", rule=rule, dtype="f32")
    found = built(planned, folder, tmp_path / "out", policy)
    tensors = SAFE.load_file(folder / "model.safetensors")
    for name, exact in values.items():
        scale = tensors[name.removesuffix("weight") + KINDS[kind][0]].to(torch.bfloat16)
        codes = tensors[name].to(torch.bfloat16)
        wanted = {
            "f32": exact,
            "bf16": exact.to(torch.bfloat16).float(),
            "bf16_bf16": (codes * spread(scale, tuple(codes.shape))).float(),
        }[rule]
        got = np.frombuffer(found[name][2], np.float32).reshape(wanted.shape)
        np.testing.assert_array_equal(got, wanted.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_sixteen_bits(dtype, fp8, planned, tmp_path):
    folder, values = fp8("channel", dtype=dtype)
    policy = PLAIN.format(target="mlx_affine", rule="f32", dtype="f32")
    found = built(planned, folder, tmp_path / "out", policy)
    for name, wanted in values.items():
        got: Array = np.frombuffer(found[name][2], np.float32)
        np.testing.assert_array_equal(got, wanted.numpy().reshape(-1))


@pytest.mark.parametrize("policy", ["mlx_4bit", "w4a16", "jangtq_4", "hipfire_mq4"])
def test_every_target_takes_a_scale_for_a_row(policy, demo, imatrix, planned, tmp_path):
    folder = Path(shutil.copytree(demo, tmp_path / "source"))
    moved = {}
    for path in folder.glob("*.safetensors"):
        tensors = SAFE.load_file(path)
        for name in [one for one in tensors if one.endswith("_scale_inv")]:
            rows = tensors[name.removesuffix("_scale_inv")].shape[0]
            scale = tensors.pop(name).mean().expand(rows, 1).contiguous()
            tensors[name.removesuffix("_inv")] = scale
        SAFE.save_file(tensors, path, metadata={"format": "pt"})
        moved |= dict.fromkeys(tensors, path.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": moved}))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))
    assert built(planned, folder, tmp_path / "out", policy, imatrix=imatrix)


def test_scales_of_activations_are_left_out_with_a_reason(fp8, planned):
    plan, inventory = planned(fp8("tensor")[0])
    reasons = {one.tensor.name: one.reason for one in plan.omitted}
    assert reasons["model.layers.1.mlp.up_proj.input_scale"].startswith("scales of activations")
    assert not any("weight_scale" in name for name in reasons)
    found = survey(inventory)
    ignored = sum(tensor.nbytes for tensor, _ in found.model.ignored)
    assert sum(role["nbytes"] for role in found.roles) + ignored == inventory.nbytes


def test_a_copy_that_a_tool_made_is_taken_with_a_warning(fp8, planned):
    plans = {kind: planned(fp8(kind)[0])[0] for kind in ("row", "block")}
    codes = {kind: [one.code for one in plan.findings] for kind, plan in plans.items()}
    assert codes == {"row": [], "block": ["requantized"]}


def test_blocks_are_never_guessed(fp8, planned):
    folder, _ = fp8("block", config_groups={})
    with pytest.raises(PolicyError, match="missing-block-size") as caught:
        planned(folder)
    assert "weight_block_size" in str(caught.value)
    assert "--allow-requantize" not in str(caught.value)


def test_a_scale_of_another_matrix_is_refused(fp8, planned):
    folder, _ = fp8("channel")
    path = folder / "model.safetensors"
    tensors = SAFE.load_file(path)
    for name in [one for one in tensors if one.endswith("weight_scale")]:
        tensors[name] = torch.ones(7, 1)
    SAFE.save_file(tensors, path)
    with pytest.raises(PolicyError, match="missing-block-size"):
        planned(folder)
