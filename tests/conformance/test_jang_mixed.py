"""Mixed bundles: what jang loads as we planned it, and what it does not, as the plan says."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import tensors
from jang_bundles import assert_held, coded, modules, parameters, ran, read

pytestmark = pytest.mark.slow

LAYOUTS = ("prestacked", "per_expert")
# Affine, plain and coded experts side by side, codes of all widths, and affine ones too.
MIXED = """
extends jangtq_k
experts in layers 0,5: 8bit
experts in layers 1: f16
(experts.gate_proj, experts.up_proj) in layers 2: 1bit
experts.down_proj in layers 2: 3bit
experts in layers 3: 4bit
attention in layers 2: 6bit g32
attention.o_proj in layers 3: bf16
attention.q_proj in layers 4: 3bit g128
router in layers 4: 8bit
embed: 5bit g32
lm_head: 4bit g128
clear tests
test norm is f16
"""
CODED = "extends jangtq_2\nclear tests\ntest norm is f16\n"
WIDE_UP = f"{CODED}experts.up_proj: 4bit"
PLAIN_DOWN = f"{CODED}experts.down_proj: 8bit"
# Experts that stock mlx-lm can load too: what is left is the attention.
AFFINE = f"{CODED}experts: 8bit\n"


def described(bundle):
    """Module -> how each of its matrices is stored, from tensors and `config.json` alone."""
    quantization = read(bundle, "config.json")["quantization"]
    held = tensors(bundle)
    found = {}
    for name, (dtype, shape, stored) in held.items():
        path, _, part = name.rpartition(".")
        if part == "tq_bits":
            found[path] = {"scheme": "mxtq", "bits": stored[0]}
        elif part == "scales":
            entry = quantization[path]
            found[path] = {
                "scheme": "affine",
                "bits": entry["bits"],
                "group_size": entry["group_size"],
            }
        elif part == "weight" and len(shape) > 1 and f"{path}.scales" not in held:
            found[path] = {"dtype": dtype.lower()}
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
class TestMixed:
    @pytest.fixture
    def bundle(self, layout, jangtq):
        return jangtq("embedded_fp8", f"{MIXED}\noutput layout {layout}")

    def test_the_loader_holds_every_tensor(self, bundle, jang):
        loaded = jang("load", bundle)
        assert_held(loaded, bundle, parameters(bundle))
        assert loaded.modules == modules(bundle)
        assert len(coded(bundle)) == 9

    def test_the_profile_is_an_explicit_map(self, bundle):
        document = read(bundle, "jang_config.json")
        assert document["profile"] == "custom"
        assert document["modules"] == described(bundle)

    def test_no_reader_is_refused(self, layout, jang_refusals):
        assert jang_refusals("embedded_fp8", f"{MIXED}\noutput layout {layout}") == []

    def test_the_stamp_passes(self, bundle):
        assert ran("verify_capabilities", str(bundle)).returncode == 0


def test_the_structure_passes(jangtq):
    bundle = jangtq("embedded_fp8", f"{MIXED}\noutput layout prestacked")
    said = ran("verify_jangtq_prestacked", str(bundle))
    assert said.returncode == 0, said.stderr
    assert "prestack triplets:   9\n" in said.stdout


@pytest.fixture(scope="module")
def kernels(jangtq, jang):
    """What experts of these policies ask jang's kernels for, or how they fail."""
    bundles = [jangtq("minimax_m2_32", policy) for policy in (CODED, WIDE_UP, PLAIN_DOWN)]
    found = jang("kernel_inputs", bundles, alone=True)
    return dict(zip((CODED, WIDE_UP, PLAIN_DOWN), found, strict=True))


@pytest.mark.parametrize(
    ("policy", "words"), [(CODED, [16, 16]), (WIDE_UP, [16, 32])], ids=["equal", "different"]
)
def test_gate_and_up_share_one_kernel_and_one_width(policy, words, kernels):
    # Rotated input, gate and its norms, up and its norms, one codebook, experts, sizes.
    joined = next(inputs for inputs in kernels[policy] if len(inputs) == 8)
    assert [joined[1].shape[-1], joined[3].shape[-1]] == words
    assert joined[5].shape == (4,)
    _, _, _, row_words, bits, _ = joined[7]
    assert (row_words, bits) == (16, 2)


def test_gate_and_up_of_different_widths_are_refused(jang_refusals):
    assert jang_refusals("minimax_m2_32", CODED) == []
    (reason,) = jang_refusals("minimax_m2_32", WIDE_UP)
    assert "gate and up of different widths" in reason


def test_down_that_is_not_coded_fails_on_the_first_token(kernels, jang_refusals):
    assert "has no attribute 'packed'" in kernels[PLAIN_DOWN]
    (reason,) = jang_refusals("minimax_m2_32", PLAIN_DOWN)
    assert "down must be mxtq too" in reason


@pytest.mark.parametrize("source", ["qwen3_moe", "glm4_moe"])
def test_joined_q_k_and_v_lose_their_norms(source, jangtq, jang, jang_refusals, stock):
    (reason,) = jang_refusals(source, AFFINE)
    assert "joins q, k and v" in reason
    bundle = jangtq(source, AFFINE)
    expected = stock.logits(bundle, dtype="float32")
    if source == "glm4_moe":
        # It does norm, but all heads as one row.
        with pytest.raises(ValueError, match="rms_norm"):
            jang("logits", bundle, stock.PROMPT)
    else:
        found = jang("logits", bundle, stock.PROMPT)
        assert np.abs(found - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("source", ["qwen3_moe", "glm4_moe"])
def test_q_k_and_v_of_different_widths_stay_apart(source, jangtq, jang, jang_refusals, stock):
    policy = f"{AFFINE}attention.v_proj: 8bit g32"
    assert jang_refusals(source, policy) == []
    bundle = jangtq(source, policy)
    found = jang("logits", bundle, stock.PROMPT)
    assert np.array_equal(found, stock.logits(bundle, dtype="float32"))


@pytest.mark.parametrize("source", ["minimax_m2_32", "qwen3_moe"])
def test_routers_are_read_in_groups_of_64(source, jangtq, jang, jang_refusals):
    policy = f"{CODED}router: 8bit g32\nattention.v_proj: 8bit g32"
    (reason,) = jang_refusals(source, policy)
    assert "groups of 64" in reason
    bundle = jangtq(source, policy)
    loaded, expected = jang("load", bundle).modules, modules(bundle)
    wrong = {path for path in expected if loaded[path] != expected[path]}
    assert wrong == {path for path in expected if path.endswith(".gate")}


def test_groups_that_cross_heads_cannot_be_split(jangtq, jang, jang_refusals):
    policy = f"{CODED}attention.kv_b_proj: 8bit g128"
    (reason,) = jang_refusals("deepseek_v3", policy)
    assert "heads of 64 values" in reason
    assert "group size 128" in jang("load_error", jangtq("deepseek_v3", policy))
