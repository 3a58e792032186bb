"""HFQ blocks are the recorded bytes of hipfire, and decode to what a plain reading gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emitters.numerics.hadamard import LANES, rotate
from emitters.numerics.hfq import decode_blocks, encode_blocks, rotation_signs
from emitters.numerics.rounding import cast
from emitters.numerics.small_floats import fp8_dequantize
from policy_dsl.sources.hfq_container import QUANT_CODES

Array = NDArray[Any]
Golden = Callable[[str], dict[str, Array]]
SameGroups = Callable[[Array, Array, int], None]

UNROTATED = {6: 4, 7: 4, 8: 6, 9: 2, 10: 2, 11: 3, 12: 3}
ROTATED = {13: 4, 15: 6, 17: 3, 18: 2}
LEVELS = {19: 2, 20: 3, 30: 4}
BITS = {**UNROTATED, **ROTATED, **LEVELS}
CODES = [3, *BITS]
F16 = 1
AWQ_FORMATS = {"mq2g256_lloyd": 19, "mq3g256_lloyd": 20, "mq4g256": 13}
# Codes of which hipfire makes other zeros: NaN, where a build refuses the weights, and -0.
FP8_ZEROS = (0x7F, 0xFF, 0x80)


def cases(vectors: dict[str, Array]) -> dict[str, Array]:
    """The inputs, flat, by the name of their case."""
    found = {key: value for key, value in vectors.items() if key.endswith(".in")}
    return {key.removesuffix(".in"): value.reshape(-1) for key, value in found.items()}


# Of all codes this one takes longest to compile.
@pytest.mark.parametrize(
    "code", [pytest.param(one, marks=[pytest.mark.slow] if one == 30 else []) for one in CODES]
)
def test_bytes(code: int, golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("hipfire/blocks/blocks")
    nbytes = QUANT_CODES[code].nbytes or 0
    for case, values in cases(vectors).items():
        blocks = encode_blocks(values, code)
        assert blocks.shape[1] == nbytes
        same_groups(vectors[f"{case}.{code}"], blocks.reshape(-1), nbytes)


def test_f16_is_cut_off(golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("hipfire/blocks/blocks")
    for case, values in cases(vectors).items():
        halves = cast(values, "F32", "F16", cuts_off=True)
        same_groups(vectors[f"{case}.{F16}"], halves.view(np.uint8), 2)


def test_every_block_vector_is_compared(golden: Golden) -> None:
    vectors = golden("hipfire/blocks/blocks")
    compared = ["in", F16, *CODES]
    assert {f"{case}.{part}" for case in cases(vectors) for part in compared} == set(vectors)


@pytest.mark.parametrize("alpha", [0.5, 0.55])
@pytest.mark.parametrize("name", AWQ_FORMATS)
def test_scaled_weights(name: str, alpha: float, golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("hipfire/awq")
    blocks = encode_blocks(vectors[f"w_scaled.alpha{alpha}"].reshape(-1), AWQ_FORMATS[name])
    same_groups(vectors[f"{name}.alpha{alpha}"], blocks.reshape(-1), blocks.shape[1])


def stored_codes(blocks: Array, bits: int, size: int) -> Array:
    """The codes at the end of each block, one bit after the other: [blocks, size]."""
    payload = blocks[:, -size * bits // 8 :]
    digits = np.unpackbits(payload, axis=1, bitorder="little").reshape(-1, size, bits)
    return (digits * 2 ** np.arange(bits)).sum(axis=2)


def rotated_back(values: Array) -> Array:
    """The inverse rotation of float64 [groups, 256], as a matrix."""
    before, after = rotation_signs().astype(np.float64).reshape(2, 256)
    transform = np.ones((1, 1))
    for _ in range(8):
        transform = np.kron([[1, 1], [1, -1]], transform)
    return (values * after) @ transform / 16 * before


def read_plainly(blocks: Array, code: int) -> Array:
    """What the blocks stand for, in float64, group by group."""
    bits, size = BITS[code], QUANT_CODES[code].group or 0
    codes = stored_codes(blocks, bits, size)
    if code in LEVELS:
        levels = blocks[:, : 2 * 2**bits].copy().view(np.float16).astype(np.float64)
        values = np.take_along_axis(levels, codes, axis=1)
    else:
        scale, low = blocks[:, :8].copy().view(np.float32).astype(np.float64).T[:, :, None]
        values = scale * codes + low
    return values if code in UNROTATED else rotated_back(values)


@pytest.mark.parametrize("code", BITS)
def test_decoded_values(code: int, golden: Golden) -> None:
    vectors = golden("hipfire/blocks/blocks")
    size = QUANT_CODES[code].group or 0
    for case, values in cases(vectors).items():
        blocks = vectors[f"{case}.{code}"].reshape(-1, QUANT_CODES[code].nbytes or 0)
        if case == "overflow_f16_1e9" and code in LEVELS:
            continue  # infinite levels
        got = decode_blocks(blocks, code, values.size)
        plain = read_plainly(blocks, code)
        assert got.shape == values.shape
        # 8 stages and 3 products, each rounded to 2**-24 of a sum below 16 times the largest.
        slack = np.abs(plain).max(axis=1).repeat(size)[: values.size] * 16 * 11 * 2.0**-24
        slack += 2.0**-140
        assert (np.abs(got - plain.reshape(-1)[: values.size]) <= slack).all()


def test_decoded_q8(golden: Golden) -> None:
    vectors = golden("hipfire/blocks/blocks")
    for case, values in cases(vectors).items():
        blocks = vectors[f"{case}.3"].reshape(-1, 34)
        scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        with np.errstate(invalid="ignore"):
            plain = scales * blocks[:, 2:].view(np.int8).astype(np.float32)
        got = decode_blocks(blocks, 3, values.size)
        np.testing.assert_array_equal(got, plain.reshape(-1)[: values.size])


def test_signs_and_rotation(golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("hipfire/blocks/primitives")
    before, after = rotation_signs().reshape(2, 256)
    same_groups(vectors["signs1"], before, 1)
    same_groups(vectors["signs2"], after, 1)
    for values, expected in zip(vectors["x"], vectors["rotated"], strict=True):
        lanes = (values * before).repeat(LANES)
        rotate(lanes)
        same_groups(expected, lanes[::LANES] * after, 1)


def test_both_casts_to_float16(golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("hipfire/blocks/primitives")
    values = vectors["f16.in"]
    cut, nearest = (cast(values, "F32", "F16", cuts_off=cuts) for cuts in (True, False))
    same_groups(vectors["f16.trunc"], cut.view(np.uint16), 1)
    same_groups(vectors["f16.rne"], nearest.view(np.uint16), 1)


def test_fp8(golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("hipfire/blocks/fp8")
    one = np.ones((1, 2), np.float32)
    table = fp8_dequantize(vectors["table.e4m3"], one, rule="f32", out_dtype="F32")
    rows = fp8_dequantize(
        vectors["rows.e4m3"], vectors["scale_inv"], first_row=112, rule="f32", out_dtype="F32"
    )
    for name, got in (("table", table), ("rows", rows)):
        compared = ~np.isin(vectors[f"{name}.e4m3"], FP8_ZEROS)
        same_groups(vectors[f"{name}.f32"][compared], got[compared], 1)
        minus = vectors[f"{name}.e4m3"] == 0x80
        assert (got[minus] == 0).all()
