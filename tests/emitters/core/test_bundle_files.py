"""The files beside the tensors: known from the plan alone, and right for their readers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from emitters import get, names, specs
from emitters.core.bundle import complete
from emitters.core.record import plan_digest, source_id

MIXED = """name: mixed
target: mlx_affine
rules: |
  all: 4bit
  down_proj: 3bit g32
  o_proj: mxfp4
  q_proj: keep
  norm: keep
"""


def test_formats_are_the_folders_with_a_spec():
    assert "mlx_affine" in names()
    assert set(specs()) == set(names())
    with pytest.raises(KeyError):
        get("core")


def test_every_size_is_known_from_headers_alone(planned):
    plan, inventory = planned(Path("minimax-m2.7"), "config_i")
    whole = complete(plan, inventory)
    sizes = {file.name: file.nbytes for file in whole.files}
    unknown = inventory.side_files is None
    assert (None in sizes.values()) == unknown
    assert all(file.reason for file in whole.files if file.nbytes is None)
    assert [file for file in whole.files if file.kind == "tensors"] == list(plan.files)
    assert complete(whole, inventory) == whole


def test_unknown_side_files_leave_the_rest_exact(demo, planned):
    plan, inventory = planned(demo, "config_i")
    known = {file.name: file.nbytes for file in complete(plan, inventory).files}
    bare = complete(plan, replace(inventory, side_files=None))
    found = {file.name: file.nbytes for file in bare.files if file.nbytes is not None}
    assert found.items() <= known.items()
    assert "policyc.json" not in found
    assert "tokenizer.json" not in found


def test_the_config_is_the_sources_but_for_its_quantization(write_llama, planned):
    plan, _ = planned(write_llama())
    given = {
        **plan.model.config,
        "quantization_config": {"quant_method": "fp8"},
        "_name_or_path": "/somewhere",
        "rope_scaling": {"factor": float("inf")},
        "text_config": {"hidden_size": 64, "quantization_config": {"bits": 8}},
    }
    files = get("mlx_affine").metadata(replace(plan, model=replace(plan.model, config=given)))
    config = json.loads(files["config.json"])
    assert config.pop("quantization") == config.pop("quantization_config")
    assert config == {
        **plan.model.config,
        "rope_scaling": {"factor": {"__float__": "Infinity"}},
        "text_config": {"hidden_size": 64},
    }
    assert list(config) == sorted(config)


def test_widths_are_written_whole_and_read_back(write_llama, planned):
    plan, _ = planned(write_llama(), MIXED)
    files = get("mlx_affine").metadata(plan)
    quantization = json.loads(files["config.json"])["quantization"]
    block = "model.layers.0"
    assert quantization[f"{block}.mlp.down_proj"] == {
        "group_size": 32,
        "bits": 3,
        "mode": "affine",
    }
    assert quantization[f"{block}.self_attn.o_proj"]["mode"] == "mxfp4"
    assert quantization[f"{block}.self_attn.q_proj"] is False
    assert f"{block}.input_layernorm" not in quantization
    assert (quantization["bits"], quantization["group_size"]) == (4, 64)
    treatments = {
        module.name: (
            module.treatment.scheme,
            module.treatment.bits,
            module.treatment.group_size,
        )
        for module in plan.modules
        if module.treatment.action == "quantize"
    }
    claims = get("mlx_affine").claims(files)
    found = {name: (one.scheme, one.bits, one.group_size) for name, one in claims.items()}
    assert found == treatments


def test_the_index_counts_logical_weights(write_llama, planned):
    plan, _ = planned(write_llama())
    index = json.loads(get("mlx_affine").metadata(plan)["model.safetensors.index.json"])
    assert index["metadata"] == {
        "total_size": sum(module.nbytes for module in plan.modules),
        "total_parameters": sum(module.parameters for module in plan.modules),
    }
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert set(index["weight_map"].values()) == {"model.safetensors"}


def test_a_plan_digest_tells_plans_apart(write_llama, planned):
    source = write_llama()
    plan, again, other = (planned(source, text)[0] for text in (MIXED, MIXED, "mlx_4bit"))
    assert plan_digest(plan) == plan_digest(again)
    assert plan_digest(plan) != plan_digest(other)


def test_a_record_names_no_place():
    assert source_id("/somewhere/model") == "model"
    assert source_id("org/model") == "org/model"
