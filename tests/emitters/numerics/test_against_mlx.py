"""The codec gives the bytes of the installed mlx, on many kinds of weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emitters.mlx_affine.codec import decode, encode
from emitters.numerics.rounding import cast, to_float32
from policy_dsl.treatments import Coded

quantize = partial(Coded, symmetric=False, method="rtn")

pytestmark = pytest.mark.slow

mx = pytest.importorskip("mlx.core")

Array = NDArray[Any]
SameGroups = Callable[[Array, Array, int], None]

STORAGE = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
SHAPE = (96, 384)
MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


def families(dtype: str) -> dict[str, Array]:
    """Matrices of one value type, finite but for `bits`."""
    rng = np.random.default_rng(11)
    magnitudes = 10 ** rng.uniform(-12, 4, (SHAPE[0], 1))
    plain = {
        "normal": rng.standard_normal(SHAPE) * 0.02,
        "heavy_tail": rng.standard_t(2, SHAPE) * 0.02,
        "rows_of_any_magnitude": rng.standard_normal(SHAPE) * magnitudes,
        "negative": -rng.random(SHAPE) - 0.5,
        "positive": rng.random(SHAPE) + 0.5,
        "ties": rng.integers(-15, 16, SHAPE) / 4,
        "near_epsilon": rng.standard_normal(SHAPE) * 1e-7,
    }
    matrices = {name: cast(m.astype(np.float32), "F32", dtype) for name, m in plain.items()}
    noise = rng.bytes(SHAPE[0] * SHAPE[1] * np.dtype(STORAGE[dtype]).itemsize)
    return {**matrices, "bits": np.frombuffer(noise, STORAGE[dtype]).reshape(SHAPE)}


def to_mlx(values: Array, dtype: str) -> Any:
    """The values as an mlx array of this value type."""
    return mx.array(values).view(mx.bfloat16) if dtype == "BF16" else mx.array(values)


def from_mlx(array: Any) -> Array:
    """The elements of an mlx array; BF16 as bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def one_nan(values: Array, dtype: str) -> Array:
    """The values as float32 bits, with one pattern for every NaN."""
    wide = to_float32(values, dtype)
    return np.where(np.isnan(wide), np.uint32(0x7FC00000), wide.view(np.uint32))


@pytest.fixture(autouse=True)
def _on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", STORAGE)
def test_affine(dtype: str, bits: int, group_size: int, same_groups: SameGroups) -> None:
    geometry = {"bits": bits, "group_size": group_size}
    for matrix in families(dtype).values():
        parts = encode(matrix, dtype, quantize(scheme="affine", **geometry))
        reference = mx.quantize(to_mlx(matrix, dtype), mode="affine", **geometry)
        weight, scales, biases = (from_mlx(array) for array in reference)
        same_groups(weight, parts["weight"], group_size * bits // 32)
        same_groups(one_nan(scales, dtype), one_nan(parts["scales"], dtype), 1)
        same_groups(one_nan(biases, dtype), one_nan(parts["biases"], dtype), 1)
        decoded = decode(parts, dtype, quantize(scheme="affine", **geometry), matrix.shape[-1])
        expected = from_mlx(mx.dequantize(*reference, mode="affine", **geometry))
        same_groups(one_nan(expected, dtype), one_nan(decoded, "F32"), group_size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", STORAGE)
def test_fp_modes(dtype: str, mode: str, same_groups: SameGroups) -> None:
    bits, group_size = MODES[mode]
    geometry = {"bits": bits, "group_size": group_size}
    for name, matrix in families(dtype).items():
        if name == "bits":
            continue
        parts = encode(matrix, dtype, quantize(scheme=mode, **geometry))
        reference = mx.quantize(to_mlx(matrix, dtype), mode=mode, **geometry)
        same_groups(from_mlx(reference[0]), parts["weight"], group_size * bits // 32)
        same_groups(from_mlx(reference[1]), parts["scales"], 1)
        decoded = decode(parts, dtype, quantize(scheme=mode, **geometry), matrix.shape[-1])
        expected = mx.dequantize(*reference, mode=mode, dtype=mx.float32, **geometry)
        same_groups(from_mlx(expected), decoded, group_size)
