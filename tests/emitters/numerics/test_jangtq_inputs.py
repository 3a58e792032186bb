"""Affine groups and FP8 blocks are in JANG's bundles what they are elsewhere: one codec."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emitters.numerics.affine import affine_decode, affine_encode
from emitters.numerics.rounding import cast, first_nonfinite, to_float32
from emitters.numerics.small_floats import fp8_dequantize

Array = NDArray[Any]
Golden = Callable[[str], dict[str, Array]]
SameGroups = Callable[[Array, Array, int], None]

FILE = Path(__file__).parents[2] / "golden" / "jangtq" / "cases.json"
RECORDED: dict[str, dict[str, dict[str, Any]]] = json.loads(FILE.read_text(encoding="utf-8"))
# Cases that are not compared, and why.
EXCLUDED = {"odd192x320": "jang infers the size of blocks, wrongly where they are cut off"}
# Codes that are not compared: NaN, which a build refuses and jang reads as 480.
NAN_CODES = (0x7F, 0xFF)


@pytest.mark.parametrize("case", RECORDED["affine"])
def test_affine(case: str, golden: Golden, same_groups: SameGroups) -> None:
    vectors, options = golden("jangtq/affine_cases"), RECORDED["affine"][case]
    geometry = {"bits": options["bits"], "group_size": options["group_size"]}
    # The converter rounds everything to float16 first.
    source = cast(vectors[f"{case}.w"], options["input_dtype"], "F16")
    parts = affine_encode(source, "F16", **geometry)
    for name, got in zip(("weight", "scales", "biases"), parts, strict=True):
        same_groups(vectors[f"{case}.{name}"], got, got.shape[1])
    expected = vectors[f"{case}.deq"]
    decoded = affine_decode(parts, "F16", **geometry)[: len(expected)]
    same_groups(to_float32(expected, "F16"), decoded, geometry["group_size"])


@pytest.mark.parametrize("case", [case for case in RECORDED["fp8"] if case not in EXCLUDED])
def test_fp8(case: str, golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("jangtq/fp8_cases")
    codes, scales = vectors[f"{case}.codes"], vectors[f"{case}.scale_inv"]
    got = fp8_dequantize(codes, scales, rule="f32", out_dtype="F32")
    rows = vectors[f"{case}.rows"]
    same_groups(vectors[f"{case}.f32_rows"], got[rows], got.shape[1])
    digest = hashlib.sha256(got.astype("<f4").tobytes()).hexdigest()
    assert digest == RECORDED["fp8"][case]["sha256_f32"]


def test_fp8_codes(golden: Golden) -> None:
    vectors = golden("jangtq/fp8_cases")
    codes = vectors["table.codes"].reshape(2, 128)
    got = fp8_dequantize(codes, np.ones((1, 1), np.float32), rule="f32", out_dtype="F32")
    compared = ~np.isin(codes, NAN_CODES)
    expected = vectors["table.f32"].reshape(2, 128)
    np.testing.assert_array_equal(got[compared], expected[compared])
    for code in NAN_CODES:
        assert first_nonfinite(np.array([code], np.uint8), "F8_E4M3") == 0


def test_every_case_is_compared_or_excluded(golden: Golden) -> None:
    affine = {name.rpartition(".")[0] for name in golden("jangtq/affine_cases")}
    fp8 = {name.rpartition(".")[0] for name in golden("jangtq/fp8_cases")}
    assert affine == RECORDED["affine"].keys()
    assert fp8 - {"table"} == RECORDED["fp8"].keys()
    assert EXCLUDED.keys() <= fp8
