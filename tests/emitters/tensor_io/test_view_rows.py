"""Rows of views, read from files and made into values, against the whole tensor by numpy."""

from __future__ import annotations

import tempfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emitters.numerics import Array
from emitters.numerics.rounding import cast, to_float32
from emitters.numerics.small_floats import FP8_RULES, fp8_dequantize
from emitters.tensor_io.files import Source, file_facts
from emitters.tensor_io.view_rows import Cast, ViewReader, view_nbytes
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import TensorInfo
from policy_dsl.views import Alternate, Columns, Expert, Picked, Reshaped, Slice, Transposed, View

EXPERTS, OUT, INTO = 3, 12, 10
SHAPE = (EXPERTS, OUT, INTO)
BLOCK = (4, 3)
GRID = (EXPERTS, OUT // BLOCK[0], -(-INTO // BLOCK[1]))
CONFIG = {"quantization_config": {"weight_block_size": list(BLOCK)}}
# Views of the tensor, and the same by numpy.
VIEWS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "whole": ((), np.s_[:]),
    "an expert": ((Expert(1),), np.s_[1]),
    "a half": ((Expert(2), Slice(6, 6)), np.s_[2, 6:]),
    "rows in turn": ((Expert(1), Alternate(1, 2)), np.s_[1, 1::2]),
    "columns": ((Expert(1), Transposed()), np.s_[1]),
    "half of the columns": ((Expert(1), Transposed(), Slice(5, 5)), np.s_[1, :, 5:]),
    "columns in turn": ((Expert(2), Transposed(), Alternate(1, 2)), np.s_[2, :, 1::2]),
    "picked experts": ((Picked((0, 2)),), np.s_[[0, 2]]),
    "picked rows": ((Expert(0), Picked((0, 1, 5, 11))), np.s_[0, [0, 1, 5, 11]]),
    "every second column": ((Expert(1), Columns(1, 10, 2)), np.s_[1, :, 1::2]),
    "values": ((Expert(1), Reshaped((120, 1))), np.s_[1]),
    "other rows": ((Expert(1), Reshaped((15, 8))), np.s_[1]),
    "values of columns": ((Expert(1), Transposed(), Reshaped((120, 1))), np.s_[1]),
}


def written(folder: Path, *arrays: tuple[str, Array]) -> tuple[Source, list[TensorInfo]]:
    """A file of tensors (dtype, array), one after the other, and where each of them is."""
    found, content = [], b"begin"
    for dtype, array in arrays:
        start = len(content)
        content += array.tobytes()
        found.append(TensorInfo("w", dtype, array.shape, array.nbytes, "file", start, len(content)))
    (folder / "file").write_bytes(content)
    return Source(folder, file_facts(folder, ["file"])), found


def by_numpy(whole: Array, case: str) -> Array:
    """The view of the case as [rows, in] of all values."""
    operations, index = VIEWS[case]
    part = whole[index]
    part = part.T if Transposed() in operations else part
    last = operations[-1] if operations else None
    return part.reshape(-1, last.sizes[-1] if isinstance(last, Reshaped) else part.shape[-1])


@pytest.mark.parametrize("case", VIEWS)
@pytest.mark.parametrize(("dtype", "into"), [("F32", "BF16"), ("F16", "F32"), ("BF16", "BF16")])
@settings(max_examples=15)
@given(data=st.data())
def test_rows_of_plain_values(case, dtype, into, data):
    values = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    stored = cast(values, "F32", dtype)
    expected = by_numpy(cast(stored, dtype, into), case)
    with tempfile.TemporaryDirectory() as folder:
        source, (tensor,) = written(Path(folder), (dtype, stored))
        check_rows(View(tensor, None, VIEWS[case][0]), source, expected, Cast(into), data)


@pytest.mark.parametrize("case", VIEWS)
@pytest.mark.parametrize("rule", FP8_RULES)
@settings(max_examples=15)
@given(data=st.data())
def test_rows_of_fp8_meet_their_scales_in_the_source(case, rule, data):
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 0x7F, SHAPE, np.uint8)
    scales = rng.uniform(0.5, 2, GRID).astype(np.float32)
    whole = np.stack(
        [
            fp8_dequantize(matrix, grid, block=BLOCK, rule=rule, out_dtype="F32")
            for matrix, grid in zip(codes, scales, strict=True)
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        source, (tensor, scale) = written(Path(folder), ("F8_E4M3", codes), ("F32", scales))
        view = View(tensor, scale, VIEWS[case][0])
        check_rows(view, source, by_numpy(whole, case), Cast("F32", rule), data)


def check_rows(view: View, source: Source, expected: Array, how: Cast, data: Any) -> None:
    """Any rows of the view are the expected ones."""
    assert (view.n_rows, view.width) == expected.shape
    assert view_nbytes(view, view.n_rows) * prod(SHAPE) == view.tensor.nbytes * expected.size
    first = data.draw(st.integers(0, view.n_rows - 1))
    count = data.draw(st.integers(1, view.n_rows - first))
    found = ViewReader(source, CONFIG, must_be_finite=True).rows(view, first, count, how)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected[first : first + count])


@pytest.mark.parametrize("case", VIEWS)
def test_the_place_of_a_value_that_is_not_finite(case, tmp_path):
    stored = np.ones(SHAPE, np.float32)
    source, (tensor,) = written(tmp_path, ("F32", stored))
    view = View(tensor, None, VIEWS[case][0])
    row, column = view.n_rows - 2, view.width - 1
    place = view.place(row, column)
    stored[place] = np.inf
    source, _ = written(tmp_path, ("F32", stored))
    with pytest.raises(PolicyError) as error:
        ViewReader(source, CONFIG, must_be_finite=True).rows(view, 0, view.n_rows, Cast("F32"))
    assert str(list(place)) in error.value.diagnostics[0].message
    values = ViewReader(source, CONFIG).rows(view, 0, view.n_rows, Cast("F32"))
    assert np.isinf(values[row, column])
    assert np.isfinite(values).sum() == values.size - 1


@pytest.mark.parametrize("case", VIEWS)
def test_the_place_of_a_scale_that_is_not_finite(case, tmp_path):
    codes = np.full(SHAPE, 0x38, np.uint8)
    scales = np.ones(GRID, np.float32)
    source, (tensor, scale) = written(tmp_path, ("F8_E4M3", codes), ("F32", scales))
    view = View(tensor, scale, VIEWS[case][0])
    expert, row, column = view.place(view.n_rows - 1, view.width - 1)
    place = expert, row // BLOCK[0], column // BLOCK[1]
    scales[place] = np.nan
    source, _ = written(tmp_path, ("F8_E4M3", codes), ("F32", scales))
    reader = ViewReader(source, CONFIG, must_be_finite=True)
    with pytest.raises(PolicyError) as error:
        reader.rows(view, view.n_rows - 1, 1, Cast("F32"))
    assert str(list(place)) in error.value.diagnostics[0].message


def test_values_are_read_where_they_are(tmp_path):
    """Of a transposed view so many columns of the source, and not all of them."""
    stored = np.arange(prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    source, (tensor,) = written(tmp_path, ("F32", stored))
    found = source.rectangle(tensor, range(12, 24), range(2, 4))
    np.testing.assert_array_equal(to_float32(found, "F32"), stored[1, :, 2:4])
