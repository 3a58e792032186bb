"""What holds for every input of the codec: bounded error, rows on their own, any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from emitters.mlx_affine.codec import decode, encode
from emitters.numerics.rounding import cast, to_float32
from policy_dsl.treatments import Coded

quantize = partial(Coded, symmetric=False, method="rtn")

Array = NDArray[Any]

STORAGE = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
# Relative rounding error of a value type, and its smallest positive value.
ROUNDING = {"BF16": (2.0**-8, 2.0**-133), "F16": (2.0**-11, 2.0**-24), "F32": (2.0**-23, 2.0**-149)}
TOPS = {"mxfp4": 6.0, "mxfp8": 448.0, "nvfp4": 6.0}
# Half of the widest gap between neighbouring codes, over the largest code.
HALF_GAPS = {"mxfp4": 1 / 6, "mxfp8": 16 / 448, "nvfp4": 1 / 6}


affine_options = st.builds(
    lambda bits, size: {"scheme": "affine", "bits": bits, "group_size": size},
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.sampled_from([32, 64, 128]),
)
fp_options = st.sampled_from(
    [
        {"scheme": "mxfp4", "bits": 4, "group_size": 32},
        {"scheme": "mxfp8", "bits": 8, "group_size": 32},
        {"scheme": "nvfp4", "bits": 4, "group_size": 16},
    ]
)
dtypes = st.sampled_from(sorted(STORAGE))


@st.composite
def weights(draw: st.DrawFn, dtype: str, group_size: int) -> Array:
    """A matrix of finite weights below 1e4, with few or many different values."""
    shape = draw(st.integers(1, 5)), group_size * draw(st.integers(1, 3))
    elements = st.floats(-1e4, 1e4, width=32) | st.floats(-0.125, 0.125, width=32)
    return cast(draw(arrays(np.float32, shape, elements=elements)), "F32", dtype)


@st.composite
def any_bits(draw: st.DrawFn, dtype: str, group_size: int) -> Array:
    """A matrix of any bit patterns; more than 16 groups in some, so that blocks end inside."""
    shape = draw(st.integers(2, 40)), group_size * draw(st.integers(1, 3))
    width = np.dtype(STORAGE[dtype]).itemsize
    noise = np.random.default_rng(draw(st.integers(0, 2**32))).bytes(shape[0] * shape[1] * width)
    return np.frombuffer(noise, STORAGE[dtype]).reshape(shape)


def groups_and_errors(matrix: Array, dtype: str, options: dict[str, Any]) -> tuple[Array, Array]:
    """The values group by group, and the largest error of each group after a round trip."""
    exact = to_float32(matrix, dtype).astype(np.float64)
    treatment, columns = quantize(**options), matrix.shape[-1]
    got = decode(encode(matrix, dtype, treatment), dtype, treatment, columns)
    groups = exact.reshape(-1, options["group_size"])
    return groups, np.abs(got - exact).reshape(groups.shape).max(axis=1)


@given(data=st.data(), dtype=dtypes, options=affine_options)
def test_affine_error_is_below_two_steps(
    data: st.DataObject, dtype: str, options: dict[str, Any]
) -> None:
    matrix = data.draw(weights(dtype, options["group_size"]))
    groups, error = groups_and_errors(matrix, dtype, options)
    steps = 2 ** options["bits"] - 1
    step = np.maximum(np.ptp(groups, axis=1) / steps, 1e-7)
    relative, smallest = ROUNDING[dtype]
    slack = 4 * relative * np.abs(groups).max(axis=1) + steps * smallest
    # One step where the far end is clipped for zero's sake, half a step of rounding.
    assert (error <= 1.51 * step + slack).all()


@given(data=st.data(), dtype=dtypes, options=fp_options)
def test_fp_error_is_below_half_a_gap(
    data: st.DataObject, dtype: str, options: dict[str, Any]
) -> None:
    matrix = data.draw(weights(dtype, options["group_size"]))
    groups, error = groups_and_errors(matrix, dtype, options)
    largest = np.abs(groups).max(axis=1)
    if options["scheme"] == "nvfp4":
        # Its scales stop at 448, round by a sixteenth, and are multiples of 2**-9.
        clipped = np.maximum(largest - 448 * 6, 0)
        bound = largest * (HALF_GAPS["nvfp4"] + 1 / 16) + 6 * 2.0**-10 + clipped
    else:
        # The scale is rounded up to a power of two: up to twice what the group needs.
        bound = 2 * largest * HALF_GAPS[options["scheme"]] + 2.0**-127 * TOPS[options["scheme"]]
    relative, smallest = ROUNDING[dtype]
    # A scale below the value type's smallest number counts as zero.
    lost = TOPS[options["scheme"]] * smallest
    assert (error <= bound * (1 + 2 * relative) + lost).all()


@given(data=st.data(), dtype=dtypes, options=affine_options | fp_options)
def test_rows_encode_and_decode_on_their_own(
    data: st.DataObject, dtype: str, options: dict[str, Any]
) -> None:
    matrix = data.draw(any_bits(dtype, options["group_size"]))
    cut = data.draw(st.integers(1, len(matrix) - 1))
    whole = encode(matrix, dtype, quantize(**options))
    pieces = [encode(rows, dtype, quantize(**options)) for rows in (matrix[:cut], matrix[cut:])]
    treatment, columns = quantize(**options), matrix.shape[-1]
    decoded = [decode(piece, dtype, treatment, columns) for piece in pieces]
    for part, stored in whole.items():
        assert np.concatenate([p[part] for p in pieces]).tobytes() == stored.tobytes()
    assert np.concatenate(decoded).tobytes() == decode(whole, dtype, treatment, columns).tobytes()


@given(data=st.data(), dtype=dtypes, options=affine_options)
def test_zero_survives_between_extremes_of_both_signs(
    data: st.DataObject, dtype: str, options: dict[str, Any]
) -> None:
    matrix = data.draw(weights(dtype, options["group_size"]))[:, : options["group_size"]].copy()
    matrix[:, 0], matrix[:, 1:3] = 0, cast(np.array([1e4, -1e4], np.float32), "F32", dtype)
    treatment, columns = quantize(**options), matrix.shape[-1]
    got = decode(encode(matrix, dtype, treatment), dtype, treatment, columns)
    assert (np.abs(got[:, 0]) <= 1e4 * ROUNDING[dtype][0]).all()


@pytest.mark.parametrize("scheme", ["affine", "nvfp4"])
def test_threads_give_the_same_bytes(scheme: str) -> None:
    options = {"scheme": scheme, "bits": 4, "group_size": 64 if scheme == "affine" else 16}
    matrix = np.random.default_rng(4).integers(0, 2**15, (256, 512)).astype(np.uint16)
    alone = encode(matrix, "BF16", quantize(**options))
    with ThreadPoolExecutor(4) as pool:
        for parts in pool.map(lambda _: encode(matrix, "BF16", quantize(**options)), range(8)):
            assert all((parts[name] == alone[name]).all() for name in alone)


def test_unaligned_and_strided_rows_are_taken() -> None:
    matrix = np.random.default_rng(5).standard_normal((6, 128)).astype(np.float32)
    options = {"scheme": "affine", "bits": 4, "group_size": 64}
    expected = encode(matrix[::2], "F32", quantize(**options))["weight"]
    unaligned = np.frombuffer(b"x" + matrix[::2].tobytes(), np.float32, offset=1).reshape(3, 128)
    assert (encode(unaligned, "F32", quantize(**options))["weight"] == expected).all()
    assert (
        encode(np.ascontiguousarray(matrix[::2]), "F32", quantize(**options))["weight"] == expected
    ).all()


def test_parts_that_disagree_are_refused() -> None:
    matrix = np.zeros((2, 128), np.uint16)
    affine = {"scheme": "affine", "bits": 4, "group_size": 64}
    parts = encode(matrix, "BF16", quantize(**affine))
    with pytest.raises(ValueError, match="not one matrix"):
        decode({**parts, "weight": parts["weight"][:, :-1]}, "BF16", quantize(**affine), 128)
    mode = {"scheme": "mxfp4", "bits": 4, "group_size": 32}
    parts = encode(matrix, "BF16", quantize(**mode))
    with pytest.raises(ValueError, match="not one mxfp4 matrix"):
        decode({**parts, "scales": parts["scales"][:1]}, "BF16", quantize(**mode), 128)
    with pytest.raises(ValueError, match="not those of 96 columns"):
        decode(parts, "BF16", quantize(**mode), 96)
