"""A family that nobody has heard of: its table alone makes its models planned and built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from policy_dsl.roles import architecture
from policyc.cli import main
from tests.emitters import new_families

TABLE = """
include: [decoder, attention]
model_types: [novel_moe]
experts_key: num_experts
block:
  "feed_forward.gate.weight": router
  "feed_forward.experts.{expert}.w1.weight": experts.gate_proj
  "feed_forward.experts.{expert}.w2.weight": experts.down_proj
  "feed_forward.experts.{expert}.w3.weight": experts.up_proj
aliases: {w1: [gate_proj], w2: [down_proj], w3: [up_proj]}
where: {moe: always}
needs:
  router: [num_experts, hidden_size]
  "experts.{gate_proj,up_proj}": [intermediate_size, hidden_size]
  experts.down_proj: [hidden_size, intermediate_size]
config:
  intermediate_size: {}
  num_experts: {}
mlx:
  block:
    "feed_forward.experts.{expert}.w1.weight": feed_forward.switch_mlp.gate_proj.weight
    "feed_forward.experts.{expert}.w2.weight": feed_forward.switch_mlp.down_proj.weight
    "feed_forward.experts.{expert}.w3.weight": feed_forward.switch_mlp.up_proj.weight
  bare: ["*.feed_forward.gate"]
targets:
  mlx_affine: {}
  gptq: {}
"""
HIDDEN, INNER, WORDS, HEADS, EXPERTS = 64, 96, 128, 2, 4
CONFIG = {
    "model_type": "novel_moe",
    "vocab_size": WORDS,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_experts": EXPERTS,
}


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    """A checkpoint of the family."""
    with new_families.known(tmp_path, "novel", TABLE, CONFIG, tensors()) as folder:
        yield folder


def tensors() -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens": (WORDS, HIDDEN), "lm_head": (WORDS, HIDDEN)}
    shapes["model.norm"] = (HIDDEN,)
    for layer in range(2):
        block = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{block}.{name}"] = (HIDDEN,)
        for letter in "qkvo":
            shapes[f"{block}.self_attn.{letter}_proj"] = (HIDDEN, HIDDEN)
        shapes[f"{block}.feed_forward.gate"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            path = f"{block}.feed_forward.experts.{expert}"
            shapes |= {f"{path}.w1": (INNER, HIDDEN), f"{path}.w3": (INNER, HIDDEN)}
            shapes[f"{path}.w2"] = (HIDDEN, INNER)
    random = np.random.default_rng(0)
    return {
        f"{name}.weight": random.normal(size=shape).astype(np.float16)
        for name, shape in shapes.items()
    }


def built(source: Path, target: str, rules: str) -> dict[str, np.ndarray]:
    out = new_families.built(source, target, rules)
    return {
        name: array for file in out.glob("*.safetensors") for name, array in load_file(file).items()
    }


def test_its_experts_are_stacked_for_mlx(source: Path) -> None:
    bundle = built(source, "mlx_affine", "all: 4bit\nfamily novel and w2: 8bit")
    path = "model.layers.1.feed_forward"

    assert bundle[f"{path}.switch_mlp.gate_proj.weight"].shape == (EXPERTS, INNER, HIDDEN // 8)
    assert bundle[f"{path}.switch_mlp.down_proj.weight"].shape == (EXPERTS, HIDDEN, INNER // 4)
    assert f"{path}.gate.scales" not in bundle


def test_its_experts_keep_their_names_for_gptq(source: Path) -> None:
    bundle = built(source, "gptq", "all: 4bit sym\nembed, lm_head: keep")
    path = "model.layers.1.feed_forward.experts.3"

    assert bundle[f"{path}.w1.qweight"].shape == (HIDDEN // 8, INNER)
    assert bundle[f"{path}.w2.scales"].shape == (INNER // 32, HIDDEN)


def test_a_format_that_its_table_does_not_name_refuses_it(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = source.parent / "policy.qpol"
    policy.write_text("target hipfire_hfq\nall: mq4\n")

    assert main(["plan", str(policy), "--model", str(source)]) != 0
    assert "its tensor rules in HFQ files are not known" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    "written",
    [
        "configs: {}",
        "needs: {experts.gate: [hidden_size]}",
        'mlx: {names: {"lm_heat.weight": head.weight}}',
        'mlx: {names: {"lm_head.weight": [a.weight, b.weight]}}',
        'mlx: {names: {"lm_head.weight": {splits: halves, to: [a, b]}}}',
        "mlx: {nude: []}",
    ],
)
def test_a_table_that_says_what_none_can_is_refused(source: Path, written: str) -> None:
    table = architecture.TABLES / "novel.yaml"
    table.with_name("odd.yaml").write_text(f"include: [decoder]\nmodel_types: [odd]\n{written}\n")
    architecture.families.cache_clear()

    with pytest.raises((TypeError, ValueError)):
        architecture.architecture("odd")


def test_what_its_table_says_of_a_reader_is_held(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = source.parent / "policy.qpol"
    policy.write_text("target mlx_affine\nall: 4bit\nrouter: 8bit\n")

    assert main(["plan", str(policy), "--model", str(source)]) != 0
    assert "bare parameter" in " ".join(capsys.readouterr().err.split())
