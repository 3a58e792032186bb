"""A family with everything that tables can say, by one table: built, verified, and read.

Nobody publishes such a model: latent attention, experts fused and stored by columns, gate and up
in turns, a short convolution, norms around zero. A small reader computes with its bundle what the
source means.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from policyc.cli import main
from tests.emitters.new_families import built, known

TABLE = """
include: [decoder, centred_norms]
model_types: [novel_hybrid]
experts_key: n_experts
block:
  "self_attn.{q_norm,k_norm}.weight": norm
  "self_attn.{q_proj,kv_b_proj,o_proj}.weight": attention.*
  "self_attn.{k_mix,v_mix}.weight": attention.*
  "conv.weight": conv
  "conv.decay": ssm
  "moe.gate.weight": router
  "moe.gate_up_proj": {experts: [gate_proj, up_proj], interleaved: true, transposed: true}
  "moe.down_proj": {experts: [down_proj], transposed: true}
where: {moe: always}
needs:
  attention.q_proj: [heads * nope, hidden_size]
  attention.kv_b_proj: [heads * nope + heads * value_size, hidden_size]
  "attention.{k_mix,v_mix}": [hidden_size, hidden_size]
  attention.o_proj: [hidden_size, heads * value_size]
  conv: [hidden_size, 1, 4]
  "conv.decay": [1, 1, 8, 1]
  router: [n_experts, hidden_size]
  "experts.{gate_proj,up_proj}": [intermediate_size, hidden_size]
  experts.down_proj: [hidden_size, intermediate_size]
config: {heads: {}, nope: {}, value_size: {}, n_experts: {}, intermediate_size: {}, kept: {}}
mlx:
  model: language_model
  names:
    "lm_head.weight": "{model}.head.weight"
  block:
    "self_attn.kv_b_proj.weight":
      split: [nope, value_size]
      stack: true
      to: [{name: self_attn.embed_q.weight, transpose: true}, self_attn.unembed_out.weight]
    "self_attn.{k_mix,v_mix}.weight": {concat: self_attn.mix.weight}
    "conv.weight": {axes: [0, 2, 1]}
    "conv.decay": {shape: [-1], take: kept, to: conv.log_decay}
    "moe.gate_up_proj": [moe.switch.gate.weight, moe.switch.up.weight]
    "moe.down_proj": moe.switch.down.weight
  bare: ["*.conv"]
targets:
  mlx_affine: {}
"""
HIDDEN, INNER, WORDS, HEADS, NOPE, VALUE, EXPERTS, KEPT = 64, 96, 128, 3, 32, 64, 4, 6
CONFIG = {
    "model_type": "novel_hybrid",
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "heads": HEADS,
    "nope": NOPE,
    "value_size": VALUE,
    "n_experts": EXPERTS,
    "kept": KEPT,
    "torch_dtype": "float32",
}
SHAPES = {
    "input_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.q_norm.weight": (NOPE,),
    "self_attn.k_norm.weight": (NOPE,),
    "self_attn.q_proj.weight": (HEADS * NOPE, HIDDEN),
    "self_attn.kv_b_proj.weight": (HEADS * (NOPE + VALUE), HIDDEN),
    "self_attn.k_mix.weight": (HIDDEN, HIDDEN),
    "self_attn.v_mix.weight": (HIDDEN, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HEADS * VALUE),
    "conv.weight": (HIDDEN, 1, 4),
    "conv.decay": (1, 1, 8, 1),
    "moe.gate.weight": (EXPERTS, HIDDEN),
    "moe.gate_up_proj": (EXPERTS, HIDDEN, 2 * INNER),
    "moe.down_proj": (EXPERTS, INNER, HIDDEN),
}
Tensors = Mapping[str, np.ndarray]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of the family."""
    with known(tmp_path, "novel_hybrid", TABLE, CONFIG, tensors()) as folder:
        yield folder


def tensors() -> Tensors:
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (WORDS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (WORDS, HIDDEN),
    }
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in SHAPES.items()}
    return {
        name: (random.normal(size=shape) / 8).astype(np.float32) for name, shape in shapes.items()
    }


def meant(held: Tensors) -> dict[str, np.ndarray]:
    """What the reader should hold, from the source's tensors, by numpy alone."""
    found = {
        "language_model.embed_tokens.weight": held["model.embed_tokens.weight"],
        "language_model.norm.weight": held["model.norm.weight"] + 1,
        "language_model.head.weight": held["lm_head.weight"],
    }
    for layer in range(2):
        own = {name: held[f"model.layers.{layer}.{name}"] for name in SHAPES}
        heads = own["self_attn.kv_b_proj.weight"].reshape(HEADS, NOPE + VALUE, HIDDEN)
        norms = [name for name in SHAPES if "norm" in name]
        both = own["moe.gate_up_proj"].transpose(0, 2, 1)
        mixed = [own[f"self_attn.{letter}_mix.weight"] for letter in "kv"]
        block: dict[str, np.ndarray] = {
            **{name: own[name] + 1 for name in norms},
            "self_attn.q_proj.weight": own["self_attn.q_proj.weight"],
            "self_attn.o_proj.weight": own["self_attn.o_proj.weight"],
            "self_attn.embed_q.weight": heads[:, :NOPE].transpose(0, 2, 1),
            "self_attn.unembed_out.weight": heads[:, NOPE:],
            "self_attn.mix.weight": np.concatenate(mixed),
            "conv.weight": own["conv.weight"].transpose(0, 2, 1),
            "conv.log_decay": own["conv.decay"].reshape(-1)[:KEPT],
            "moe.gate.weight": own["moe.gate.weight"],
            "moe.switch.gate.weight": both[:, 0::2],
            "moe.switch.up.weight": both[:, 1::2],
            "moe.switch.down.weight": own["moe.down_proj"].transpose(0, 2, 1),
        }
        found |= {f"language_model.layers.{layer}.{name}": part for name, part in block.items()}
    return found


