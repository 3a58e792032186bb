"""What holds for every input of the GPTQ kernels: rows on their own, threads, error bounds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emitters.numerics.column_weights import SearchWeights, search_weights
from emitters.numerics.gptq import GptqParts, gptq_decode, gptq_rtn
from emitters.numerics.gptq_search import gptq_search
from emitters.numerics.rounding import cast, first_nonfinite, to_float32

Array = NDArray[Any]
Encoder = Callable[..., GptqParts]

ENCODERS: dict[str, Encoder] = {
    "symmetric": gptq_rtn,
    "asymmetric": partial(gptq_rtn, symmetric=False),
    "in the values' type": lambda values, dtype, **options: gptq_rtn(
        values, dtype, symmetric=False, arithmetic=dtype, **options
    ),
    "search": gptq_search,
    "search of 0.12.2": partial(gptq_search, grid="0.12.2"),
}
WIDTHS = (2, 3, 4, 8)
ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-10, "F32": 2.0**-23}


def gaussian(rows: int, columns: int, dtype: str = "BF16") -> Array:
    """Weights as trained ones are."""
    normal = np.random.default_rng(7).standard_normal((rows, columns), np.float32)
    return cast(normal * np.float32(0.02), "F32", dtype)


def same(some: GptqParts, others: GptqParts) -> bool:
    """Whether all bytes are equal."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(some, others, strict=True))


