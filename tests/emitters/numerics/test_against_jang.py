"""MXTQ gives the bytes of the installed jang, on many kinds of weights and at many widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emitters.numerics.mxtq import mxtq_decode, mxtq_encode
from emitters.numerics.mxtq_tables import codebook, signs
from emitters.numerics.rounding import cast, to_float32

pytestmark = pytest.mark.slow

mx = pytest.importorskip("mlx.core")
jang = pytest.importorskip("jang_tools.convert_zaya_common")
jang_codebook = pytest.importorskip("jang_tools.turboquant.codebook")
jang_rotation = pytest.importorskip("jang_tools.turboquant.rotation")

Array = NDArray[Any]
SameGroups = Callable[[Array, Array, int], None]

# Powers of two, sums of several, and widths of published models.
COLUMNS = (4, 7, 31, 64, 100, 192, 255, 320, 768, 1408, 1536, 2048, 2880, 3072, 7168)
ROWS = 19


def families(columns: int) -> dict[str, Array]:
    """Matrices of float32, not all of them finite."""
    rng = np.random.default_rng(columns)
    shape = (ROWS, columns)
    spikes = np.zeros(shape)
    spikes[np.arange(ROWS), rng.integers(0, columns, ROWS)] = rng.standard_normal(ROWS)
    magnitudes = 10 ** rng.uniform(-44, 37, (ROWS, 1))
    noise = rng.bytes(ROWS * columns * 4)
    plain = {
        "normal": rng.standard_normal(shape) * 0.02,
        "heavy_tail": rng.standard_t(2, shape) * 0.02,
        "ties": rng.integers(-3, 4, shape) / 4,
        "spikes": spikes,
        "rows_of_any_magnitude": rng.standard_normal(shape) * magnitudes,
    }
    with np.errstate(over="ignore"):
        matrices = {name: matrix.astype(np.float32) for name, matrix in plain.items()}
    return {**matrices, "bits": np.frombuffer(noise, np.float32).reshape(shape)}


def one_nan(values: Array) -> Array:
    """The values with one pattern for every NaN."""
    return np.where(np.isnan(values), np.full_like(values, np.nan), values)


def decoded_by_jang(codes: Array, norms: Array, columns: int, bits: int) -> Array:
    """The weights by jang's own functions; codes: uint32 [rows, columns]."""
    table = mx.array(jang_codebook.compute_codebook(columns, bits))
    scaled = mx.take(table, mx.array(codes)) * mx.array(norms)[:, None].astype(mx.float32)
    turned = jang_rotation.generate_random_signs(columns, seed=42)
    return np.array(jang_rotation.hadamard_inverse(scaled, turned))


@pytest.fixture(autouse=True)
def _on_the_cpu() -> None:
    mx.set_default_device(mx.cpu)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", COLUMNS)
def test_mxtq(columns: int, bits: int, same_groups: SameGroups) -> None:
    for matrix in families(columns).values():
        for dtype in ("F32", "BF16", "F16"):
            source = cast(matrix, "F32", dtype)
            packed, norms = mxtq_encode(source, dtype, bits=bits)
            wide = to_float32(source, dtype)
            expected = jang.tq_quantize_weight_rowwise(wide, bits=bits, seed=42)
            same_groups(expected["packed"], packed, packed.shape[1])
            same_groups(one_nan(expected["norms"]), one_nan(norms), 1)
        places = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
        codes = (packed[:, :, None] >> places & np.uint32(2**bits - 1)).reshape(ROWS, -1)
        weights = decoded_by_jang(codes[:, :columns], norms, columns, bits)
        got = mxtq_decode(packed, norms, columns=columns, bits=bits)
        same_groups(one_nan(weights), one_nan(got), columns)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("columns", [*range(4, 40), *COLUMNS, 6144, 12288, 28672])
def test_tables(columns: int, bits: int, same_groups: SameGroups) -> None:
    centroids = np.array(jang_codebook.compute_codebook(columns, bits)).astype(np.float32)
    same_groups(centroids, codebook(columns, bits), 1)
    for seed in (0, 42, 2**40 + 7):
        expected = np.array(jang_rotation.generate_random_signs(columns, seed=seed))
        same_groups(expected, signs(columns, seed), 1)
