"""The codec of mlx_affine gives the recorded bytes of mlx, non-finite rows included."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emitters.mlx_affine.codec import decode, encode
from emitters.numerics import value_type
from emitters.numerics.rounding import to_float32
from policy_dsl.treatments import Coded

quantize = partial(Coded, symmetric=False, method="rtn")

Array = NDArray[Any]
Golden = Callable[[str], dict[str, Array]]
SameGroups = Callable[[Array, Array, int], None]

# Vectors that are not compared, and why.
EXCLUDED = {
    f"bf16.b1.g{group}.{part}": "1 bit is not a width of this target"
    for group in (32, 64, 128)
    for part in ("weight", "scales", "biases")
}
AFFINE_FILES = ("affine_random", "affine_edge", "affine_stacked_and_1bit")
AFFINE_CASE = re.compile(r"(f32|f16|bf16)\.b(\d)\.g(\d+)\.(weight|scales|biases|dequant)")
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def without_nan_payload(values: Array, dtype: str) -> Array:
    """The bits, with one pattern for every NaN."""
    bits = values.view(value_type(dtype).raw).copy()
    bits[np.isnan(to_float32(values, dtype))] = np.iinfo(bits.dtype).max
    return bits


def affine_cases(vectors: dict[str, Array]) -> set[tuple[str, int, int]]:
    """(value type, bits, group size) of every vector of the file that is to be compared."""
    matches = (AFFINE_CASE.fullmatch(key) for key in vectors if key not in EXCLUDED)
    return {(m[1], int(m[2]), int(m[3])) for m in matches if m}


@pytest.mark.parametrize("name", AFFINE_FILES)
def test_affine_bytes(name: str, golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden(f"mlx/{name}")
    cases = affine_cases(vectors)
    assert cases
    for prefix, bits, size in sorted(cases):
        source, key, dtype = (
            vectors[f"{prefix}.input"],
            f"{prefix}.b{bits}.g{size}",
            prefix.upper(),
        )
        options = {"scheme": "affine", "bits": bits, "group_size": size}
        parts = encode(source.reshape(-1, source.shape[-1]), dtype, quantize(**options))
        expected = {part: vectors[f"{key}.{part}"] for part in parts}
        weight = expected["weight"].reshape(parts["weight"].shape)
        same_groups(weight, parts["weight"], size * bits // 32)
        for part in ("scales", "biases"):
            stored = expected[part].reshape(parts[part].shape)
            got = without_nan_payload(parts[part], dtype)
            same_groups(without_nan_payload(stored, dtype), got, 1)
        if f"{key}.dequant" in vectors:
            weights = to_float32(vectors[f"{key}.dequant"], dtype).reshape(-1, source.shape[-1])
            decoded = decode(parts, dtype, quantize(**options), source.shape[-1])
            same_groups(weights, decoded, size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prefix", ["f32", "f16", "bf16"])
def test_fp_mode_bytes(prefix: str, mode: str, golden: Golden, same_groups: SameGroups) -> None:
    vectors = golden("mlx/fp_modes")
    bits, size = MODES[mode]
    options = {"scheme": mode, "bits": bits, "group_size": size}
    parts = encode(vectors[f"{prefix}.input"], prefix.upper(), quantize(**options))
    same_groups(vectors[f"{prefix}.{mode}.weight"], parts["weight"], size * bits // 32)
    same_groups(vectors[f"{prefix}.{mode}.scales"], parts["scales"], 1)
    weights = to_float32(vectors[f"{prefix}.{mode}.dequant_bf16"], "BF16")
    decoded = decode(parts, prefix.upper(), quantize(**options), weights.shape[-1])
    same_groups(weights, decoded, size)


def test_every_vector_is_compared_or_excluded(golden: Golden) -> None:
    assert EXCLUDED.keys() <= golden("mlx/affine_stacked_and_1bit").keys()
    for name in AFFINE_FILES:
        others = [key for key in golden(f"mlx/{name}") if not AFFINE_CASE.fullmatch(key)]
        assert all(key.endswith(".input") for key in others)
    modes = [key.split(".")[1] for key in golden("mlx/fp_modes")]
    assert set(modes) == {"input", *MODES}


@pytest.mark.parametrize("scheme", ["affine", *MODES])
def test_the_input_is_not_changed(scheme: str, golden: Golden) -> None:
    source = golden("mlx/affine_random")["bf16.input"]
    bits, size = MODES.get(scheme, (4, 64))
    before = source.copy()
    encode(source, "BF16", quantize(scheme=scheme, bits=bits, group_size=size))
    assert not source.flags.writeable
    assert (source == before).all()


@pytest.mark.parametrize(
    ("dtype", "scheme", "bits", "group_size"),
    [
        ("BF16", "affine", 7, 64),
        ("BF16", "affine", 4, 48),
        ("BF16", "affine", 4, 96),
        ("F64", "affine", 4, 64),
        ("F32", "affine", 4, 64),
        ("BF16", "mxfp4", 4, 64),
        ("BF16", "mxfp4", 8, 32),
        ("BF16", "nf4", 4, 64),
    ],
)
def test_what_mlx_does_not_have_is_refused(
    dtype: str, scheme: str, bits: int, group_size: int
) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        encode(
            np.zeros((2, 256), np.uint16),
            dtype,
            quantize(scheme=scheme, bits=bits, group_size=group_size),
        )
