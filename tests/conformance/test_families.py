"""Stock mlx-lm loads bundles of every family strictly, and computes what it does with its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from family_cases import CASES, GOLDEN, TIED, TOKENIZER, expected, rules_for, source_of

from policy_dsl.roles.architecture import architecture, family_of
from policy_dsl.sources.reference import open_source

pytestmark = pytest.mark.slow

PROMPT = (1, 5, 17, 33, 3, 83, 55, 93, 23)


def test_a_text_model_below_another_answers_as_alone(build, stock, tmp_path):
    """Mistral Small 4 as it is published: a mistral3 by its model_type."""
    files = pytest.importorskip("safetensors.torch")
    case = GOLDEN / "mistral4"
    config = json.loads((case / "config.json").read_text())
    (tmp_path / "below").mkdir()
    outer = {"model_type": "mistral3", "text_config": config, "torch_dtype": "bfloat16"}
    (tmp_path / "below" / "config.json").write_text(json.dumps(outer))
    held = files.load_file(case / "model.safetensors")
    names = {name: f"language_model.{name}" for name in held}
    files.save_file(
        {names[name]: one for name, one in held.items()}, tmp_path / "below/model.safetensors"
    )
    found = []
    for source in (case, tmp_path / "below"):
        bundle = build("target mlx_affine\nall: 4bit g32\n", source)
        found.append(stock.logits(bundle, PROMPT))
        shutil.rmtree(bundle)
    assert np.array_equal(*found)


@pytest.mark.parametrize("case", CASES)
def test_stock_answers_alike(case, build, stock, tmp_path):
    source = Path(shutil.copytree(source_of(case, tmp_path), tmp_path / "source"))
    inventory = open_source(str(source))
    family = family_of(inventory.config)
    if family is None or architecture(family).refusal("mlx_affine") is not None:
        pytest.skip("not taken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, source)
    known = expected(case)
    rules = rules_for(inventory, known["quantization"]).replace("; ", "\n")
    ours = build(f"target mlx_affine\n{rules}\n", source)
    found = stock.logits(ours, PROMPT)
    assert np.isfinite(found).all()
    if not known["stock_converts"] or case == TIED:
        return
    theirs = stock.convert(source, tmp_path / "stock", q_bits=4, q_group_size=32)
    stock.assert_equal_bundles(ours, theirs, PROMPT)
