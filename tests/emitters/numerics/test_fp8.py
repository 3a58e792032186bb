"""FP8 blocks dequantize as the recorded readers do, whatever rows a call is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emitters.numerics.rounding import cast, first_nonfinite, to_float32
from emitters.numerics.small_floats import FP8_RULES, fp8_dequantize

Array = NDArray[Any]
Golden = Callable[[str], dict[str, Array]]
SameGroups = Callable[[Array, Array, int], None]

CASES = ("square", "tall", "wide", "narrow", "ragged")
# Vectors that are not compared, and why.
EXCLUDED = {"ragged.dequant_bf16_hf": "transformers takes wrong blocks there, without an error"}


READERS = (
    ("dequant_f32", "f32", "F32"),
    ("dequant_bf16_hf", "f32", "BF16"),
    ("dequant_bf16_hf", "bf16", "BF16"),
    ("dequant_bf16_autoround", "bf16_bf16", "BF16"),
)


@pytest.mark.parametrize(
    ("case", "reader", "rule", "dtype"),
    [
        (case, *reader)
        for case in CASES
        for reader in READERS
        if f"{case}.{reader[0]}" not in EXCLUDED
    ],
)
def test_readers(
    case: str, reader: str, rule: str, dtype: str, golden: Golden, same_groups: SameGroups
) -> None:
    vectors = golden("fp8/fp8")
    codes, scales = vectors[f"{case}.weight_code"], vectors[f"{case}.weight_scale_inv"]
    got = fp8_dequantize(codes, scales, rule=rule, out_dtype=dtype)
    same_groups(vectors[f"{case}.{reader}"], got, codes.shape[1])


@pytest.mark.parametrize("scales", ["f32", "bf16"])
def test_mlx(scales: str, golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("mlx/fp8_dequant")
    grid = to_float32(vectors[f"{scales}.weight_scale_inv"], scales.upper())
    got = fp8_dequantize(vectors["weight"], grid, rule="bf16", out_dtype="BF16")
    same_groups(vectors[f"{scales}.expected_bf16"], got, got.shape[1])


def test_every_code(golden: Golden) -> None:
    table = golden("fp8/fp8")
    codes = table["table.codes"].reshape(2, 128)
    got = fp8_dequantize(codes, np.ones((1, 1), np.float32), rule="f32", out_dtype="F32")
    np.testing.assert_array_equal(got.reshape(-1), table["table.values_f32"])
    assert first_nonfinite(codes, "F8_E4M3") == 0x7F


@pytest.mark.parametrize("rule", FP8_RULES)
def test_any_rows_of_the_matrix_and_any_output(rule: str, golden: Golden) -> None:
    vectors = golden("fp8/fp8")
    codes, grid = vectors["ragged.weight_code"], vectors["ragged.weight_scale_inv"]
    whole = fp8_dequantize(codes, grid, rule=rule, out_dtype="F32")
    for dtype in ("BF16", "F16", "F32"):
        for first, last in ((0, 1), (0, 200), (100, 129), (127, 128), (128, 200), (199, 200)):
            part = fp8_dequantize(
                codes[first:last], grid, first_row=first, rule=rule, out_dtype=dtype
            )
            np.testing.assert_array_equal(part, cast(whole[first:last], "F32", dtype))


def test_other_block_sizes() -> None:
    codes = np.full((6, 10), 0x38, np.uint8)  # 1.0
    grid = np.arange(9, dtype=np.float32).reshape(3, 3)
    got = fp8_dequantize(codes, grid, block=(2, 4), rule="f32", out_dtype="F32")
    np.testing.assert_array_equal(got, grid.repeat(2, axis=0).repeat(4, axis=1)[:, :10])


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((1, 3), {"rule": "f32", "out_dtype": "F32"}),
        ((2, 2), {"rule": "f32", "out_dtype": "F32"}),
        ((2, 4), {"rule": "f32", "out_dtype": "F32"}),
        ((2, 3), {"rule": "f32", "out_dtype": "F32", "first_row": 100}),
        ((2, 3), {"rule": "f64", "out_dtype": "F32"}),
        ((2, 3), {"rule": "f32", "out_dtype": "I8"}),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(
    grid: tuple[int, int], options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        fp8_dequantize(np.zeros((200, 300), np.uint8), np.ones(grid, np.float32), **options)
