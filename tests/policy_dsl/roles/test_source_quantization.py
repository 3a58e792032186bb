"""Sources that somebody quantized are told from those a publisher released."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.roles.quantization import leftover, quantization_of
from policy_dsl.sources.reference import open_source
from tests.models import tiny

BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
PLAIN = {"model.norm.weight": "BF16", "lm_head.weight": "F32", "gate.bias": "F16"}


def source(config: dict[str, Any], tensors: dict[str, str]) -> Inventory:
    """A source with this config and tensors of these dtypes."""
    infos = {name: TensorInfo(name, dtype, (4, 4), 64) for name, dtype in tensors.items()}
    infos |= {name: TensorInfo(name, "F32", (), 4) for name in tensors if tensors[name] == "SCALAR"}
    return Inventory("x", config, infos)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({}, PLAIN),
        ({"quantization_config": None, "quantization": {}}, PLAIN),
        (
            {"quantization_config": BLOCK_FP8},
            PLAIN | {"q.weight": "F8_E4M3", "q.weight_scale_inv": "F32"},
        ),
        (
            {"text_config": {"quantization_config": BLOCK_FP8}},
            {"q.weight": "F8_E4M3", "q.weight_scale_inv": "F32"},
        ),
        (
            {"quantization_config": {"quant_method": "mxfp4"}},
            PLAIN | {"e.gate_up_proj_blocks": "U8", "e.gate_up_proj_scales": "U8"},
        ),
    ],
)
def test_full_and_native_precision(config: dict[str, Any], tensors: dict[str, str]) -> None:
    assert quantization_of(source(config, tensors)) is None


def test_models_at_hand_are_native() -> None:
    assert quantization_of(tiny()) is None
    assert quantization_of(open_source("minimax-m2.7")) is None


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq (bits 4, group_size 128)"),
        ({"quant_method": "awq", "bits": 4}, "awq (bits 4)"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt (quant_algo NVFP4)"),
        ({"group_size": 64, "bits": 4, "mode": "affine"}, "MLX (mode affine, bits 4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "a quantization that the config names"),
        ("gptq", "gptq"),
    ],
)
@pytest.mark.parametrize("place", ["quantization_config", "quantization"])
def test_what_the_config_says(said: object, wanted: str, place: str) -> None:
    packed = source({place: said}, PLAIN | {"l.0.q_proj.weight_packed": "I32"})
    found = quantization_of(packed)
    assert found is not None
    assert found.form.startswith(wanted)
    assert found.read == "no"
    assert list(leftover(packed)) == []


@pytest.mark.parametrize("place", ["quantization_config", "quantization"])
@pytest.mark.parametrize("said", [BLOCK_FP8, {"quant_method": "bitsandbytes"}, "gptq"])
def test_what_the_config_says_and_no_tensor_shows(said: object, place: str) -> None:
    plain = source({"text_config": {place: said}}, PLAIN)
    assert quantization_of(plain) is None
    (found,) = leftover(plain)
    assert (found.code, found.severity) == ("quantization-not-shown", "warning")


@pytest.mark.parametrize(
    ("name", "dtype"), [("q.weight", "U8"), ("q.weight", "I8"), ("q.weight", "F8_E4M3")]
)
def test_bytes_with_block_scales_are_fp8(name: str, dtype: str) -> None:
    config, tensors = {"quantization_config": BLOCK_FP8}, {f"{name}_scale_inv": "F32"}
    found = source(config, {name: dtype, **tensors})
    assert quantization_of(found) is None
    assert list(leftover(found)) == []


def test_integers_are_not_taken_for_fp8() -> None:
    found = quantization_of(source({}, {"q.weight": "I8", "q.weight_scale": "F32"}))
    assert found is not None
    assert (found.form.partition(":")[0], found.read) == ("8-bit integers", "no")


def test_a_sidecar_names_the_tool() -> None:
    scales = {"q.weight_scale": "F8_E4M3", "q.weight_scale_2": "F32"}
    packed = replace(
        source({}, {"q.weight": "U8", **scales}), side_files={"hf_quant_config.json": 100}
    )
    found = quantization_of(packed)
    assert found is not None
    assert (found.form, found.read) == ("ModelOpt, as hf_quant_config.json says", "no")


@pytest.mark.parametrize("allowed", [False, True])
def test_no_way_is_offered_that_cannot_work(allowed: bool) -> None:
    packed = source({}, {"q.weight_packed": "I32"})
    bare = source({}, {"q.weight": "F8_E4M3"})
    for inventory in (packed, bare):
        found = quantization_of(inventory)
        assert found is not None
        finding = found.finding("x", allowed=allowed)
        assert finding.code == "already-quantized"
        assert "--allow-requantize" not in str(finding.suggestion)


def test_fp8_that_nothing_declares_is_taken_if_that_is_allowed() -> None:
    found = quantization_of(source({}, {"q.weight": "F8_E4M3", "q.weight_scale": "SCALAR"}))
    assert found is not None
    assert found.finding("x", allowed=False).suggestion == (
        "take the original checkpoint, or --allow-requantize"
    )
    assert found.finding("x", allowed=True).code == "requantized"


@pytest.mark.parametrize(
    ("name", "dtype", "wanted"),
    [
        ("l.0.q_proj.qweight", "I32", "GPTQ or AWQ"),
        ("l.0.experts.tq_packed", "U8", "mxtq"),
        ("l.0.q_proj.weight_packed", "I32", "compressed-tensors"),
        ("l.0.q_proj.weight.absmax", "F32", "bitsandbytes"),
        ("l.0.q_proj.weight", "U32", "MLX"),
        ("l.0.gate_up_proj_blocks", "U8", "MXFP4"),
        ("l.0.q_proj.weight", "F8_E4M3", "FP8"),
        ("l.0.q_proj.weight", "F4", "4-bit floats"),
    ],
)
@pytest.mark.parametrize("config", [{}, {"quantization_config": BLOCK_FP8}])
def test_what_only_the_tensors_say(
    name: str, dtype: str, wanted: str, config: dict[str, Any]
) -> None:
    found = quantization_of(source(config, {name: dtype, "l.0.q_proj.scales": "BF16"}))
    if wanted == "FP8" and config:
        assert found is None
    else:
        assert found is not None
        assert found.form.startswith(f"{wanted}: {name} is {dtype}")
