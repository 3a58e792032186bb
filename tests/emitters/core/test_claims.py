"""What metadata files claim: any are read or refused, and no bug of ours looks like that."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import emitters
from emitters.checkpoints import forms_of
from emitters.core.bundle_reading import open_bundle
from policy_dsl.diagnostics import PolicyError

STOCK = Path(__file__).parents[2] / "golden" / "mlx" / "tiny_minimax_fp8" / "expected"
NAMES = [
    "model.layers.0.mlp.down_proj",
    "model.layers.0.mlp.switch_mlp.up_proj",
    "model.layers.0.self_attn.q_proj",
    "lm_head",
]
PARTS = {
    "weight": ("U32", (64, 8)),
    "scales": ("F16", (64, 2)),
    "biases": ("F16", (64, 2)),
    "qweight": ("I32", (8, 64)),
    "g_idx": ("I32", (64,)),
    "tq_packed": ("U32", (4, 64, 8)),
    "tq_norms": ("F16", (4, 64)),
    "bias": ("F16", ()),
}
TENSORS = st.dictionaries(
    st.builds("{}.{}".format, st.sampled_from(NAMES), st.sampled_from(sorted(PARTS))),
    st.sampled_from(["F16", "U32", "I32"]).flatmap(
        lambda dtype: st.tuples(st.just(dtype), st.lists(st.integers(0, 64), max_size=3).map(tuple))
    ),
    max_size=8,
)
WHOLE = {f"{name}.{part}": form for name in NAMES for part, form in PARTS.items()}
WORDS = [
    *("gptq", "auto-round", "mxtq", "affine", "mxfp4", "int", "auto_round", "gptq_v2"),
    *("auto_round:auto_gptq", "+:.*", "-:lm_head", "(", *NAMES),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, 128, -1, 2.0, 1e400, 10**30]),
    st.sampled_from(WORDS),
)
KEYS = [
    *("quantization", "quantization_config", "quant_method", "bits", "group_size", "sym", "mode"),
    *("dynamic", "extra_config", "modules_in_block_to_quantize", "lm_head", "desc_act"),
    *("packing_format", "checkpoint_format", "format", "data_type", "block_name_to_quantize"),
    *("weight_format", "mxtq_bits", "mxtq_seed", "routed_expert", "routed_expert_bits"),
    *("modules", "scheme", "profile", "gate_proj", "down_proj", "text_config", "hidden_size"),
    *("moe_intermediate_size", "intermediate_size", *NAMES, "+:.*", "("),
]
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=8,
)
MARKED = st.sampled_from(
    [
        {"quantization": {"bits": 4, "group_size": 64}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
        {"quantization_config": {"quant_method": "auto-round", "bits": 4, "group_size": 32}},
        {"weight_format": "mxtq", "quantization": {"bits": 8, "group_size": 64}},
    ]
)
DOCUMENTS = st.builds(
    lambda mark, other, nested: {
        key: {**value, **nested} if isinstance(value, dict) else value
        for key, value in {**mark, **other}.items()
    },
    st.just({}) | MARKED,
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
)
SIDECARS = ("jang_config.json", "quantize_config.json", "quantization_config.json")
FILES = st.fixed_dictionaries(
    {"config.json": DOCUMENTS | VALUES}, optional=dict.fromkeys(SIDECARS, DOCUMENTS | VALUES)
)


@pytest.mark.parametrize("name", [*emitters.FORMATS])
@given(files=FILES, tensors=TENSORS | st.just(WHOLE))
@example(files={}, tensors={})
@example(files={"config.json": []}, tensors=WHOLE)
@example(files={"config.json": {"quantization": [1]}}, tensors=WHOLE)
@example(files={"config.json": {"quantization": {"bits": [], "group_size": {}}}}, tensors=WHOLE)
@example(files={"config.json": {"quantization": {"bits": 0, "group_size": -3}}}, tensors=WHOLE)
def test_any_metadata_are_read_or_refused(
    name: str, files: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    texts = {file: json.dumps(document).encode() for file, document in files.items()}
    try:
        emitters.FORMATS[name].files().claims(texts, forms_of(tensors))
    except (ValueError, PolicyError):
        return


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b"3", b"null"])
@pytest.mark.parametrize("name", ["gptq", "jangtq_prestack", "mlx_affine"])
def test_what_is_not_a_json_object_is_refused(name: str, text: bytes) -> None:
    with pytest.raises(ValueError, match=r"config\.json is (not|nested)"):
        emitters.FORMATS[name].files().claims({"config.json": text}, forms_of(WHOLE))


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError])
def test_a_mistake_in_a_format_is_not_taken_for_another_format(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise error("a typo")

    bundle = shutil.copytree(STOCK, tmp_path / "bundle")
    files = replace(emitters.FORMATS["mlx_affine"].files(), claims=broken)
    monkeypatch.setattr("emitters.mlx_affine.config.FILES", files)
    with pytest.raises(error, match="a typo"):
        open_bundle(bundle)
