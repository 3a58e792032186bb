"""What holds for all codes and zero points in the columns of GPTQ's words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emitters.numerics.gptq import (
    WIDTHS,
    ZERO_OFFSETS,
    GptqParts,
    first_unstorable_zero,
    gptq_decode,
    pack_columns,
    pack_zeros,
    unpack_columns,
    unpack_zeros,
)

Array = NDArray[Any]

widths = st.sampled_from(WIDTHS)
seeds = st.integers(0, 2**32)


def random_parts(seed: int, bits: int, groups: int, rows: int) -> GptqParts:
    """Codes, zero points and scales of rows in groups of 32, all of them storable."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 2**bits, (rows, 32 * groups), np.uint8)
    zeros = random.integers(1, 2**bits, (groups, rows)).astype(np.int16)
    scales = random.normal(size=(groups, rows)).astype(np.float16)
    return GptqParts(codes, zeros, scales)


@given(bits=widths, rows=st.integers(0, 70), columns=st.sampled_from(range(0, 224, 32)), seed=seeds)
def test_codes_come_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), np.uint8)
    before = codes.copy()
    words = pack_columns(codes, bits=bits)
    assert words.shape == (columns * bits // 32, rows)
    assert words.nbytes * 8 == codes.size * bits
    assert (unpack_columns(words, bits=bits) == codes).all()
    assert (codes == before).all()


@given(
    bits=widths,
    version=st.sampled_from(sorted(ZERO_OFFSETS)),
    groups=st.integers(1, 5),
    blocks=st.integers(1, 5),
    seed=seeds,
)
def test_zero_points_come_back_and_blocks_of_32_rows_are_columns(
    bits: int, version: str, groups: int, blocks: int, seed: int
) -> None:
    smallest = -ZERO_OFFSETS[version]
    random = np.random.default_rng(seed)
    zeros = random.integers(smallest, 2**bits, (groups, 32 * blocks)).astype(np.int16)
    before = zeros.copy()
    words = pack_zeros(zeros, bits=bits, version=version)
    assert words.shape == (groups, blocks * bits)
    assert (unpack_zeros(words, bits=bits, version=version) == zeros).all()
    pieces = [
        pack_zeros(zeros[:, start : start + 32], bits=bits, version=version)
        for start in range(0, 32 * blocks, 32)
    ]
    assert (np.concatenate(pieces, axis=1) == words).all()
    assert (zeros == before).all()


@given(bits=widths, groups=st.integers(1, 4), rows=st.integers(1, 40), seed=seeds)
def test_values_are_scales_times_codes_from_the_zero_point(
    bits: int, groups: int, rows: int, seed: int
) -> None:
    parts = random_parts(seed, bits, groups, rows)
    for part in parts:
        part.flags.writeable = False
    codes = parts.codes.reshape(rows, groups, 32)
    steps = codes.astype(np.float32) - parts.zeros.T[:, :, None]
    exact = steps * parts.scales.T.astype(np.float32)[:, :, None]
    values = gptq_decode(parts, group_size=32)
    assert (values == exact.astype(np.float16).reshape(rows, -1)).all()


@pytest.mark.parametrize(
    ("version", "zero"), [("gptq", 0), ("gptq", 16), ("gptq_v2", -1), ("gptq_v2", 16)]
)
def test_zero_points_out_of_range_are_found_and_refused(version: str, zero: int) -> None:
    zeros = np.full((2, 32), 8, np.int16)
    assert first_unstorable_zero(zeros, bits=4, version=version) == -1
    zeros[1, [3, 9]] = zero
    assert first_unstorable_zero(zeros, bits=4, version=version) == 32 + 3
    with pytest.raises(ValueError, match=str(zero)):
        pack_zeros(zeros, bits=4, version=version)


def test_parts_that_disagree_are_refused() -> None:
    parts = random_parts(0, 4, 2, 32)
    for wrong in (
        parts._replace(zeros=parts.zeros[:1]),
        parts._replace(scales=parts.scales[:1], zeros=parts.zeros[:1]),
        parts._replace(codes=parts.codes[:16]),
        parts._replace(codes=parts.codes[:, :31]),
        parts._replace(codes=parts.codes.astype(np.int64)),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            gptq_decode(wrong, group_size=32)
    words, zeros = pack_columns(parts.codes, bits=4), np.full((2, 4), 8, np.int32)
    for bits in (0, 5):
        with pytest.raises(ValueError, match=r"\w"):
            unpack_columns(words, bits=bits)
    with pytest.raises(ValueError, match="stored as int32"):
        unpack_columns(words.astype(np.int64), bits=4)
    with pytest.raises(ValueError, match="stored as int32"):
        unpack_zeros(zeros.astype(np.int64), bits=4, version="gptq")
    with pytest.raises(ValueError, match=r"\w"):
        pack_columns(np.zeros((2, 40), np.uint8), bits=4)
    with pytest.raises(ValueError, match=r"\w"):
        pack_zeros(np.full((2, 40), 8, np.int16), bits=4, version="gptq")
