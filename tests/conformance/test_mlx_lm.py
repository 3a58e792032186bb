"""Bundles of every supported family are mlx-lm's own conversions, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bundles import Width
from model_kinds import KINDS

from tests.models import families_of

FAMILIES = families_of("mlx_affine")


pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-minimax-m2"
WITH_EXPERTS = [name for name, kind in KINDS.items() if kind.has_experts]
WITHOUT = [name for name, kind in KINDS.items() if not kind.has_experts]
ROUTER = re.compile(r"\.(block_sparse_moe|mlp)\.(shared_expert_)?gate$")
LAYER = re.compile(r"\.layers\.(\d+)\.")

# Config-I's shape for families without experts.
DENSE_MIX = """
target mlx_affine
default group_size 64
mlp.gate_proj, mlp.up_proj: 2bit
mlp.down_proj: 3bit
attention: 4bit
boundary 2: 8bit
embed: 8bit
lm_head: 8bit optional
"""
PROJECTIONS = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}
ALL_WIDTHS: list[Width] = [
    *((bits, group, "affine") for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    (4, 32, "mxfp4"),
    (8, 32, "mxfp8"),
    (4, 16, "nvfp4"),
]
# Experts, embeddings and heads of different families meet different widths.
UNIFORM = {
    "llama_tied": (4, 32, "mxfp4"),
    "mistral_undeclared": (4, 16, "nvfp4"),
    "mixtral": (6, 128, "affine"),
    "mixtral_fused": (4, 32, "mxfp4"),
    "qwen2": (8, 32, "mxfp8"),
    "qwen2_tied": (2, 32, "affine"),
    "qwen3": (8, 128, "affine"),
    "qwen3_moe": (8, 32, "mxfp8"),
    "qwen3_moe_fp8": (5, 32, "affine"),
    "minimax_m2": (5, 64, "affine"),
    "minimax_m2_fp8": (4, 16, "nvfp4"),
    "minimax_m2_fused": (3, 128, "affine"),
    "glm4_moe": (3, 32, "affine"),
    "gemma3_text": (8, 32, "mxfp8"),
    "gemma3": (6, 32, "affine"),
}


# What a config may declare over the tensors' own dtype, and where; mlx-lm casts to it first.
DECLARED = {
    "llama": {"torch_dtype": "float16"},
    "minimax_m2_fp8": {"torch_dtype": "float32"},
    "qwen3_moe_fp8": {"torch_dtype": "float16"},
    "glm4_moe": {},
    "gemma3": {"text_config": {"dtype": "float16"}},
}


def words(width: Width) -> str:
    """A width in the language's words."""
    bits, group_size, mode = width
    return f"{bits}bit {mode} g{group_size}" if mode == "affine" else mode


def declaring(keys: Mapping[str, Any], source: Path, out: Path) -> Path:
    """A copy of a checkpoint whose config declares these dtypes and no other."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    config.pop("torch_dtype", None)
    for key, value in keys.items():
        config[key] = {**config[key], **value} if isinstance(value, Mapping) else value
    (out / "config.json").write_text(json.dumps(config))
    return out


def config_i(path: str, n_layers: int, experts: str = ".switch_mlp.") -> Width | None:
    """The widths of policies/config_i, by mlx-lm's names; `experts` marks the low ones."""
    if ROUTER.search(path):
        return None
    layer = LAYER.search(path)
    if layer is None or not 2 <= int(layer[1]) < n_layers - 2:
        return 8, 64, "affine"
    if experts in path:
        return (3 if path.endswith("down_proj") else 2), 64, "affine"
    return 4, 64, "affine"


def test_every_family_here_is_one_that_is_not_refused():
    """The others are in `test_config_forms.py`."""
    supported = {family for family, reason in FAMILIES.items() if reason is None}
    assert {kind.family for kind in KINDS.values()} <= supported


@pytest.mark.parametrize("name", KINDS)
def test_the_default_conversion(name, checkpoint, build, stock, tmp_path):
    source = checkpoint(name)
    ours = build("mlx_4bit", source.published)
    stock.assert_equal_bundles(ours, stock.convert(source.readable, tmp_path / "stock"))


