"""The MXTQ codec gives the recorded bytes of jang, rows that are not finite included."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emitters.numerics.hadamard import LANES, rotate
from emitters.numerics.mxtq import mxtq_decode, mxtq_encode
from emitters.numerics.mxtq_tables import codebook, signs
from emitters.numerics.rounding import to_float32

Array = NDArray[Any]
Golden = Callable[[str], dict[str, Array]]
SameGroups = Callable[[Array, Array, int], None]

FILE = Path(__file__).parents[2] / "golden" / "jangtq" / "cases.json"
CASES: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["mxtq"]
VALUE_TYPES = {"uint16": "BF16", "float16": "F16", "float32": "F32"}


def without_nan_payload(values: Array) -> Array:
    """The values with one pattern for every NaN."""
    return np.where(np.isnan(values), np.full_like(values, np.nan), values)


def check(
    vectors: dict[str, Array], case: str, bits: int, seed: int, same_groups: SameGroups
) -> set[str]:
    """Encodes and decodes one case at one width; the names of the vectors it was held to."""
    source, prefix = vectors[f"{case}.w"], f"{case}.b{bits}"
    before = source.copy()
    dtype, columns = VALUE_TYPES[source.dtype.name], source.shape[1]
    packed, norms = mxtq_encode(source, dtype, bits=bits, seed=seed)
    assert source.tobytes() == before.tobytes()
    same_groups(vectors[f"{prefix}.packed"], packed, packed.shape[1])
    stored = without_nan_payload(vectors[f"{prefix}.norms"])
    same_groups(stored, without_nan_payload(norms), 1)
    used = {f"{case}.w", f"{prefix}.packed", f"{prefix}.norms"}
    if (name := f"{prefix}.deq") not in vectors:
        return used
    expected = vectors[name]
    parts = packed[: len(expected)], norms[: len(expected)]
    got = mxtq_decode(*parts, columns=columns, bits=bits, seed=seed)
    same_groups(without_nan_payload(expected), without_nan_payload(got), columns)
    return {*used, name}


@pytest.mark.parametrize("case", CASES)
def test_recorded_cases(case: str, golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("jangtq/mxtq_cases")
    used = {f"{case}.rot"}
    for bits in CASES[case]["bits"]:
        used |= check(vectors, case, bits, CASES[case]["sign_seed"], same_groups)
    assert used == {name for name in vectors if name.startswith(f"{case}.")}


def test_one_bit_odd_widths_and_rows_that_are_not_finite(
    golden: Golden, same_groups: SameGroups
) -> None:
    vectors = golden("jangtq/mxtq_more")
    used = set()
    for name in vectors:
        case, _, width = name.removesuffix(".packed").rpartition(".b")
        if name.endswith(".packed"):
            used |= check(vectors, case, int(width), 42, same_groups)
    assert used == vectors.keys()


def test_every_recorded_case_is_compared(golden: Golden) -> None:
    recorded = {name.rsplit(".", 1)[0] for name in golden("jangtq/mxtq_cases")}
    assert {name for name in recorded if ".b" not in name} == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_rotation_of_the_first_row(case: str, golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("jangtq/mxtq_cases")
    source = vectors[f"{case}.w"]
    wide = to_float32(source, VALUE_TYPES[source.dtype.name])[0]
    row = wide * signs(len(wide), CASES[case]["sign_seed"])
    lanes = row.repeat(LANES)
    rotate(lanes)
    # The same row in each lane: all of them rotate alike.
    for lane in lanes.reshape(-1, LANES).T:
        same_groups(vectors[f"{case}.rot"], lane.reshape(1, -1).copy(), 1)


def test_tables(golden: Golden, same_groups: SameGroups) -> None:
    for name, expected in golden("jangtq/signs_codebooks").items():
        kind, columns, number = name.split(".")
        table = {"codebook": codebook, "signs": signs}[kind](int(columns), int(number))
        same_groups(expected, table, 1)
