"""What holds for all HFQ blocks: Lloyd's rule, bounded error, groups on their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from emitters.numerics.hadamard import LANES, rotate
from emitters.numerics.hfq import decode_blocks, encode_blocks, rotation_signs
from policy_dsl.sources.hfq_container import QUANT_CODES

Array = NDArray[Any]

LEVEL_BITS = {19: 2, 20: 3, 30: 4}
UNROTATED_BITS = {6: 4, 7: 4, 8: 6, 9: 2, 10: 2, 11: 3, 12: 3}
# Relative error of Gaussian weights.
ERRORS = {**{13: 0.109, 15: 0.026, 17: 0.233, 18: 0.544}, **{19: 0.335, 20: 0.185, 3: 0.0054}}
CODES = [3, *UNROTATED_BITS, 13, 15, 17, 18, *LEVEL_BITS]


def group_size(code: int) -> int:
    """Values in a block."""
    return QUANT_CODES[code].group or 0


def gaussian(count: int) -> Array:
    """Weights as trained ones are."""
    normal = np.random.default_rng(7).standard_normal(count).astype(np.float32)
    return normal * np.float32(0.02)


def rotated(group: Array) -> Array:
    """The rotation of one group of 256."""
    before, after = rotation_signs().reshape(2, 256)
    lanes = (group * before).repeat(LANES)
    rotate(lanes)
    return lanes[::LANES] * after


def lloyd_by_the_rule(values: Array, bits: int) -> bytes:
    """The block of 256 rotated values, one step of the rule after the other."""
    n = 2**bits
    ordered = values[values.argsort(kind="stable")]
    levels = ordered[[int((2 * k + 1) / (2 * n) * 255 + 0.5) for k in range(n)]]
    codes = np.zeros(256, np.int64)
    for step in range(8 if ordered[255] > ordered[0] else 0):
        nearest = np.abs(values - levels[:, None]).argmin(axis=0)
        if step > 0 and (nearest == codes).all():
            break
        codes = nearest
        for k in np.unique(codes):
            total = 0.0
            for value in values[codes == k].tolist():
                total += value
            levels[k] = total / np.count_nonzero(codes == k)
    order = levels.argsort(kind="stable")
    stored = sum(int(code) << (bits * i) for i, code in enumerate(order.argsort()[codes]))
    with np.errstate(over="ignore"):
        header = levels[order].astype(np.float16).tobytes()
    return header + stored.to_bytes(32 * bits, "little")


def layered(random: np.random.Generator, heights: list[float], noise: Array) -> Array:
    """Values whose rotation is 64 values each of the heights / 4, of either sign, and noise.

    heights: four, with few bits. Four values are their transform, so that the first stages of
    the rotation take them apart without any rounding.
    """
    group = noise.astype(np.float32)
    at = 4 * int(random.integers(0, 64))
    group[at : at + 4] = np.kron([[1, 1], [1, -1]], [[1, 1], [1, -1]]) @ heights
    group[at : at + 4] *= rotation_signs()[at : at + 4]
    return group


KINDS = {
    "normal": lambda random: random.standard_normal(256),
    "heavy tails": lambda random: random.standard_t(1, 256),
    "whole numbers": lambda random: np.rint(random.standard_normal(256)),
    "sparse": lambda random: random.standard_normal(256) * (random.random(256) < 0.02),
    "few values": lambda random: random.choice(random.standard_normal(3), 256),
    "zeros": lambda random: np.where(random.random(256) < 0.5, -0.0, 0.0),
    "layers": lambda random: layered(
        random, [*random.integers(1, 64, 2), 0, 0], np.rint(random.normal(0, 4, 256)) / 2**28
    ),
}


@given(
    code=st.sampled_from(sorted(LEVEL_BITS)),
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=20),
    seed=st.integers(0, 2**32),
    exponent=st.integers(-12, 3),
)
def test_lloyd_follows_its_rule(code: int, kinds: list[str], seed: int, exponent: int) -> None:
    random = np.random.default_rng(seed)
    groups = np.stack([KINDS[kind](random) for kind in kinds]) * 10.0**exponent
    groups = groups.astype(np.float32)
    blocks = encode_blocks(groups.reshape(-1), code)
    for block, group, kind in zip(blocks, groups, kinds, strict=True):
        expected = lloyd_by_the_rule(rotated(group), LEVEL_BITS[code])
        assert block.tobytes() == expected, kind


@pytest.mark.parametrize("code", LEVEL_BITS)
def test_values_far_from_close_levels_go_to_the_first_of_them(code: int) -> None:
    random = np.random.default_rng(1)
    for _ in range(32):
        # Levels among the noise are so close that the lower layer is equally far from them.
        group = KINDS["layers"](random)
        expected = lloyd_by_the_rule(rotated(group), LEVEL_BITS[code])
        assert encode_blocks(group, code).tobytes() == expected


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("code", LEVEL_BITS)
def test_sums_that_are_not_exact_are_made_in_order(code: int, coarse: bool) -> None:
    random, found = np.random.default_rng(2), 0
    while found < 32:
        noise = random.normal(0, 4, 256)
        noise = (np.rint(noise) if coarse else noise) / 2**40
        group = layered(random, [*random.integers(16, 64, 3), 0], noise) * np.float32(2**30)
        values = rotated(group)
        # One of four levels starts in the noise: partial sums of all values lose its last bits.
        if 97 <= np.count_nonzero(values < values.min() / 64) < 128:
            found += 1
            expected = lloyd_by_the_rule(values, LEVEL_BITS[code])
            assert encode_blocks(group, code).tobytes() == expected


@st.composite
def any_bits(draw: st.DrawFn, group: int) -> Array:
    """Any float32, NaN and infinity too; sometimes more groups than go side by side."""
    count = draw(st.integers(2, 40)) * group
    return np.frombuffer(
        np.random.default_rng(draw(st.integers(0, 2**32))).bytes(4 * count), np.float32
    )


@given(data=st.data(), code=st.sampled_from(CODES))
def test_groups_encode_and_decode_on_their_own(data: st.DataObject, code: int) -> None:
    size = group_size(code)
    values = data.draw(any_bits(size))
    cut = data.draw(st.integers(1, values.size // size - 1)) * size
    whole = encode_blocks(values, code)
    pieces = [encode_blocks(part, code) for part in (values[:cut], values[cut:])]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    decoded = [decode_blocks(piece, code, len(piece) * size) for piece in pieces]
    together = decode_blocks(whole, code, values.size)
    assert np.concatenate(decoded).tobytes() == together.tobytes()


@given(data=st.data(), code=st.sampled_from(CODES))
def test_a_short_group_decodes_as_far_as_it_goes(data: st.DataObject, code: int) -> None:
    values = gaussian(data.draw(st.integers(1, 40 * group_size(code))))
    blocks = encode_blocks(values, code)
    assert len(blocks) == -(-values.size // group_size(code))
    got = decode_blocks(blocks, code, values.size)
    assert got.shape == values.shape
    assert (np.abs(got - values) <= np.abs(values).max()).all()


@given(data=st.data(), code=st.sampled_from(sorted(UNROTATED_BITS)))
def test_error_of_equal_steps(data: st.DataObject, code: int) -> None:
    elements = st.floats(-1e4, 1e4, width=32) | st.floats(1, 1.125, width=32)
    drawn = st.lists(elements, min_size=1, max_size=group_size(code))
    values = np.array(data.draw(drawn), np.float32)
    got = decode_blocks(encode_blocks(values, code), code, values.size)
    step = np.ptp(values.astype(np.float64)) / (2 ** UNROTATED_BITS[code] - 1)
    slack = np.abs(values).max() * 2.0**-20 + 2.0**-140
    assert (np.abs(got.astype(np.float64) - values) <= step / 2 + slack).all()


@pytest.mark.parametrize("code", ERRORS)
def test_error_of_gaussian_weights(code: int) -> None:
    values = gaussian(2**17)
    got = decode_blocks(encode_blocks(values, code), code, values.size)
    error = np.linalg.norm(got - values) / np.linalg.norm(values)
    assert error == pytest.approx(ERRORS[code], rel=0.02)


@pytest.mark.parametrize("code", CODES)
def test_groups_of_two_values_are_exact(code: int) -> None:
    size = group_size(code)
    # An eighth survives float16; rotated, a single value becomes two, of both signs.
    single = np.zeros(3 * size, np.float32)
    single[5::size] = 0.125
    for values in (single, -single, np.zeros_like(single)):
        got = decode_blocks(encode_blocks(values, code), code, values.size)
        # The scale of code 3 is cut off to 11 bits.
        np.testing.assert_allclose(got, values, rtol=2.0**-10 if code == 3 else 0, atol=1e-7)


@pytest.mark.parametrize("code", [13, 15, 17, 18, *UNROTATED_BITS])
def test_the_lowest_value_of_zeros_is_plus_zero(code: int) -> None:
    zeros = np.where(np.arange(1024) % 3 == 0, 0.0, -0.0).astype(np.float32)
    for values in (zeros, -zeros, np.full_like(zeros, -0.0)):
        blocks = encode_blocks(values, code)
        header = blocks[:, :8].copy().view(np.float32)
        assert (header == [1, 0]).all()
        assert not np.signbit(header).any()
        assert not blocks[:, 8:].any()


@pytest.mark.parametrize("code", UNROTATED_BITS)
@pytest.mark.parametrize("first", [0.0, -0.0])
def test_of_equal_zeros_the_first_is_the_lowest_value(code: int, first: float) -> None:
    values = np.abs(gaussian(group_size(code)))
    for at in range(0, 120, 7):
        group = values.copy()
        group[at], group[at + 1 : at + 6 : 2] = first, -first
        low = encode_blocks(group, code)[:, 4:8].copy().view(np.float32)
        assert (low[0, 0], np.signbit(low[0, 0])) == (0, np.signbit(first))


def test_bytes_of_the_smallest_numbers() -> None:
    # The inverse of the scale is infinite.
    values = np.array([2.0**-140, 0, -(2.0**-149), -0.0] * 8, np.float32)
    block = encode_blocks(values, 3)[0]
    assert block.view(np.int8).tolist() == [0, 0, *[127, 0, -128, 0] * 8]


@pytest.mark.parametrize("code", CODES)
def test_threads_give_the_same_bytes(code: int) -> None:
    values = gaussian(100 * 256)
    alone = encode_blocks(values, code).tobytes()
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: encode_blocks(values, code).tobytes(), range(8))
    assert set(results) == {alone}


@pytest.mark.parametrize("code", CODES)
def test_the_input_is_not_changed(code: int) -> None:
    values = gaussian(1000)
    before = values.copy()
    values.flags.writeable = False
    blocks = encode_blocks(values, code)
    stored = blocks.copy()
    decode_blocks(blocks, code, 1000)
    assert values.tobytes() == before.tobytes()
    assert blocks.tobytes() == stored.tobytes()


@pytest.mark.parametrize("code", CODES)
def test_unaligned_and_strided_values_are_taken(code: int) -> None:
    values = gaussian(2000)
    expected = encode_blocks(values[::2].copy(), code)
    assert (encode_blocks(values[::2], code) == expected).all()
    shifted = np.frombuffer(b"x" + values[::2].tobytes(), np.float32, offset=1)
    assert (encode_blocks(shifted, code) == expected).all()
    unaligned = np.frombuffer(b"x" + expected.tobytes(), np.uint8, offset=1)
    got = decode_blocks(unaligned.reshape(expected.shape), code, 1000)
    assert (got == decode_blocks(expected, code, 1000)).all()


@pytest.mark.parametrize("code", CODES)
def test_nothing_is_nothing(code: int) -> None:
    blocks = encode_blocks(np.empty(0, np.float32), code)
    assert blocks.shape == (0, QUANT_CODES[code].nbytes)
    assert decode_blocks(blocks, code, 0).shape == (0,)


@pytest.mark.parametrize("code", [0, 1, 4, 14, 31, -1])
def test_other_codes_are_refused(code: int) -> None:
    with pytest.raises(ValueError, match="quant code"):
        encode_blocks(gaussian(256), code)
    with pytest.raises(ValueError, match="quant code"):
        decode_blocks(np.zeros((1, 136), np.uint8), code, 256)


@pytest.mark.parametrize("code", [3, 7, 13, 19])
def test_what_does_not_fit_is_refused(code: int) -> None:
    blocks = encode_blocks(gaussian(512), code)
    size = group_size(code)
    for count in (512 + 1, 512 - size, 0):
        with pytest.raises(ValueError, match="should be"):
            decode_blocks(blocks, code, count)
    with pytest.raises(ValueError, match="should be"):
        decode_blocks(blocks[:, :-1], code, 512)
    with pytest.raises(ValueError, match="float32"):
        encode_blocks(gaussian(512).astype(np.float64), code)
    with pytest.raises(ValueError, match="uint8"):
        decode_blocks(blocks.astype(np.uint16), code, 512)