@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_dtype(name, checkpoint, build, stock, tmp_path):
    source = checkpoint(name)
    published = declaring(DECLARED[name], source.published, tmp_path / "published")
    readable = declaring(DECLARED[name], source.readable, tmp_path / "readable")
    ours = build("mlx_4bit", published)
    stock.assert_equal_bundles(ours, stock.convert(readable, tmp_path / "stock"))


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_config_i(name, checkpoint, build, stock, tmp_path):
    source, n_layers = checkpoint(name), KINDS[name].n_layers
    ours = build("config_i", source.published)
    theirs = stock.convert_by(
        source.readable,
        tmp_path / "stock",
        lambda path: config_i(path, n_layers),
        # The policy asks for a bfloat16 router; MiniMax-M2's own are float32.
        dtype="bfloat16",
    )
    stock.assert_equal_bundles(ours, theirs)


@pytest.mark.parametrize("name", WITHOUT)
def test_mixed_widths_in_dense_models(name, checkpoint, build, stock, tmp_path):
    source, n_layers = checkpoint(name), KINDS[name].n_layers
    ours = build(DENSE_MIX, source.published)
    theirs = stock.convert_by(
        source.readable, tmp_path / "stock", lambda path: config_i(path, n_layers, experts=".mlp.")
    )
    stock.assert_equal_bundles(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_every_width_group_and_mode_side_by_side(name, checkpoint, build, stock, tmp_path):
    source = checkpoint(name)
    places = [(layer, role) for layer in range(3) for role in PROJECTIONS]
    chosen = dict(zip(places, ALL_WIDTHS, strict=True))
    rules = [f"{role} in layers {layer}: {words(w)}" for (layer, role), w in chosen.items()]
    ours = build("\n".join(["target mlx_affine", *rules]), source.published)
    by_path = {
        f"model.layers.{layer}.{PROJECTIONS[role]}": width
        for (layer, role), width in chosen.items()
    }
    theirs = stock.convert_by(source.readable, tmp_path / "stock", by_path.get)
    stock.assert_equal_bundles(ours, theirs)


@pytest.mark.parametrize("name", UNIFORM)
def test_one_width_for_every_matrix(name, checkpoint, build, stock, tmp_path):
    source, width = checkpoint(name), UNIFORM[name]
    ours = build(f"target mlx_affine\nall: {words(width)}\n", source.published)
    theirs = stock.convert_by(
        source.readable, tmp_path / "stock", lambda path: None if ROUTER.search(path) else width
    )
    stock.assert_equal_bundles(ours, theirs)


def test_a_bundle_of_several_shards(checkpoint, build, stock, tmp_path):
    source = checkpoint("qwen3_moe")
    policy = "target mlx_affine\nextends mlx_4bit\noutput shard_size 500KB\n"
    ours = build(policy, source.published)
    stock.assert_equal_bundles(ours, stock.convert(source.readable, tmp_path / "stock"))
    shards = sorted(ours.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size <= 600_000 for path in shards)


def test_the_config_is_the_publishers_but_for_quantization(checkpoint, build):
    source = checkpoint("minimax_m2_fp8").published
    wanted = json.loads((source / "config.json").read_text())
    found = json.loads((build("mlx_4bit", source) / "config.json").read_text())
    del wanted["quantization_config"]
    assert found.pop("quantization") == found.pop("quantization_config")
    assert found == wanted


@pytest.mark.parametrize("policy", ["config_i", "mlx_4bit"])
def test_the_embedded_model_writes_what_stock_writes(policy, build, stock, tmp_path):
    ours, theirs = build(policy, EXAMPLE), tmp_path / "stock"
    if policy == "config_i":
        n_layers = json.loads((EXAMPLE / "config.json").read_text())["num_hidden_layers"]
        stock.convert_by(EXAMPLE, theirs, lambda path: config_i(path, n_layers), dtype="bfloat16")
    else:
        stock.convert(EXAMPLE, theirs)
    stock.assert_equal_bundles(ours, theirs)
    tokens = stock.written(ours, "The ", 12)
    assert tokens
    assert tokens == stock.written(theirs, "The ", 12)