class Reader:
    """Loads a bundle strictly, as its config says, with nothing of the program that wrote it."""

    def __init__(self, folder: Path, names: set[str]) -> None:
        stored = {}
        for path in folder.glob("*.safetensors"):
            stored |= load_file(path)
        config = json.loads((folder / "config.json").read_text())
        quantization: dict[str, Any] = config.get("quantization", {})
        self.tensors = {}
        for name in names:
            module = name.removesuffix(".weight")
            entry = quantization.get(module)
            values = stored.pop(name)
            if entry:
                scales, biases = stored.pop(f"{module}.scales"), stored.pop(f"{module}.biases")
                values = _decoded(values, scales, biases, entry["bits"], entry["group_size"])
            self.tensors[name] = values
        assert sorted(stored) == []


def _decoded(
    words: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int, group: int
) -> np.ndarray:
    """Affine groups: a code is `bits` bits of the row's stream of 32-bit words."""
    stream = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(*stream.shape[:-1], -1, bits)
    numbers = (codes * (1 << np.arange(bits))).sum(-1).astype(np.float32)
    grouped = numbers.reshape(*scales.shape, group)
    values: np.ndarray = grouped * scales[..., None] + biases[..., None]
    return values.reshape(numbers.shape)


def test_plain_values_are_those_that_the_source_means(source: Path) -> None:
    wanted = meant(tensors())
    found = Reader(built(source, "mlx_affine", "all: keep"), {*wanted}).tensors
    assert {name: one.shape for name, one in found.items()} == {
        name: one.shape for name, one in wanted.items()
    }
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_coded_values_are_near_and_parts_have_rules_of_their_own(source: Path) -> None:
    wanted = meant(tensors())
    rules = "all: 8bit\nattention.kv_b_proj: 6bit\nattention.unembed_out in layers 1: 4bit"
    out = built(source, "mlx_affine", rules)
    found = Reader(out, {*wanted}).tensors
    for name, values in wanted.items():
        error = np.linalg.norm(found[name] - values) / np.linalg.norm(values)
        assert error < (0.15 if "unembed_out" in name else 0.03), name
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    bits = {
        (part, layer): quantization[f"language_model.layers.{layer}.self_attn.{part}"]["bits"]
        for part in ("embed_q", "unembed_out")
        for layer in (0, 1)
    }
    assert bits == {
        ("embed_q", 0): 6,
        ("embed_q", 1): 6,
        ("unembed_out", 0): 6,
        ("unembed_out", 1): 4,
    }


def test_joined_tensors_have_one_treatment(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = source.parent / "policy.qpol"
    policy.write_text("target mlx_affine\nall: 8bit g32\nattention.v_mix: 4bit g32\n")
    assert main(["plan", str(policy), "--model", str(source)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "error[mixed-stack]" in said
    assert "self_attn.mix" in said


def test_a_damaged_part_is_found_in_the_source_s_own_places(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = built(source, "mlx_affine", "all: keep")
    path = out / "model.safetensors"
    held = load_file(path)
    name = "language_model.layers.1.self_attn.embed_q.weight"
    held[name][2, 5, 7] += 1
    save_file(held, path, metadata={"format": "mlx"})
    capsys.readouterr()
    assert main(["verify", str(out), "--source", str(source)]) == 1
    said = " ".join("".join(capsys.readouterr()).split())
    # Head 2 begins at row 2 * (32 + 64); its column 7 is row 7, its row 5 is column 5.
    assert "model.layers.1.self_attn.kv_b_proj.weight[199, 5]" in said


def test_a_table_that_calls_two_tensors_alike_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = TABLE.replace(
        '  block:\n    "self_attn.kv',
        ('  block:\n    "self_attn.q_proj.weight": self_attn.o_proj.weight\n    "self_attn.kv'),
    )
    (tmp_path / "p.qpol").write_text("target mlx_affine\nall: keep\n")
    with known(tmp_path, "novel_hybrid", table, CONFIG, tensors()) as source:
        code = main(["plan", str(tmp_path / "p.qpol"), "--model", str(source)])
    assert code == 2
    said = capsys.readouterr().err
    names = (f"model.layers.0.self_attn.{word}_proj.weight" for word in "oq")
    path = "language_model.layers.0.self_attn.o_proj"
    assert f"error[conflict]: mlx_affine: {' and '.join(names)} would both be called {path}" in said
