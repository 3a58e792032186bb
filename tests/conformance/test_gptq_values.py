"""What readers' kernels unpack: our values, and with them the model's answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gptq_bundles import decoded, linears, write_plain
from gptq_policies import WIDTHS, mixed

from emitters import FORMATS
from emitters.gptq.spec import STORAGE

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-minimax-m2"
# What the embedded model has learned to continue.
PROMPT = (5, 21, 80, 12, 300, 45, 7, 99, 512, 33, 64, 18)


def unpacked(bundle, peer):
    """Name -> values of every packed linear, by the peer's kernel."""
    held = linears(bundle)
    asked = [
        (one.parts, one.treatment.bits, one.treatment.group_size, version(one))
        for one in held.values()
    ]
    return dict(zip(held, peer("unpacked", asked), strict=True))


def version(linear):
    """The version of a linear's zero points."""
    return STORAGE[linear.treatment.scheme].version


def assert_equal(found, expected):
    """Same values, bit for bit."""
    assert found.keys() == expected.keys()
    assert [name for name in found if not np.array_equal(found[name], expected[name])] == []


@pytest.mark.parametrize("storage", ["int sym", "int asym", "int-v2 sym", "int-v2 asym"])
def test_auto_round_unpacks_our_values(storage, gptq, auto_round):
    bundle = gptq("llama", mixed(storage))
    treatments = {one.treatment for one in linears(bundle).values()}
    assert {(one.bits, one.group_size) for one in treatments} == set(WIDTHS)
    assert_equal(unpacked(bundle, auto_round), decoded(bundle))


@pytest.mark.parametrize(
    "storage", ["int-gidx sym", "int-gidx asym", "int-v2-gidx sym", "int-v2-gidx asym", "int sym"]
)
def test_gptqmodel_unpacks_our_values(storage, gptq, gptqmodel):
    bundle = gptq("llama", mixed(storage))
    assert_equal(unpacked(bundle, gptqmodel), decoded(bundle))


@pytest.mark.parametrize("storage", ["int-gidx sym", "int-v2-gidx asym"])
def test_gptqmodel_unpacks_columns_in_activation_order_as_we_do(storage, gptq, gptqmodel):
    held = linears(gptq("llama", mixed(storage)))
    asked, expected, random = [], {}, np.random.default_rng(3)
    for name, one in held.items():
        parts = {**one.parts, "g_idx": random.permutation(one.parts["g_idx"])}
        bits, size = one.treatment.bits, one.treatment.group_size
        asked.append((parts, bits, size, version(one)))
        treatment = replace(one.treatment, scheme=one.treatment.scheme[:-4] + "act-order")
        columns = len(parts["g_idx"])
        expected[name] = FORMATS["gptq"].codec().decode(parts, "BF16", treatment, columns)
    found = dict(zip(held, gptqmodel("unpacked", asked), strict=True))
    assert_equal(found, expected)


def test_the_embedded_model_answers_alike(gptq, auto_round, stock_transformers, tmp_path):
    bundle = gptq(EXAMPLE, "extends w4a16")
    theirs = write_plain(bundle, tmp_path / "theirs", unpacked(bundle, auto_round))
    ours = write_plain(bundle, tmp_path / "ours")
    expected = stock_transformers("logits", theirs, PROMPT, "float32")
    found = stock_transformers("logits", ours, PROMPT, "float32")
    assert np.isfinite(found).all()
    assert np.array_equal(found, expected)
    assert stock_transformers("missing", ours, "float32") == []
