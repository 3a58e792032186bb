"""Other forms of a family than that of its golden case: stock mlx-lm converts them alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from family_cases import TOKENIZER, source_of
from small_checkpoints import bf16, stored, write_folder

pytestmark = pytest.mark.slow

PROMPT = (1, 5, 17, 33, 3, 83, 55, 93, 23)
TYPES = {"BF16": np.uint16, "F32": np.float32}
Arrays = dict[str, tuple[str, np.ndarray]]
Form = Callable[[dict[str, Any], Arrays], None]


def drawn(*shape: int) -> tuple[str, np.ndarray]:
    values = np.random.default_rng(shape).normal(size=shape) / 16
    return "BF16", bf16(values)


def without(tensors: Arrays, *words: str) -> None:
    for name in [name for name in tensors if any(word in name for word in words)]:
        del tensors[name]


def newest_names(config: dict[str, Any], tensors: Arrays) -> None:
    """Kimi-K3 as its publisher writes it now: a padded vector for the decay."""
    for name in list(tensors):
        dtype, values = tensors.pop(name)
        if name.endswith("A_log"):
            values = np.concatenate([values.ravel(), np.zeros(6, np.float32)])
        newer = name.replace("_res.proj_weight", "_res_proj.weight")
        tensors[newer.replace("_res.norm_weight", "_res_norm.weight")] = dtype, values


def whole_gates(config: dict[str, Any], tensors: Arrays) -> None:
    """Kimi-K3 with gates of full rank, queries of full rank, and one residual stream."""
    text = config["text_config"]
    text["linear_attn_config"]["use_full_rank_gate"] = True
    text |= {"q_lora_rank": None, "attn_res_block_size": None}
    without(tensors, "g_a_proj", "g_b_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "_res.")
    for layer in (0, 1):
        tensors[f"language_model.model.layers.{layer}.self_attn.g_proj.weight"] = drawn(64, 64)
    tensors["language_model.model.layers.2.self_attn.q_proj.weight"] = drawn(192, 64)


def wide_experts(config: dict[str, Any], tensors: Arrays) -> None:
    """Kimi-K3 with experts as wide as the model, without gates of latent attention."""
    text = config["text_config"]
    text |= {"routed_expert_hidden_size": None, "mla_use_output_gate": False}
    without(tensors, "routed_expert_", "layers.2.self_attn.g_proj")


def alone(config: dict[str, Any], tensors: Arrays) -> None:
    """Kimi-K3's text model by itself."""
    text = config.pop("text_config")
    config |= {**text, "model_type": "kimi_k3", "torch_dtype": "bfloat16"}
    without(tensors, "vision_tower")
    for name in list(tensors):
        tensors[name.removeprefix("language_model.")] = tensors.pop(name)
    newest_names(config, tensors)


def below_vision(config: dict[str, Any], tensors: Arrays) -> None:
    """DeepSeek-V4.1 with its text model's keys inside, and keys that are not pooled."""
    text = {**config, "model_type": "deepseek_v41_text", "compress_ratios": [0, 1]}
    dtype = text.pop("torch_dtype")
    config.clear()
    config |= {"model_type": "deepseek_v41", "text_config": text, "torch_dtype": dtype}
    without(tensors, "wgate")


def shared_keys(config: dict[str, Any], tensors: Arrays) -> None:
    """DeepSeek-V4.1 whose last layer chooses among the keys of another."""
    config |= {"compress_ratios": [4, 4], "kv_source_layer_ids": [0]}
    config["index_source_layer_ids"] = [0, 1]
    for name in [name for name in tensors if ".1.attn.indexer." in name]:
        tensors[name.replace(".1.", ".0.", 1)] = tensors[name]
    for name in [name for name in tensors if ".1.attn.compressor." in name]:
        tensors[name.replace(".1.", ".0.", 1)] = tensors.pop(name)
    without(tensors, ".1.attn.indexer.wk.", ".1.attn.indexer.k_norm.")


FORMS: dict[str, tuple[str, Form]] = {
    "k3_newest_names": ("kimi_k3", newest_names),
    "k3_whole_gates": ("kimi_k3", whole_gates),
    "k3_wide_experts": ("kimi_k3", wide_experts),
    "k3_alone": ("kimi_k3", alone),
    "v41_below_vision": ("deepseek_v41", below_vision),
    "v41_shared_keys": ("deepseek_v41", shared_keys),
}


@pytest.mark.parametrize("form", FORMS)
def test_stock_answers_alike(form, build, stock, tmp_path):
    case, change = FORMS[form]
    folder = source_of(case, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    held = stored(folder)
    tensors = {
        name: (dtype, np.frombuffer(content, TYPES[dtype]).reshape(shape))
        for name, (dtype, shape, content) in held.items()
    }
    change(config, tensors)
    write_folder(source := tmp_path / "source", config, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, source)
    rules = (
        "all: 4bit g32\nrouter: 8bit g64" if case == "kimi_k3" else "all: 4bit g32\nrouter: keep"
    )
    ours = build(f"target mlx_affine\n{rules}\n", source)
    theirs = stock.convert(source, tmp_path / "stock", q_bits=4, q_group_size=32)
    stock.assert_equal_bundles(ours, theirs, PROMPT)
