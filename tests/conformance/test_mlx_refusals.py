"""Families that an MLX bundle needs more for than renaming and stacking are refused by name."""

from __future__ import annotations

import json

import pytest

from emitters.mlx_affine.names import FAMILIES
from policy_dsl.cli import main

# One layer of each, with the tensor that makes it what it is.
MLA = {"self_attn.kv_b_proj.weight": ("BF16", [512, 64])}
GATED_DELTA = {
    "linear_attn.A_log": ("F32", [4]),
    "linear_attn.conv1d.weight": ("BF16", [256, 1, 4]),
}
MXFP4 = {
    "mlp.experts.down_proj_blocks": ("U8", [2, 128, 4, 16]),
    "mlp.experts.down_proj_scales": ("U8", [2, 128, 4]),
}
REFUSED = {
    "deepseek_v3": ("model", MLA, {"n_routed_experts": 2}),
    "kimi_k2": ("model", MLA, {"n_routed_experts": 2}),
    "qwen3_next": ("model", GATED_DELTA, {"num_experts": 2}),
    "qwen3_5": ("model.language_model", GATED_DELTA, {}),
    "gpt_oss": (
        "model",
        MXFP4,
        {"num_local_experts": 2, "quantization_config": {"quant_method": "mxfp4"}},
    ),
}


def recorded(family: str) -> str:
    """Recorded headers of a model of one layer."""
    prefix, block, counts = REFUSED[family]
    tensors = {
        "lm_head.weight": ("BF16", [256, 128]),
        f"{prefix}.embed_tokens.weight": ("BF16", [256, 128]),
        f"{prefix}.layers.0.input_layernorm.weight": ("BF16", [128]),
    }
    tensors |= {f"{prefix}.layers.0.{name}": entry for name, entry in block.items()}
    sizes = {"U8": 1, "BF16": 2, "F32": 4}
    nbytes = 0
    for dtype, shape in tensors.values():
        size = sizes[dtype]
        for length in shape:
            size *= length
        nbytes += size
    config = {"model_type": family, "num_hidden_layers": 1, "tie_word_embeddings": False}
    groups = [
        {"dtype": dtype, "shape": shape, "names": [name]}
        for name, (dtype, shape) in tensors.items()
    ]
    document = {
        "policyc_headers": 1,
        "id": f"a small {family}",
        "config": config | counts,
        "side_files": None,
        "totals": {"tensors": len(tensors), "nbytes": nbytes},
        "files": [{"file": None, "nbytes": None, "tensors": groups}],
    }
    return json.dumps(document)


def test_every_refused_family_is_here():
    assert set(REFUSED) == {family for family, reason in FAMILIES.items() if reason}


@pytest.mark.parametrize("family", REFUSED)
def test_plan_refuses_it_by_name(family, tmp_path, capsys):
    source = tmp_path / f"{family}.json"
    source.write_text(recorded(family))
    assert main(["plan", "mlx_4bit", "--model", str(source)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "error[unsupported-family]" in shown.err
    assert family in shown.err
    assert FAMILIES[family] in " ".join(shown.err.split())
