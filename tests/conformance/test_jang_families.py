"""Qwen3-MoE, GLM-4.5, DeepSeek-V3 and Kimi-K2 in jang's verifiers and loader.

What jang computes with them and with other families: `test_config_forms.py`.
"""

from __future__ import annotations

import pytest
from bundles import tensors
from jang_bundles import assert_held, coded, modules, parameters, ran, read

pytestmark = pytest.mark.slow

MIXED = "extends jangtq_k"
# Equal ones would be joined, and the norms after them lost.
UNEQUAL = f"{MIXED}\nattention.v_proj: 8bit g32"
PLAIN_HEADS = f'{MIXED}\n"*.kv_b_proj.weight": f16'
CASES = {
    "qwen3_moe": ("qwen3_moe", UNEQUAL),
    "qwen3_moe_fp8": ("qwen3_moe_fp8", UNEQUAL),
    "glm4_moe": ("glm4_moe", UNEQUAL),
    "deepseek_v3": ("deepseek_v3", MIXED),
    "deepseek_v3 with plain heads": ("deepseek_v3", PLAIN_HEADS),
    "kimi_k2": ("kimi_k2", MIXED),
    "kimi_k2 with plain heads": ("kimi_k2", PLAIN_HEADS),
}
LAYOUTS = ("prestacked", "per_expert")
STAMPED = {
    "qwen3_moe": "qwen3",
    "glm4_moe": "glm4_moe",
    "deepseek_v3": "deepseek_v3",
    "kimi_k2": "deepseek_v3",
}
HALVES = ("embed_q", "unembed_out")


@pytest.fixture
def bundle(request, jangtq):
    """The bundle of a case in a layout."""
    case, layout = request.param
    source, policy = CASES[case]
    return jangtq(source, f"{policy}\noutput layout {layout}")


def as_loaded(bundle, jang):
    """Parameters and quantized modules that mlx-lm makes of the bundle's.

    Latent attention is cast to BF16 on loading, and its `kv_b_proj` split by heads.
    """
    held, quantized, config = parameters(bundle), modules(bundle), read(bundle, "config.json")
    if "kv_lora_rank" not in config:
        return held, quantized
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for layer in range(config["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn"
        path = f"{attention}.kv_b_proj"
        names = [name for name in held if name.startswith(f"{path}.")]
        parts = {name.rpartition(".")[2]: held.pop(name) for name in names}
        _, bits, group_size = quantized.pop(path, ("", 8, 64))
        width = {"bits": bits, "group_size": group_size}
        for name, tensor in jang("split_heads", parts, heads, nope, width).items():
            held[f"{attention}.{name}"] = tensor
        if len(parts) > 1:
            for half in HALVES:
                quantized[f"{attention}.{half}"] = "QuantizedMultiLinear", bits, group_size
    return jang("cast", held), quantized


EVERYWHERE = [(case, layout) for case in CASES for layout in LAYOUTS]


@pytest.mark.parametrize("bundle", EVERYWHERE, indirect=True, ids=" ".join)
def test_the_loader_holds_every_tensor(bundle, jang):
    expected, quantized = as_loaded(bundle, jang)
    loaded = jang("load", bundle)
    assert_held(loaded, bundle, expected)
    assert loaded.modules == quantized
    assert set(coded(bundle).values()) == {2, 4}


@pytest.mark.parametrize("case", CASES)
def test_the_verifiers_pass(case, jangtq):
    source, policy = CASES[case]
    bundle = jangtq(source, f"{policy}\noutput layout prestacked")
    structure = ran("verify_jangtq_prestacked", str(bundle))
    assert structure.returncode == 0, structure.stderr
    assert f"prestack triplets:   {len(coded(bundle))}\n" in structure.stdout
    stamp = ran("verify_capabilities", str(bundle))
    assert stamp.returncode == 0, stamp.stdout
    family = STAMPED[source.removesuffix("_fp8")]
    assert f"capabilities OK (family={family})" in stamp.stdout


@pytest.mark.parametrize("case", CASES)
def test_the_rebundler_stacks_experts_apart_to_the_same(case, jangtq, jang, tmp_path):
    source, policy = CASES[case]
    stacked, apart = (jangtq(source, f"{policy}\noutput layout {name}") for name in LAYOUTS)
    jang("rebundle", apart, tmp_path / "rebundled")
    assert tensors(tmp_path / "rebundled") == tensors(stacked)


@pytest.mark.parametrize("case", CASES)
def test_no_reader_is_refused(case, jang_refusals):
    assert jang_refusals(*CASES[case]) == []


@pytest.mark.parametrize("family", ["minimax_m2", "qwen3_moe", "glm4_moe"])
def test_fused_experts_make_the_same_bundle(family, jangtq):
    # transformers 5 saves them as 3-D tensors, and MiniMax's block under another name.
    assert tensors(jangtq(f"{family}_fused", MIXED)) == tensors(jangtq(family, MIXED))
