"""What holds for every input of MXTQ: rows on their own, any thread, wrong shapes refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emitters.numerics.mxtq import mxtq_decode, mxtq_encode
from emitters.numerics.rounding import cast

Array = NDArray[Any]

STORAGE = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
# Relative error of Gaussian rows, by width.
ERRORS = {1: 0.604, 2: 0.344, 3: 0.187, 4: 0.100}
WIDTHS = sorted(ERRORS)


@st.composite
def any_bits(draw: st.DrawFn, dtype: str) -> Array:
    """A matrix of any bit patterns; more than 16 rows in some, so that blocks end inside."""
    shape = draw(st.integers(2, 40)), draw(st.integers(4, 200))
    size = shape[0] * shape[1] * np.dtype(STORAGE[dtype]).itemsize
    noise = np.random.default_rng(draw(st.integers(0, 2**32))).bytes(size)
    return np.frombuffer(noise, STORAGE[dtype]).reshape(shape)


def gaussian(rows: int, columns: int) -> Array:
    """Weights as trained ones are, in bfloat16."""
    normal = np.random.default_rng(7).standard_normal((rows, columns), np.float32)
    return cast(normal * np.float32(0.02), "F32", "BF16")


@given(data=st.data(), dtype=st.sampled_from(sorted(STORAGE)), bits=st.sampled_from([2, 3]))
def test_rows_encode_and_decode_on_their_own(data: st.DataObject, dtype: str, bits: int) -> None:
    matrix = data.draw(any_bits(dtype))
    columns, cut = matrix.shape[1], data.draw(st.integers(1, len(matrix) - 1))
    whole = mxtq_encode(matrix, dtype, bits=bits)
    pieces = [mxtq_encode(rows, dtype, bits=bits) for rows in (matrix[:cut], matrix[cut:])]
    for part, halves in zip(whole, zip(*pieces, strict=True), strict=True):
        assert np.concatenate(halves).tobytes() == part.tobytes()
    decoded = mxtq_decode(*whole, columns=columns, bits=bits)
    halves = [mxtq_decode(*piece, columns=columns, bits=bits) for piece in pieces]
    assert np.concatenate(halves).tobytes() == decoded.tobytes()


@pytest.mark.parametrize("bits", WIDTHS)
def test_threads_give_the_same_bytes(bits: int) -> None:
    matrix = gaussian(100, 320)
    alone = mxtq_encode(matrix, "BF16", bits=bits)
    with ThreadPoolExecutor(4) as pool:
        for parts in pool.map(lambda _: mxtq_encode(matrix, "BF16", bits=bits), range(8)):
            assert all(a.tobytes() == b.tobytes() for a, b in zip(parts, alone, strict=True))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [1536, 3072])
def test_error_of_gaussian_rows(columns: int, bits: int) -> None:
    matrix = gaussian(64, columns)
    parts = mxtq_encode(matrix, "BF16", bits=bits)
    exact = cast(matrix, "BF16", "F32")
    got = mxtq_decode(*parts, columns=columns, bits=bits)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert error == pytest.approx(ERRORS[bits], abs=0.003)


@pytest.mark.parametrize("bits", WIDTHS)
def test_zero_gets_the_lower_middle_code_and_decodes_to_zero(bits: int) -> None:
    columns = 320  # whole words at every width
    packed, norms = mxtq_encode(np.zeros((3, columns), np.uint16), "BF16", bits=bits)
    middle, per_word = 2 ** (bits - 1) - 1, 32 // bits
    assert (packed == sum(middle << (bits * i) for i in range(per_word))).all()
    assert (norms == 0).all()
    assert (mxtq_decode(packed, norms, columns=columns, bits=bits) == 0).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_slots_without_a_column_are_zero(bits: int) -> None:
    per_word = 32 // bits
    columns = 5 * per_word + 1
    packed, _ = mxtq_encode(gaussian(20, columns), "BF16", bits=bits)
    assert packed.shape == (20, 6)
    assert (packed[:, -1] < 2**bits).all()


def test_a_norm_above_float16_keeps_its_codes() -> None:
    matrix = np.random.default_rng(3).standard_normal((4, 256)).astype(np.float32)
    packed, norms = mxtq_encode(matrix, "F32", bits=4)
    large, infinite = mxtq_encode(matrix * np.float32(2**20), "F32", bits=4)
    assert np.isfinite(norms).all()
    assert np.isposinf(infinite).all()
    assert (large == packed).all()


def test_another_seed_gives_other_codes() -> None:
    matrix = gaussian(4, 256)
    packed, _ = mxtq_encode(matrix, "BF16", bits=4, seed=43)
    assert (packed != mxtq_encode(matrix, "BF16", bits=4)[0]).any()


def test_no_rows() -> None:
    packed, norms = mxtq_encode(np.zeros((0, 64), np.uint16), "BF16", bits=3)
    assert (packed.shape, norms.shape) == ((0, 7), (0,))
    assert mxtq_decode(packed, norms, columns=64, bits=3).shape == (0, 64)


def test_unaligned_and_strided_rows_are_taken() -> None:
    matrix = np.random.default_rng(5).standard_normal((6, 96)).astype(np.float32)
    expected = mxtq_encode(np.ascontiguousarray(matrix[::2]), "F32", bits=4)[0]
    assert (mxtq_encode(matrix[::2], "F32", bits=4)[0] == expected).all()
    shifted = np.frombuffer(b"x" + matrix[::2].tobytes(), np.float32, offset=1)
    assert (mxtq_encode(shifted.reshape(3, 96), "F32", bits=4)[0] == expected).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "bits"),
    [
        ((2, 64), "BF16", 0),
        ((2, 64), "BF16", 5),
        ((2, 64), "BF16", 8),
        ((2, 3), "BF16", 2),
        ((2, 0), "BF16", 2),
        ((2, 2, 64), "BF16", 2),
        ((2, 64), "F32", 2),
        ((2, 64), "I8", 2),
    ],
)
def test_what_jang_cannot_hold_is_refused(shape: tuple[int, ...], dtype: str, bits: int) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        mxtq_encode(np.zeros(shape, np.uint16), dtype, bits=bits)


@pytest.mark.parametrize("columns", [63, 33, 65, 2])
def test_parts_that_disagree_are_refused(columns: int) -> None:
    packed, norms = mxtq_encode(gaussian(2, 64), "BF16", bits=4)
    with pytest.raises(ValueError, match=r"\w"):
        mxtq_decode(packed, norms[:1], columns=64, bits=4)
    with pytest.raises(ValueError, match=r"\w"):
        mxtq_decode(packed, norms.reshape(2, 1), columns=64, bits=4)
    with pytest.raises(ValueError, match=r"\w"):
        mxtq_decode(packed[:, :4], norms, columns=columns, bits=4)