@given(
    encoder=st.sampled_from(sorted(ENCODERS)),
    dtype=st.sampled_from(sorted(ROUNDING)),
    bits=st.sampled_from(WIDTHS),
    size=st.sampled_from([32, 64, 96, 128, -1]),
    rows=st.integers(2, 80),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_rows_encode_and_decode_on_their_own(
    encoder: str, dtype: str, bits: int, size: int, rows: int, seed: int, data: st.DataObject
) -> None:
    spread = np.random.default_rng(seed).laplace(size=(rows, 384)).astype(np.float32)
    matrix, options = cast(spread, "F32", dtype), {"bits": bits, "group_size": size}
    whole = ENCODERS[encoder](matrix, dtype, **options)
    cut = data.draw(st.integers(1, rows - 1))
    parts = matrix[:cut], matrix[cut:]
    pieces = [ENCODERS[encoder](part, dtype, **options) for part in parts]
    codes, zeros, scales = zip(*pieces, strict=True)
    by_group = (np.concatenate(parts, axis=1) for parts in (zeros, scales))
    assert same(whole, GptqParts(np.concatenate(codes), *by_group))
    halves = [gptq_decode(piece, group_size=size) for piece in pieces]
    assert np.concatenate(halves).tobytes() == gptq_decode(whole, group_size=size).tobytes()


@given(
    bits=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(sorted(ROUNDING)),
    symmetric=st.booleans(),
    widened=st.booleans(),
    magnitude=st.integers(-6, 8),
    seed=st.integers(0, 2**32),
)
def test_rounding_errs_by_half_a_step(
    bits: int, dtype: str, symmetric: bool, widened: bool, magnitude: int, seed: int
) -> None:
    spread = np.random.default_rng(seed).laplace(size=(8, 4, 64)) * 2.0**magnitude
    matrix = cast(spread.reshape(8, 256).astype(np.float32), "F32", dtype)
    arithmetic, options = "F32" if widened else dtype, {"bits": bits, "group_size": 64}
    parts = gptq_rtn(matrix, dtype, symmetric=symmetric, arithmetic=arithmetic, **options)
    exact = to_float32(matrix, dtype).reshape(8, 4, 64)
    error = np.abs(gptq_decode(parts, group_size=64).reshape(exact.shape) - exact).max(axis=2)
    # A symmetric range lacks the positive end: one more half step there. Types round as well.
    reach = np.abs(exact).max(axis=2) * (4 * ROUNDING[dtype] + 2.0**-10)
    steps = np.abs(parts.scales.T.astype(np.float32)) * (1 if symmetric else 0.5)
    assert (error <= steps + reach).all()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_threads_give_the_same_bytes(encoder: str) -> None:
    matrix = gaussian(70, 256)
    run = partial(ENCODERS[encoder], matrix, "BF16", bits=4, group_size=64)
    alone = run()
    with ThreadPoolExecutor(4) as pool:
        assert all(same(parts, alone) for parts in pool.map(lambda _: run(), range(8)))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_float32_arithmetic_is_that_of_the_values_made_float32(
    symmetric: bool, dtype: str, bits: int
) -> None:
    matrix = gaussian(40, 256, dtype)
    run = partial(gptq_rtn, bits=bits, group_size=64, symmetric=symmetric)
    assert same(run(matrix, dtype), run(to_float32(matrix, dtype), "F32"))
    with pytest.raises(ValueError, match="arithmetic"):
        run(to_float32(matrix, dtype), "F32", arithmetic=dtype)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("grid", ["0.16.1", "0.12.2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_searched_scales_lose_no_more_than_those_of_rounding(
    weighted: bool, grid: str, bits: int
) -> None:
    matrix, options = gaussian(40, 512, "F32"), {"bits": bits, "group_size": 128}
    imatrix = np.random.default_rng(3).random(512, np.float32) ** 4 + np.float32(0.01)
    weights = search_weights(imatrix, grid=grid, **options) if weighted else None
    found = gptq_search(matrix, "F32", weights=weights, grid=grid, **options)

    def losses(parts: GptqParts) -> Array:
        error = gptq_decode(parts, group_size=128).astype(np.float64) - matrix
        weighed = error**2 * (imatrix if weighted else 1)
        return weighed.reshape(40, 4, 128).sum(axis=2)

    searched, rounded = losses(found), losses(gptq_rtn(matrix, "F32", **options))
    # Candidates are compared before their scales become float16.
    assert (searched <= rounded * 1.01).all()
    assert searched.sum() < 0.97 * rounded.sum()


@pytest.mark.parametrize("factor", [2.0**-4, 2.0**5])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_powers_of_two_change_only_scales(dtype: str, factor: float) -> None:
    matrix = gaussian(20, 128, "F32") * np.float32(4)
    large = cast(matrix * np.float32(factor), "F32", dtype)
    parts = gptq_search(cast(matrix, "F32", dtype), dtype, bits=4, group_size=64)
    others = gptq_search(large, dtype, bits=4, group_size=64)
    assert (parts.codes == others.codes).all()
    np.testing.assert_allclose(others.scales, parts.scales * np.float16(factor), rtol=0.001)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("peak", [1e7, 1e18, 1e30, 3e38])
def test_scales_that_float16_cannot_hold_are_infinite(
    peak: float, dtype: str, encoder: str
) -> None:
    matrix = np.zeros((32, 64), np.float32)
    matrix[5, 7] = peak
    parts = ENCODERS[encoder](cast(matrix, "F32", dtype), dtype, bits=4, group_size=32)
    assert first_nonfinite(parts.scales, "F16") == 5


def test_smallest_scales() -> None:
    for encoder in ENCODERS.values():
        zeros = encoder(np.zeros((32, 64), np.float32), "F32", bits=4, group_size=32)
        assert (zeros.scales.view(np.uint16) == 0x00A8).all()
        negative = encoder(np.full((32, 64), 1e-9, np.float32), "F32", bits=4, group_size=32)
        assert (abs(negative.scales) == zeros.scales).all()


def test_one_sided_groups_ask_for_zero_points_at_the_ends() -> None:
    matrix = np.abs(gaussian(32, 64, "F32")) + np.float32(0.01)
    low = gptq_rtn(matrix, "F32", bits=4, group_size=32, symmetric=False).zeros
    high = gptq_rtn(-matrix, "F32", bits=4, group_size=32, symmetric=False).zeros
    assert (low == 0).all()
    assert (high == 15).all()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_inputs_are_not_changed(encoder: str) -> None:
    matrix = gaussian(3, 64)
    before = matrix.copy()
    matrix.flags.writeable = False
    ENCODERS[encoder](matrix, "BF16", bits=4, group_size=32)
    assert (matrix == before).all()


def test_an_importance_matrix_is_not_changed() -> None:
    imatrix = np.arange(64, dtype=np.float32)
    imatrix.flags.writeable = False
    weights = search_weights(imatrix, bits=4, group_size=32)
    before = [part.tobytes() for part in weights]
    gptq_search(gaussian(3, 64), "BF16", bits=4, group_size=32, weights=weights)
    assert [part.tobytes() for part in weights] == before
    assert imatrix.tolist() == list(range(64))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_no_rows(encoder: str) -> None:
    parts = ENCODERS[encoder](np.zeros((0, 64), np.uint16), "BF16", bits=3, group_size=32)
    assert [part.shape for part in parts] == [(0, 64), (2, 0), (2, 0)]
    assert gptq_decode(parts, group_size=32).shape == (0, 64)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_unaligned_and_strided_rows_are_taken(encoder: str) -> None:
    matrix, options = gaussian(6, 64, "F32"), {"bits": 4, "group_size": 32}
    expected = ENCODERS[encoder](np.ascontiguousarray(matrix[::2]), "F32", **options)
    assert same(ENCODERS[encoder](matrix[::2], "F32", **options), expected)
    shifted = np.frombuffer(b"x" + matrix[::2].tobytes(), np.float32, offset=1).reshape(3, 64)
    assert same(ENCODERS[encoder](shifted, "F32", **options), expected)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    ("dtype", "columns", "bits", "size"),
    [
        ("BF16", 64, 5, 32),
        ("BF16", 64, 16, 32),
        ("BF16", 64, 4, 0),
        ("BF16", 64, 4, 48),
        ("BF16", 96, 4, 64),
        ("BF16", 64, 4, 128),
        ("BF16", 48, 4, -1),
        ("F32", 64, 4, 32),
        ("I8", 64, 4, 32),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(
    dtype: str, columns: int, bits: int, size: int, encoder: str
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        ENCODERS[encoder](np.zeros((32, columns), np.uint16), dtype, bits=bits, group_size=size)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf])
def test_weights_that_are_no_weights_are_refused(wrong: float) -> None:
    imatrix = np.ones(64, np.float32)
    imatrix[9] = wrong
    with pytest.raises(ValueError, match="negative or not finite"):
        search_weights(imatrix, bits=4, group_size=32)


def test_weights_of_another_shape_and_unknown_grids_are_refused() -> None:
    weights = search_weights(np.ones(64, np.float32), bits=4, group_size=32)
    matrix = np.zeros((2, 64), np.float32)
    for options in (
        {"group_size": 64, "weights": weights},
        {"group_size": 32, "weights": SearchWeights(weights.columns[:32], weights.divisors)},
        {"group_size": 32, "grid": "0.13.0"},
    ):
        with pytest.raises(ValueError, match=r"\w"):
            gptq_search(matrix, "F32", bits=4, **options)
    for options in ({"group_size": 48}, {"group_size": 32, "grid": "0.13.0"}):
        with pytest.raises(ValueError, match=r"\w"):
            search_weights(np.ones(64, np.float32), bits=4, **options)


@pytest.mark.parametrize("bits", [3, 8])
def test_idle_columns_on_which_the_old_version_fails_are_refused(bits: int) -> None:
    imatrix = np.ones(64, np.float32)
    imatrix[:17] = 0
    search_weights(imatrix, bits=bits, group_size=32)
    with pytest.raises(ValueError, match=r"0\.12\.2"):
        search_weights(imatrix, bits=bits, group_size=32, grid="0.12.2")
