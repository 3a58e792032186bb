"""`config.json` and the index of MLX bundles, as mlx-lm reads them, from the plan alone."""

from __future__ import annotations

import json
from dataclasses import replace

from emitters import FORMATS
from emitters.checkpoints import forms_of
from policy_dsl.plan import coded_modules
from policy_dsl.treatments import Coded

MIXED = """name: mixed
target: mlx_affine
rules: |
  all: 4bit
  down_proj: 3bit g32
  o_proj: mxfp4
  q_proj: keep
  norm: keep
"""


def test_the_config_is_the_sources_but_for_its_quantization(write_llama, planned):
    plan, _ = planned(write_llama())
    given = {
        **plan.model.config,
        "quantization_config": {"quant_method": "fp8"},
        "_name_or_path": "/somewhere",
        "rope_scaling": {"factor": float("inf")},
        "text_config": {"hidden_size": 64, "quantization_config": {"bits": 8}},
    }
    model = replace(plan.model, facts=replace(plan.model.facts, config=given))
    files = FORMATS["mlx_affine"].files().metadata(replace(plan, model=model))
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
    files = FORMATS["mlx_affine"].files().metadata(plan)
    quantization = json.loads(files["config.json"])["quantization"]
    block = "model.layers.0"
    assert quantization[f"{block}.mlp.down_proj"] == {"group_size": 32, "bits": 3, "mode": "affine"}
    assert quantization[f"{block}.self_attn.o_proj"]["mode"] == "mxfp4"
    assert quantization[f"{block}.self_attn.q_proj"] is False
    assert f"{block}.input_layernorm" not in quantization
    assert (quantization["bits"], quantization["group_size"]) == (4, 64)
    treatments = {
        module.name: (module.treatment.scheme, module.treatment.bits, module.treatment.group_size)
        for module in plan.modules
        if isinstance(module.treatment, Coded)
    }
    tensors = [tensor for module in plan.modules for tensor in module.tensors]
    forms = forms_of({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})
    claims = FORMATS["mlx_affine"].files().claims(files, forms)
    read = {name: claim.treatment for name, claim in claims.items()}
    found = {name: (one.scheme, one.bits, one.group_size) for name, one in read.items()}
    assert found == treatments
    # Scales of MXFP4 are bytes: the config alone says of what values.
    for dtype, wanted in (("float16", "F16"), ("float32", "F32"), (None, "BF16"), ([], "BF16")):
        config = {**json.loads(files["config.json"]), "torch_dtype": dtype, "text_config": 3}
        said = {**files, "config.json": json.dumps(config).encode()}
        claims = FORMATS["mlx_affine"].files().claims(said, forms)
        assert claims[f"{block}.self_attn.o_proj"].dtype == wanted


def test_the_index_counts_logical_weights(write_llama, planned):
    plan, _ = planned(write_llama())
    index = json.loads(FORMATS["mlx_affine"].files().metadata(plan)["model.safetensors.index.json"])
    assert index["metadata"] == {
        "total_size": sum(module.nbytes for module in plan.modules),
        "total_parameters": sum(module.parameters for module in plan.modules),
    }
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    assert set(index["weight_map"].values()) == {"model.safetensors"}


def test_the_index_leaves_out_what_mlx_lm_does_not_count(demo, planned):
    plan, _ = planned(demo, "config_i")
    index = json.loads(FORMATS["mlx_affine"].files().metadata(plan)["model.safetensors.index.json"])
    counted = [module for module in plan.modules if module.role != "router_bias"]
    assert index["metadata"]["total_parameters"] == sum(one.parameters for one in counted)
    assert len(counted) < len(plan.modules)


def test_the_default_is_what_most_weights_have(write_llama, planned):
    rules = "  all: 8bit\n  mlp: 4bit\n  norm: keep\n"
    policy = f"name: two\ntarget: mlx_affine\nrules: |\n{rules}"
    plan, _ = planned(write_llama(inner=512), policy)
    widths = [coded.bits for _, coded in coded_modules(plan.modules)]
    eight = [module for module, coded in coded_modules(plan.modules) if coded.bits == 8]
    assert len(eight) > widths.count(4)
    files = FORMATS["mlx_affine"].files().metadata(plan)
    assert json.loads(files["config.json"])["quantization"]["bits"] == 4


def test_a_plain_bundle_says_nothing_of_quantization(write_llama, planned):
    policy = "name: plain\ntarget: mlx_affine\nrules: |\n  all: keep\n  norm: keep\n"
    files = FORMATS["mlx_affine"].files().metadata(planned(write_llama(), policy)[0])
    assert not {"quantization", "quantization_config"} & json.loads(files["config.json"]).keys()
