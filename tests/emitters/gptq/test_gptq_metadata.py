"""`config.json`, its copy and the index, from plans alone; and what `verify` reads in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import packed, planned, tiny

from emitters import FORMATS
from emitters.core.build import build
from emitters.core.verify import verify_bundle
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Plan

CONFIG = "config.json"
GPTQ = "metadata dialect gptq"
MOE = "model.layers.0.block_sparse_moe"
PLAIN = {"bits": 16, "data_type": "float"}
FOUR_BITS = "name: packed\ntarget: gptq\nrules: |\n  all: 4bit g32\n  embed, lm_head: keep\n"
Written = dict[str, Any]
Planned = Callable[..., tuple[Plan, Inventory]]


def files_of(plan: Plan) -> dict[str, bytes]:
    return FORMATS["gptq"].files().metadata(plan)


def told(plan: Plan) -> Written:
    found: Written = json.loads(files_of(plan)[CONFIG])["quantization_config"]
    return found


def test_the_config_is_the_sources_with_the_quantization_at_its_end():
    plan = planned(tiny("minimax_m2"), "")
    given = {
        "zebra": 1,
        **plan.model.config,
        "quantization_config": {"quant_method": "fp8"},
        "compression_config": {},
        "rope_scaling": {"factor": float("inf"), "more": [float("-inf"), float("nan")]},
        "name": "Grün",
        # vLLM looks for them, and they would be added.
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    }
    plan = replace(plan, model=replace(plan.model, facts=replace(plan.model.facts, config=given)))
    text = files_of(plan)[CONFIG].decode()
    config = json.loads(text)
    carried = [key for key in given if key not in ("quantization_config", "compression_config")]
    assert list(config) == [*carried, "quantization_config"]
    assert config["rope_scaling"] == {
        "factor": {"__float__": "Infinity"},
        "more": [{"__float__": "-Infinity"}, {"__float__": "NaN"}],
    }
    assert config["name"] == "Grün"
    assert text == json.dumps(config, indent=2)


def test_auto_rounds_keys_and_their_order():
    plan = planned(tiny("minimax_m2"), "o_proj in layers 2: keep\nexperts in layers 1: 8bit")
    assert list(told(plan).items()) == [
        ("quant_method", "auto-round"),
        ("packing_format", "auto_round:auto_gptq"),
        ("bits", 4),
        ("group_size", 32),
        ("sym", True),
        ("data_type", "int"),
        ("iters", 0),
        ("model_free", True),
        ("autoround_version", "0.16.1"),
        ("block_name_to_quantize", "model.layers"),
        (
            "extra_config",
            {
                "lm_head": PLAIN,
                **{f"model.layers.{i}.block_sparse_moe.gate": PLAIN for i in range(3)},
                "model.layers.2.self_attn.o_proj": PLAIN,
                r".*layers\.1\.(mlp|block_sparse_moe)\.experts.*": {"bits": 8},
            },
        ),
    ]


def test_gptqs_keys():
    rules = "o_proj: keep\nexperts in layers 1-2: 8bit\nlm_head: 4bit g-1"
    expected = {
        "bits": 8,
        "group_size": 32,
        "desc_act": False,
        "sym": True,
        "lm_head": True,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "dynamic": {
            r"+:lm_head$": {"bits": 4, "group_size": -1, "sym": True},
            r"-:.*layers\.(0|1|2)\.(mlp|block_sparse_moe)\.gate$": {},
            r"+:.*layers\.(0|1|2)\.self_attn\.(k_proj|q_proj|v_proj|qkv_proj)$": {
                "bits": 4,
                "group_size": 32,
                "sym": True,
            },
            r"-:.*layers\.(0|1|2)\.self_attn\.o_proj$": {},
            r"+:.*layers\.0\.(mlp|block_sparse_moe)\.experts.*": {
                "bits": 4,
                "group_size": 32,
                "sym": True,
            },
        },
    }
    assert told(planned(tiny("minimax_m2"), rules, head=GPTQ)) == expected
    uniform = told(planned(tiny("llama"), "", head=GPTQ))
    assert "dynamic" not in uniform
    assert uniform["lm_head"] is False


def test_entries_tell_the_width_even_where_only_groups_differ():
    # Without it, vLLM takes the module for one that is not packed.
    rules = "o_proj: 4bit g64\ndown_proj: 4bit asym"
    extra = told(planned(tiny("llama"), rules))["extra_config"]
    assert extra["model.layers.0.self_attn.o_proj"] == {"bits": 4, "group_size": 64}
    assert extra["model.layers.0.mlp.down_proj"] == {"bits": 4, "sym": False}


def test_the_default_is_what_most_weights_have():
    plan = planned(tiny("llama"), "mlp: 8bit g64")
    eight = [one for one in packed(plan).values() if one.treatment.bits == 8]
    assert len(eight) < len(packed(plan)) / 2
    assert (told(plan)["bits"], told(plan)["group_size"]) == (8, 64)


@pytest.mark.parametrize(
    ("treatment", "packing", "checkpoint", "version", "free"),
    [
        ("int", "auto_round:auto_gptq", "gptq", "0.16.1", True),
        ("int-gidx", "auto_round:auto_gptq", "gptq", "0.16.1", True),
        ("int-v2", "auto_round", "gptq_v2", "0.16.1", True),
        ("int by opt-rtn", "auto_round:auto_gptq", "gptq", "0.16.1", False),
        ("int by opt-rtn-0.12.2", "auto_round:auto_gptq", "gptq", "0.12.2", False),
    ],
)
def test_what_follows_from_scheme_and_method(treatment, packing, checkpoint, version, free):
    scheme = treatment.split()[0]
    rules = f"mlp: 4bit {scheme}\nattention: 4bit {treatment}"
    found = told(planned(tiny("llama"), rules))
    assert found["packing_format"] == packing
    assert found["autoround_version"] == version
    assert ("model_free" in found) is free
    found = told(planned(tiny("llama"), rules, head=GPTQ))
    assert found["checkpoint_format"] == checkpoint


def test_the_copy_stands_where_readers_of_the_dialect_look():
    for head, name in (("", "quantization_config.json"), (GPTQ, "quantize_config.json")):
        files = files_of(planned(tiny("qwen3_moe"), "", head=head))
        assert files.keys() == {CONFIG, name}
        assert json.loads(files[name]) == json.loads(files[CONFIG])["quantization_config"]
        assert files[name].startswith(b'{\n  "')
        assert not files[name].endswith(b"\n")


def test_several_shards_have_an_index():
    name = "model.safetensors.index.json"
    assert name not in files_of(planned(tiny("llama"), ""))
    plan = planned(tiny("llama"), "", head="output shard_size 64KiB")
    index = json.loads(files_of(plan)[name])
    tensors = {one.name: one for module in plan.modules for one in module.tensors}
    assert index["metadata"] == {"total_size": sum(one.nbytes for one in tensors.values())}
    assert list(index["weight_map"]) == sorted(tensors)
    assert index["weight_map"] == {each: one.file for each, one in tensors.items()}
    assert len(set(index["weight_map"].values())) > 1


def test_a_plain_model_has_no_copy():
    assert files_of(planned(tiny("llama"), "attention, mlp: keep")).keys() == {CONFIG}


# verifying


@pytest.fixture
def bundle(write_llama: Callable[..., Path], planned: Planned, tmp_path: Path) -> Path:
    """A bundle of a small Llama, as another tool would leave it: without a record."""
    plan, inventory = planned(write_llama(), FOUR_BITS)
    build(plan, inventory, out=tmp_path / "out")
    (tmp_path / "out" / "policyc.json").unlink()
    return tmp_path / "out"


def findings(bundle: Path) -> list[str]:
    report = verify_bundle(bundle, jobs=1)
    return [found.message for found in report.findings if found.code != "no-record"]


def changed(bundle: Path, name: str, at: int, value: np.ndarray[Any, Any]) -> None:
    """Numbers of a tensor overwritten, from the one at that index."""
    path = bundle / "model.safetensors"
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + size])[name]["data_offsets"][0] + 8 + size
    at = start + at * value.itemsize
    content[at : at + value.nbytes] = value.tobytes()
    path.write_bytes(content)


def test_a_sound_bundle_without_a_record_is_well(bundle):
    assert findings(bundle) == []


def test_zero_points_of_symmetric_groups_are_looked_at(bundle):
    # Kernels for them have the middle built in, others read what is stored.
    name = "model.layers.1.mlp.up_proj.qzeros"
    changed(bundle, name, 3, np.array([0x77777776], np.int32))
    (found,) = findings(bundle)
    assert name in found
    assert "other zero points" in found


def test_scales_are_finite(bundle):
    name = "model.layers.0.self_attn.k_proj.scales"
    changed(bundle, name, 70, np.array([np.nan], np.float16))
    (found,) = findings(bundle)
    assert name in found
    assert "not finite" in found


def test_the_copy_says_the_same(bundle):
    path = bundle / "quantization_config.json"
    copy = json.loads(path.read_text())
    path.write_text(json.dumps({**copy, "autoround_version": "9"}))
    assert findings(bundle) == []
    path.write_text(json.dumps({**copy, "group_size": 64}))
    assert ["group_size" in found for found in findings(bundle)] == [True]
    path.write_text("[4]")
    assert ["not a JSON object" in found for found in findings(bundle)] == [True]
    path.unlink()
    assert findings(bundle) == []


def test_codes_that_the_config_does_not_tell_of_are_found(bundle):
    path = bundle / CONFIG
    config = json.loads(path.read_text())
    extra = config["quantization_config"]["extra_config"]
    extra["model.layers.0.self_attn.q_proj"] = PLAIN
    path.write_text(json.dumps(config))
    (bundle / "quantization_config.json").unlink()
    (found,) = findings(bundle)
    assert "q_proj.qweight" in found
    assert "not quantized" in found


def test_a_plain_linear_that_the_config_forgets_is_found(write_llama, planned, tmp_path):
    plan, inventory = planned(write_llama(), f"{FOUR_BITS}  o_proj: keep\n")
    out = tmp_path / "out"
    build(plan, inventory, out=out)
    (out / "policyc.json").unlink()
    assert findings(out) == []
    config = json.loads((out / CONFIG).read_text())
    del config["quantization_config"]["extra_config"]["model.layers.1.self_attn.o_proj"]
    (out / CONFIG).write_text(json.dumps(config))
    (found,) = findings(out)
    assert "model.layers.1.self_attn.o_proj" in found


def test_experts_are_as_many_as_the_config_says(demo, planned, tmp_path):
    plan, inventory = planned(demo, FOUR_BITS)
    out = tmp_path / "out"
    build(plan, inventory, out=out)
    (out / "policyc.json").unlink()
    assert findings(out) == []
    text, count = (out / CONFIG).read_text(), '"num_local_experts": '
    (out / CONFIG).write_text(text.replace(f"{count}8", f"{count}7"))
    assert all("7 experts" in found for found in findings(out))
    assert f"{MOE}.experts.*.w1 has 8 others" in findings(out)[0]
