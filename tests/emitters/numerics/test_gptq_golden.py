"""The GPTQ kernels give the recorded codes, scales and words of AutoRound."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emitters.numerics.column_weights import search_weights
from emitters.numerics.gptq import (
    GptqParts,
    first_unstorable_zero,
    gptq_decode,
    gptq_rtn,
    pack_columns,
    pack_zeros,
    unpack_columns,
    unpack_zeros,
)
from emitters.numerics.gptq_search import gptq_search
from emitters.numerics.rounding import cast, to_float32

Array = NDArray[Any]
Golden = Callable[[str], dict[str, Array]]
SameGroups = Callable[[Array, Array, int], None]
GOLDEN = Path(__file__).parents[2] / "golden"

# Recorded vectors that are not compared, and why.
EXCLUDED = {
    r"b[567]\..*": "5, 6 and 7 bits are packed in two ways, and no reader says in which",
    r"zp0\..*\.qzeros_v1": "version 1 has no zero point 0, and what tools store decodes to 1",
    r"b\d\..*\.g_idx": "the number of a column's group; no values decide it",
    r"\w+\..*\.scale_raw": "scales before they are rounded to float16 are stored nowhere",
}
# What is compared, or what comparisons start from.
COMPARED = {
    "gptq/pack": r".*\.(levels|qweight|zp|qzeros_v[12]|scale_out_by_group|scales|bias_in|bias)",
    "gptq/rtn": r"(weight|imatrix)\.\w+|.*\.(levels|scales_f16|zp)",
    "gptq/rtn_0122": r"(weight|imatrix)\.\w+|.*\.(levels|scales_f16)",
    "gptq/more": r"(w|imatrix|decoded)\..*|.*\.(levels|scales|zeros)",
    "gptq/solver": r".*\.(q|scale|zero|g_idx|qweight|qzeros_v[12]|scales)",
}
VERSIONS = {"qzeros_v1": "gptq", "qzeros_v2": "gptq_v2"}
VALUE_TYPES = {"uint16": "BF16", "float16": "F16", "float32": "F32"}
RTN_CASE = re.compile(r"(float32|bfloat16)\.(rtn|opt)_(a?sym)_?(\w*)\.b(\d)\.g(-?\d+)\.levels")
MORE_CASE = re.compile(r"(0161|0122)\.(\w+)\.(a?sym|opt)\.b(\d)\.g(-?\d+)\.?(\w*)\.levels")


def names_of_vectors(name: str) -> list[str]:
    """The names in a recorded file, which tests are parametrized by."""
    content = (GOLDEN / f"{name}.safetensors").read_bytes()
    return list(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]))


def excluded(name: str) -> bool:
    """Whether a vector is one of those that are not compared."""
    return any(re.fullmatch(pattern, name) for pattern in EXCLUDED)


def cases(vectors: dict[str, Array], pattern: str) -> list[re.Match[str]]:
    """The vectors with such names that are compared."""
    matches = (re.fullmatch(pattern, name) for name in vectors if not excluded(name))
    return [match for match in matches if match]


@pytest.mark.parametrize("file", COMPARED)
def test_every_vector_is_compared_or_excluded(file: str, golden: Golden) -> None:
    for name in golden(file):
        assert bool(re.fullmatch(COMPARED[file], name)) or excluded(name), name


def turned(zeros: Array) -> Array:
    """Recorded zero points [rows, groups] as the kernels have them."""
    return np.ascontiguousarray(zeros.T).astype(np.int16)


def check_zeros(
    name: str, zeros: Array, bits: int, vectors: dict[str, Array], same_groups: SameGroups
) -> None:
    """Compares the packed zero points of both versions, unless they are excluded."""
    for part in [part for part in VERSIONS if not excluded(f"{name}.{part}")]:
        words = pack_zeros(zeros, bits=bits, version=VERSIONS[part])
        same_groups(vectors[f"{name}.{part}"], words, words.shape[1])
        same_groups(zeros, unpack_zeros(words, bits=bits, version=VERSIONS[part]), 32)


def test_words(golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("gptq/pack")
    packed = cases(vectors, r"((?:zp0\.)?b(\d)\..*)\.levels")
    assert len(packed) == 4 * 10 + 1
    for match in packed:
        name, bits = match[1], int(match[2])
        words = pack_columns(vectors[f"{name}.levels"], bits=bits)
        same_groups(vectors[f"{name}.qweight"], words, words.shape[1])
        same_groups(vectors[f"{name}.levels"], unpack_columns(words, bits=bits), 32)
        check_zeros(name, turned(vectors[f"{name}.zp"]), bits, vectors, same_groups)
        # Scales are stored as they are, one column for each row.
        scales = np.ascontiguousarray(vectors[f"{name}.scale_out_by_group"].T)
        same_groups(vectors[f"{name}.scales"], scales, 1)


def test_biases_are_plain_float16(golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("gptq/pack")
    for match in cases(vectors, r"(.*)\.bias_in"):
        same_groups(vectors[f"{match[1]}.bias"], cast(vectors[match[0]], "F32", "F16"), 1)


def test_words_of_solved_weights(golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("gptq/solver")
    solved = cases(vectors, r"(w(\d)_.*)\.q")
    assert len(solved) == 12
    for match in solved:
        name, bits = match[1], int(match[2])
        values, scale, zero = (vectors[f"{name}.{part}"] for part in ("q", "scale", "zero"))
        groups = vectors[f"{name}.g_idx"]
        levels = np.rint((values + zero[:, groups] * scale[:, groups]) / scale[:, groups])
        words = pack_columns(levels.clip(0, 2**bits - 1).astype(np.uint8), bits=bits)
        same_groups(vectors[f"{name}.qweight"], words, words.shape[1])
        check_zeros(name, turned(zero), bits, vectors, same_groups)
        scales = cast(np.ascontiguousarray(scale.T), "F32", "F16")
        same_groups(vectors[f"{name}.scales"], scales, 1)


def test_widths_that_are_excluded_are_refused(golden: Golden) -> None:
    vectors = golden("gptq/pack")
    found = [name for name in vectors if re.fullmatch(r"b[567]\..*\.levels", name)]
    assert len(found) == 3 * 10
    for name in found:
        with pytest.raises(ValueError, match="2, 3, 4 or 8 bits"):
            pack_columns(vectors[name], bits=int(name[1]))


@pytest.mark.parametrize("encode", [gptq_rtn, gptq_search])
def test_short_last_groups_are_refused(encode: Callable[..., GptqParts]) -> None:
    # Two packers write them, and `test_decoded_weights` reads one; no kernel of vLLM does.
    with pytest.raises(ValueError, match="do not divide"):
        encode(np.zeros((32, 160), np.float32), "F32", bits=4, group_size=128)


def test_a_zero_point_of_zero_is_found(golden: Golden) -> None:
    vectors = golden("gptq/pack")
    zeros = turned(vectors["zp0.b4.asym.g32.32x64.zp"])
    at = first_unstorable_zero(zeros, bits=4, version="gptq")
    assert zeros.reshape(-1)[at] == 0
    assert (zeros.reshape(-1)[:at] > 0).all()
    assert first_unstorable_zero(zeros, bits=4, version="gptq_v2") == -1
    with pytest.raises(ValueError, match="zero point 0"):
        pack_zeros(zeros, bits=4, version="gptq")


def check(
    expected: tuple[Array, Array, Array | None],
    parts: GptqParts,
    bits: int,
    same_groups: SameGroups,
) -> None:
    """Compares codes, scales and, if they are recorded, zero points."""
    levels, scales, zeros = expected
    same_groups(levels, parts.codes, 32)
    same_groups(scales, parts.scales, 1)
    middle = np.full_like(parts.zeros, 1 << (bits - 1))
    same_groups(middle if zeros is None else zeros, parts.zeros, 1)


@pytest.mark.parametrize(
    ("file", "version", "count"), [("gptq/rtn", "0.16.1", 192), ("gptq/rtn_0122", "0.12.2", 18)]
)
def test_rtn_and_search(
    file: str, version: str, count: int, golden: Golden, same_groups: SameGroups
) -> None:
    vectors = golden(file)
    found = cases(vectors, RTN_CASE.pattern)
    assert len(found) == count == sum(name.endswith(".levels") for name in vectors)
    for match in found:
        weight = vectors[f"weight.{match[1]}"]
        dtype, bits, size = VALUE_TYPES[weight.dtype.name], int(match[5]), int(match[6])
        name = match[0].removesuffix(".levels")
        options = {"bits": bits, "group_size": size}
        if match[2] == "rtn":
            symmetric = match[3] == "sym"
            parts = gptq_rtn(weight, dtype, symmetric=symmetric, arithmetic=dtype, **options)
        else:
            weights = None
            if match[4]:
                imatrix = vectors[f"imatrix.{match[4]}"]
                weights = search_weights(imatrix, grid=version, **options)
            parts = gptq_search(weight, dtype, weights=weights, grid=version, **options)
        zeros = vectors.get(f"{name}.zp")
        zeros = None if zeros is None else turned(zeros)
        expected = vectors[match[0]], vectors[f"{name}.scales_f16"], zeros
        check(expected, parts, bits, same_groups)


def _more_cases() -> dict[tuple[str, str], list[re.Match[str]]]:
    """(version, weight) -> what is recorded of it."""
    found: dict[tuple[str, str], list[re.Match[str]]] = {}
    for name in sorted(names_of_vectors("gptq/more")):
        if match := MORE_CASE.fullmatch(name):
            found.setdefault((match[1], match[2]), []).append(match)
    return found


MORE_CASES = _more_cases()


def test_every_recorded_case_is_compared(golden: Golden) -> None:
    recorded = [name for name in golden("gptq/more") if name.endswith(".levels")]
    assert sum(map(len, MORE_CASES.values())) == len(recorded)


@pytest.mark.parametrize("case", MORE_CASES, ids=".".join)
def test_float16_values_idle_columns_and_long_sums(
    case: tuple[str, str], golden: Golden, same_groups: SameGroups
) -> None:
    vectors = golden("gptq/more")
    for match in MORE_CASES[case]:
        version = {"0161": "0.16.1", "0122": "0.12.2"}[match[1]]
        weight, bits = vectors[f"w.{match[2]}"], int(match[4])
        dtype = VALUE_TYPES[weight.dtype.name]
        options = {"bits": bits, "group_size": int(match[5])}
        if match[3] == "opt":
            weights = None
            if match[6]:
                imatrix = vectors[f"imatrix.{match[6]}.{weight.shape[1]}"]
                weights = search_weights(imatrix, grid=version, **options)
            parts = gptq_search(weight, dtype, weights=weights, grid=version, **options)
        else:
            symmetric = match[3] == "sym"
            parts = gptq_rtn(weight, dtype, symmetric=symmetric, arithmetic=dtype, **options)
        name = match[0].removesuffix(".levels")
        expected = vectors[match[0]], vectors[f"{name}.scales"], vectors.get(f"{name}.zeros")
        check(expected, parts, bits, same_groups)


def test_decoded_weights(golden: Golden, same_groups: SameGroups) -> None:
    vectors, decoded = golden("gptq/pack"), golden("gptq/more")
    found = [name.removeprefix("decoded.") for name in decoded if name.startswith("decoded.")]
    assert len(found) == 7
    for name in found:
        bits, size = int(name[1]), int(name.split(".")[2][1:])
        zeros = unpack_zeros(vectors[f"{name}.qzeros_v1"], bits=bits, version="gptq")
        codes = unpack_columns(vectors[f"{name}.qweight"], bits=bits)
        parts = GptqParts(codes, zeros, vectors[f"{name}.scales"])
        values = gptq_decode(parts, group_size=size)
        same_groups(to_float32(decoded[f"decoded.{name}"], "F16"), values, 32)
