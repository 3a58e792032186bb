"""What jang computes with our codes: the same weights, and the answers of the source."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import tensors

from emitters.jangtq_prestack.codec import decode
from policy_dsl.treatments import Coded

pytestmark = pytest.mark.slow

STACKS = "model.layers.1.block_sparse_moe.switch_mlp"


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("projection", "columns"), [("gate_proj", 256), ("down_proj", 128)])
def test_weights_are_decoded_alike(bits, projection, columns, jangtq, jang):
    policy = f"extends jangtq_2\nclear tests\nexperts: {bits}bit\ntest norm is f16"
    held = tensors(jangtq("minimax_m2_32", policy))
    packed, norms = (
        np.frombuffer(stored, dtype).reshape(shape)
        for dtype, (_, shape, stored) in (
            (np.uint32, held[f"{STACKS}.{projection}.tq_packed"]),
            (np.float16, held[f"{STACKS}.{projection}.tq_norms"]),
        )
    )
    rows = {"tq_packed": packed.reshape(-1, packed.shape[-1]), "tq_norms": norms.reshape(-1, 1)}
    found = decode(rows, "F32", Coded("mxtq", bits, 0, True, "rtn"), columns)
    expected = jang("decode", packed, norms, bits, columns)
    assert np.array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("policy", ["jangtq_2", "jangtq_k", "jangtq_4"])
def test_the_embedded_model_answers_as_its_source(policy, jangtq, jang, jang_source, stock):
    bundle = jangtq("embedded_fp8", f"extends {policy}\noutput layout prestacked")
    expected = stock.logits(jang_source("embedded_fp8"), dtype="float32")
    found = jang("logits", bundle, stock.PROMPT)
    norms = np.linalg.norm(found) * np.linalg.norm(expected)
    assert (found * expected).sum() / norms > 0.95


def test_both_layouts_answer_alike(jangtq, jang, stock):
    stacked, apart = (
        jang(
            "logits",
            jangtq("embedded_fp8", f"extends jangtq_k\noutput layout {layout}"),
            stock.PROMPT,
        )
        for layout in ("prestacked", "per_expert")
    )
    assert np.array_equal(stacked, apart)
