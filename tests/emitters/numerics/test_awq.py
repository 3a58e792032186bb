"""AWQ scales, against hipfire's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emitters.numerics.column_weights import awq_scale, forms_of_scale, gate_up_sums
from emitters.tensor_io.imatrix import open_imatrix

Array = NDArray[Any]
Golden = Callable[[str], dict[str, Array]]

ROOT = Path(__file__).parents[3]
IMATRIX = ROOT / "tests" / "golden" / "hipfire" / "tiny-minimax-src" / "imatrix.gguf"
# What hipfire's own file of the tiny model begins its sidecar with, alpha 0.55.
SIDECAR_START = np.array([0x3C89, 0x3D6A, 0x3AAE, 0x3998, 0x3BC0, 0x3A9D], np.uint16)


def units_apart(first: Array, second: Array) -> int:
    """The most units in the last place between two arrays of positive floats."""
    integer = np.dtype(f"i{first.dtype.itemsize}")
    return int(np.abs(first.view(integer).astype(int) - second.view(integer)).max())


@pytest.mark.parametrize("alpha", [0.5, 0.55])
def test_scales_are_hipfires(golden: Golden, alpha: float) -> None:
    vectors = golden("hipfire/awq")
    shared = awq_scale(gate_up_sums(vectors["gate.in_sum2"], vectors["up.in_sum2"]), alpha)
    dense = awq_scale(vectors["dense.in_sum2"], alpha)
    assert (shared.dtype, dense.dtype) == (np.float32, np.float32)
    # Within what logarithms of different machines may differ by.
    assert units_apart(shared, vectors[f"s_gate_up.alpha{alpha}"]) <= 1
    assert units_apart(dense, vectors[f"s_dense.alpha{alpha}"]) <= 1
    stored = vectors[f"s_gate_up_f16.alpha{alpha}"].view(np.float16)
    assert units_apart(forms_of_scale(shared, exact=False).stored, stored) <= 1


@pytest.mark.parametrize("alpha", [0.5, 0.55])
def test_from_the_recorded_scale_on_all_is_exact(golden: Golden, alpha: float) -> None:
    vectors = golden("hipfire/awq")
    scale = forms_of_scale(vectors[f"s_gate_up.alpha{alpha}"], exact=False)
    recorded = vectors[f"w_scaled.alpha{alpha}"]
    np.testing.assert_array_equal(vectors["w"] * scale.applied, recorded)
    bits = vectors[f"s_gate_up_f16.alpha{alpha}"]
    np.testing.assert_array_equal(scale.stored.view(np.uint16), bits)


def test_an_importance_matrix_becomes_hipfires_sidecar() -> None:
    imatrix = open_imatrix(IMATRIX)
    gate, up = (
        imatrix.sums(f"experts.{name}_proj", 0, n_matrices=12, columns=256)
        for name in ("gate", "up")
    )
    scale = forms_of_scale(awq_scale(gate_up_sums(gate.sums, up.sums), 0.55), exact=False)
    assert units_apart(scale.stored[:6], SIDECAR_START.view(np.float16)) <= 1


def test_without_sums_of_up_gate_alone_counts(golden: Golden) -> None:
    gate = golden("hipfire/awq")["gate.in_sum2"]
    alone = gate_up_sums(gate, None)
    np.testing.assert_array_equal(gate_up_sums(gate, gate[:, :128]), alone)
    # Twice the sums are the same scale, as far as the bounds leave it alone.
    twice = awq_scale(gate_up_sums(gate, gate), 0.55)
    inside = alone > 0
    np.testing.assert_array_equal(alone[inside] * 2, gate_up_sums(gate, gate)[inside])
    assert (twice[inside] > 0.01).any()


def test_experts_are_added_one_after_the_other() -> None:
    # 2**24 + 1 rounds down every time; added up otherwise, the ones would count.
    sums = np.array([[2**24], *[[1]] * 64], np.float32)
    assert gate_up_sums(sums, None).tolist() == [2**24]


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0.001, 1000))
def test_a_common_factor_cancels_and_the_geometric_mean_is_1(
    seed: int, alpha: float, factor: float
) -> None:
    sums = np.random.default_rng(seed).uniform(0.1, 10, 64).astype(np.float32)
    scale = awq_scale(sums, alpha)
    np.testing.assert_allclose(awq_scale(sums * np.float32(factor), alpha), scale, rtol=1e-6)
    assert np.log(scale.astype(np.float64)).mean() == pytest.approx(0, abs=1e-6)
    rms = np.sqrt(sums.astype(np.float64) / sums[0]) ** float(np.float32(alpha))
    np.testing.assert_allclose(scale / scale[0], rms, rtol=1e-6)


def test_the_exact_scale_cancels_in_a_reader() -> None:
    sums = np.random.default_rng(5).gamma(0.5, 100, 3072).astype(np.float32)
    scale = awq_scale(sums, 0.55)
    exact, compatible = (forms_of_scale(scale, exact=mode) for mode in (True, False))
    np.testing.assert_array_equal(exact.stored, compatible.stored)
    np.testing.assert_array_equal(exact.applied, exact.stored.astype(np.float32))
    np.testing.assert_array_equal(compatible.applied, scale)
    gain = compatible.applied / compatible.stored.astype(np.float32)
    assert gain.min() >= 1
    assert 1 < gain.max() < 1 + 2**-10


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf")])
def test_an_exponent_outside_of_0_to_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="not from 0 to 1"):
        awq_scale(np.ones(4, np.float32), alpha)
