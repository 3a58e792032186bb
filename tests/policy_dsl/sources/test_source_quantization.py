"""Sources that somebody quantized are told from those a publisher released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.sources.quantization import quantization_of
from policy_dsl.sources.reference import open_source

EXAMPLE = Path(__file__).parents[3] / "examples" / "tiny-minimax-m2"
BLOCK_FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
PLAIN = {"model.norm.weight": "BF16", "lm_head.weight": "F32", "gate.bias": "F16"}


def source(config: dict[str, Any], tensors: dict[str, str]) -> Inventory:
    """A source with this config and tensors of these dtypes."""
    infos = {name: TensorInfo(name, dtype, (4, 4), 64) for name, dtype in tensors.items()}
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
    assert quantization_of(open_source(str(EXAMPLE))) is None
    assert quantization_of(open_source("minimax-m2.7")) is None


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            "gptq (bits 4, group_size 128)",
        ),
        ({"quant_method": "awq", "bits": 4}, "awq (bits 4)"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt (quant_algo NVFP4)"),
        ({"group_size": 64, "bits": 4, "mode": "affine"}, "MLX (mode affine, bits 4"),
        ({"quant_method": "fp8"}, "FP8 without weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": None}, "FP8 without weight_block_size"),
        ({"load_in_4bit": True}, "a quantization that the config names"),
        ("gptq", "gptq"),
    ],
)
@pytest.mark.parametrize("place", ["quantization_config", "quantization"])
def test_what_the_config_says(said: object, wanted: str, place: str) -> None:
    found = quantization_of(source({place: said}, PLAIN))
    assert found is not None
    assert found.startswith(wanted)


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
        assert found.startswith(f"{wanted}: {name} is {dtype}")
