"""Property: what a build finished, `verify` finds nothing wrong with, for any target."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from policyc.cli import main
from tests.emitters.core.small_checkpoints import Array, Tensors, nearest_bf16, write_folder
from tests.models import TINY

WIDTHS = {
    "mlx_affine": [
        *("2bit g32", "3bit", "4bit g32", "5bit", "6bit", "8bit g32"),
        *("4bit mxfp4", "8bit mxfp8", "4bit nvfp4", "keep", "f32"),
    ],
    "gptq": ["2bit g32", "3bit g64", "4bit g32 asym", "8bit g32", "4bit g64 by opt-rtn"],
    "jangtq_prestack": ["2bit mxtq", "3bit mxtq", "4bit mxtq", "8bit", "keep"],
    "hipfire_hfq": ["mq4", "mq3-lloyd", "mq2-lloyd", "mq6"],
}
# What readers of the target do not take otherwise.
FIXED = {
    "mlx_affine": "router, norm: keep",
    "gptq": "embed, lm_head, router, norm: keep",
    "jangtq_prestack": "router, norm: f16",
    "hipfire_hfq": "embed, lm_head, router: q8; norm, router_bias: f16",
}
KINDS = ("normal", "heavy", "sparse", "constant", "zero", "tiny", "spikes")


def drawn(random: np.random.Generator, kind: str, shape: tuple[int, ...]) -> Array:
    """float32 values of a kind."""
    values = 0.02 * random.standard_normal(shape)
    if kind == "heavy":
        values = 0.02 * np.clip(random.standard_t(1.5, shape), -1000, 1000)
    elif kind == "sparse":
        values = values * (random.random(shape) < 0.02)
    elif kind == "constant":
        values = np.full(shape, values.flat[0])
    elif kind == "zero":
        values = 0 * values
    elif kind == "tiny":
        values = values * 1e-4
    elif kind == "spikes":
        values = values * np.where(random.random(shape) < 0.01, 100, 0.01)
    return values.astype(np.float32)


def minimax(seed: int, hidden: int, kinds: tuple[str, ...], dtype: str) -> Tensors:
    """A MiniMax-M2 of one layer and three experts, kinds of values in turn."""
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (512, hidden),
        "lm_head.weight": (512, hidden),
        "model.norm.weight": (hidden,),
    }
    block = "model.layers.0"
    heads = {"q": (256, hidden), "k": (128, hidden), "v": (128, hidden), "o": (hidden, 256)}
    shapes |= {f"{block}.self_attn.{name}_proj.weight": shape for name, shape in heads.items()}
    shapes |= {f"{block}.self_attn.{name}_norm.weight": heads[name][:1] for name in "qk"}
    for name in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{block}.{name}.weight"] = (hidden,)
    moe = f"{block}.block_sparse_moe"
    shapes |= {f"{moe}.gate.weight": (3, hidden), f"{moe}.e_score_correction_bias": (3,)}
    for expert in range(3):
        for name in ("w1", "w2", "w3"):
            shapes[f"{moe}.experts.{expert}.{name}.weight"] = (hidden, hidden)
    held = {}
    for number, (name, shape) in enumerate(shapes.items()):
        values = drawn(random, kinds[number % len(kinds)], shape)
        held[name] = (dtype, nearest_bf16(values) if dtype == "BF16" else values)
    return held


@pytest.mark.parametrize("target", WIDTHS)
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    # A smaller example would cost many builds.
    phases=[Phase.generate],
    suppress_health_check=[*HealthCheck],
)
@given(data=st.data())
def test_no_build_that_succeeds_fails_its_own_verify(target: str, data: st.DataObject) -> None:
    kinds = tuple(data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5)))
    dtype = data.draw(st.sampled_from(["BF16", "F32"]))
    widths = data.draw(st.lists(st.sampled_from(WIDTHS[target]), min_size=3, max_size=3))
    hidden = 256 if target == "hipfire_hfq" else 64
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = json.loads((TINY / "config.json").read_text())
        config |= {"hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": 1}
        config |= {"num_local_experts": 3, "attn_type_list": [1]}
        config["torch_dtype"] = data.draw(st.sampled_from(["bfloat16", "float16", "float32"]))
        del config["quantization_config"]
        tensors = minimax(data.draw(st.integers(0, 99)), hidden, kinds, dtype)
        config["vocab_size"] = 512
        write_folder(folder / "model", config, tensors)
        for side in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / side, folder / "model")
        rules = [f"attention: {widths[0]}", f"gate_proj, up_proj: {widths[1]}"]
        text = "\n".join([f"target {target}", *rules, f"down_proj: {widths[2]}", FIXED[target]])
        (folder / "p.qpol").write_text(text, encoding="utf-8")
        model = ["--model", str(folder / "model")]
        if main(["build", str(folder / "p.qpol"), *model, "-o", str(folder / "out"), "-q"]):
            return
        source = ["--source", str(folder / "model")]
        assert main(["verify", str(folder / "out"), *source]) == 0
        assert main(["verify", str(folder / "out")]) == 0
        (folder / "out" / "policyc.json").unlink()
        assert main(["verify", str(folder / "out"), *source]) == 0
