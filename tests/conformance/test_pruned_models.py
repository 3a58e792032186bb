"""Pruned bundles are those of a model that was pruned by hand, and its readers load them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from bundles import tensors
from jang_bundles import assert_held, files, modules, parameters
from model_kinds import KINDS

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-minimax-m2"
REAP = EXAMPLE.with_name("tiny-minimax-m2-data") / "reap.safetensors"
WITH_EXPERTS = [name for name, kind in KINDS.items() if kind.has_experts]
PROMPT = (1, 5, 17, 200, 33, 3, 83, 255, 93, 23)


@pytest.fixture
def by_hand():
    """The module that prunes with torch; imported late, as it is heavy."""
    pytest.importorskip("torch")
    return pytest.importorskip("pruned_models")


def keeping(kept, folder: Path) -> str:
    """The lines of a policy that keep these experts."""
    (folder / "keep.json").write_text(json.dumps({"keep": kept}))
    count = len(next(iter(kept.values())))
    return f'prune experts to {count} by keep\ncalibration saliency "keep.json"\n'


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_pruned_bundle_is_stocks_of_the_model_pruned_by_hand(
    name, checkpoint, build, stock, by_hand, tmp_path
):
    source = checkpoint(name)
    kept = by_hand.kept_of(source.readable)
    text = f"target mlx_affine\nextends mlx_4bit\n{keeping(kept, tmp_path)}"
    ours = build(text, source.published)
    less = by_hand.pruned_by_hand(source.readable, tmp_path / "less", kept)
    # Same tensors, widths and logits.
    stock.assert_equal_bundles(ours, stock.convert(less, tmp_path / "stock"))


# The last words spare an importance matrix, which would have to be pruned by hand too.
@pytest.mark.parametrize(
    "policy", ["mlx_4bit", "jangtq_k", "w4a16", "hipfire_mq4\nexperts: 4bit mq4 by rtn"]
)
def test_every_target_writes_the_files_of_the_model_pruned_by_hand(
    policy, build, by_hand, tmp_path
):
    kept = by_hand.kept_of(EXAMPLE)
    less = by_hand.pruned_by_hand(EXAMPLE, tmp_path / "less", kept)
    wanted = build(f"name x\nextends {policy}\n", less).rename(tmp_path / "wanted")
    found = build(f"name x\nextends {policy}\n{keeping(kept, tmp_path)}", EXAMPLE)
    assert files(found) == files(wanted)


def test_the_embedded_model_still_answers_without_two_of_its_experts(build, stock, tmp_path):
    shared = "target mlx_affine\nall: 8bit g32\n"
    pruned = f'{shared}prune experts to 6 by reap\ncalibration saliency "{REAP}"\n'
    found = {}
    for name, text in (("whole", shared), ("pruned", pruned)):
        bundle = build(text, EXAMPLE).rename(tmp_path / name)
        found[name] = stock.logits(bundle, PROMPT)
        assert np.isfinite(found[name]).all()
    whole, less = (found[name].ravel() for name in ("whole", "pruned"))
    # Related, and not the same: two experts of eight are gone.
    assert 0.5 < whole @ less / np.linalg.norm(whole) / np.linalg.norm(less) < 0.9999


@pytest.mark.parametrize("padded", ["true", "false"])
def test_jangs_loader_holds_the_experts_of_the_model_pruned_by_hand(
    padded, build, jang, by_hand, tmp_path
):
    pytest.importorskip("jang_tools")
    kept = by_hand.kept_of(EXAMPLE)
    rules = f"target jangtq_prestack\nextends jangtq_2\noutput pad_experts {padded}\n"
    less = by_hand.pruned_by_hand(EXAMPLE, tmp_path / "less", kept)
    wanted = build(rules, less).rename(tmp_path / "wanted")
    bundle = build(f"{rules}{keeping(kept, tmp_path)}", EXAMPLE)
    assert tensors(bundle) == tensors(wanted)
    loaded = jang("load", bundle)
    assert_held(loaded, bundle, parameters(bundle))
    assert loaded.modules == modules(bundle)
    assert np.isfinite(jang("logits", bundle, PROMPT)).all()
