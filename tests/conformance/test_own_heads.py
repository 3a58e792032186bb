"""A head that a tied config hides: stored by a rule, its readers compute with it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

pytestmark = pytest.mark.slow

POLICY = "target mlx_affine\nall: 8bit g32\nlm_head: 8bit g32\n"


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe", "minimax_m2", "glm4_moe"]
)
def test_stock_mlx_lm_computes_with_the_head_that_is_stored(
    name, checkpoint, build, stock, tmp_path
):
    source = checkpoint(name).published
    tied = tmp_path / "tied"
    shutil.copytree(source, tied)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    wanted = stock.logits(shutil.move(build(POLICY, source), tmp_path / "wanted"))
    ours = build(POLICY, tied)
    assert json.loads((ours / "config.json").read_text())["tie_word_embeddings"] is False
    # Not those of the embedding, which the config of the source asks for.
    assert np.array_equal(stock.logits(ours), wanted)
