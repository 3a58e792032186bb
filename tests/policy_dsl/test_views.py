"""Views of stored tensors: the map of rows is numpy's indexing, and places invert it."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_dsl.inventory import TensorInfo
from policy_dsl.views import (
    Alternate,
    Columns,
    Expert,
    Operation,
    Picked,
    Reshaped,
    Slice,
    Transposed,
    View,
    stacked,
)


def view_of(shape: tuple[int, ...], operations: tuple[Operation, ...]) -> View:
    return View(TensorInfo("x", "F32", shape, 4 * prod(shape)), None, operations)


def done_by_numpy(array: Any, operation: Operation) -> Any:
    """The operation on an array of the source's values."""
    match operation:
        case Expert(number):
            return array[number]
        case Slice(first, count):
            return array[first : first + count]
        case Alternate(first, step):
            return array[first::step]
        case Transposed():
            return array.T
        case Picked(entries):
            return np.take(array, entries, -1 if prod(array.shape[:-1]) == 1 else 0)
        case Columns(first, stop, step):
            return array[..., first:stop:step]
        case Reshaped(sizes):
            return array.reshape(-1)[: prod(sizes)].reshape(sizes)


def in_parts(source: Any, view: View, first: int, count: int) -> Any:
    """Rows of a view, of the source as [rows, last axis], by its rectangles."""
    values = source.reshape(-1, source.shape[-1] if source.ndim else 1)
    parts = []
    for rows, columns, transposed in view.rectangles(first, count):
        part = values[np.ix_(list(rows), list(columns))]
        parts.append((part.T if transposed else part).reshape(-1))
    return np.concatenate(parts).reshape(-1, view.width)


@st.composite
def views(draw: Any) -> View:
    """A view by any operations that follow each other, of a tensor that is not empty."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    now, operations = shape, []
    for _ in range(draw(st.integers(0, 4))):
        operation = draw(st.sampled_from([*following(draw, now)]))
        operations.append(operation)
        now = operation.shape(now)
        if isinstance(operation, Reshaped):
            break
    return view_of(shape, tuple(operations))


def following(draw: Any, shape: tuple[int, ...]) -> list[Operation]:
    """An operation of each kind that a tensor of this shape allows."""
    taken = draw(st.integers(1, prod(shape)))
    width = draw(st.sampled_from([size for size in range(1, taken + 1) if taken % size == 0]))
    allowed: list[Operation] = [Reshaped((taken // width, width))]
    if shape:
        start = draw(st.integers(0, shape[-1] - 1))
        allowed.append(Columns(start, shape[-1], draw(st.integers(1, 3))))
        axis = shape[-1] if prod(shape[:-1]) == 1 else shape[0]
        entries = st.sets(st.integers(0, axis - 1), min_size=1)
        allowed.append(Picked(tuple(sorted(draw(entries)))))
    if len(shape) > 1:
        first = draw(st.integers(0, shape[0] - 1))
        allowed.append(Slice(first, draw(st.integers(1, shape[0] - first))))
    if len(shape) > 2:
        allowed.append(Expert(first))
    if len(shape) == 2:
        allowed += [Transposed(), Alternate(first, draw(st.integers(1, 3)))]
    return allowed


@given(views(), st.data())
def test_rows_of_a_view_are_those_of_numpy(view: View, data: Any) -> None:
    source = np.arange(prod(view.tensor.shape)).reshape(view.tensor.shape)
    whole = source
    for operation in view.operations:
        whole = done_by_numpy(whole, operation)
    assert view.shape == whole.shape
    assert (view.n_rows, view.width) == whole.reshape(-1, view.width).shape
    first = data.draw(st.integers(0, view.n_rows - 1))
    count = data.draw(st.integers(1, view.n_rows - first))
    found = in_parts(source, view, first, count)
    np.testing.assert_array_equal(found, whole.reshape(-1, view.width)[first : first + count])
    read = sum(
        (max(rows) + 1 - min(rows)) * (max(columns) + 1 - min(columns))
        for rows, columns, _ in view.rectangles(first, count)
    )
    picked = any(isinstance(operation, Picked) for operation in view.operations)
    assert picked or read <= view.values_read(count)


@given(views(), st.data())
def test_places_lead_back_to_the_values(view: View, data: Any) -> None:
    source = np.arange(prod(view.tensor.shape)).reshape(view.tensor.shape)
    row = data.draw(st.integers(0, view.n_rows - 1))
    column = data.draw(st.integers(0, view.width - 1))
    place = view.place(row, column)
    assert len(place) == source.ndim
    assert source[place] == in_parts(source, view, row, 1)[0, column]


@given(st.lists(views(), max_size=4))
def test_views_one_below_the_other(several: list[View]) -> None:
    placed = list(stacked(several))
    assert [view for view, _, _ in placed] == several
    numbers = [first + row for _, first, count in placed for row in range(count)]
    assert numbers == list(range(sum(view.n_rows for view in several)))


@pytest.mark.parametrize(
    ("shape", "operations", "at", "place"),
    [
        ((), (), (0, 0), ()),
        ((7,), (), (0, 4), (4,)),
        ((7,), (Reshaped((7, 1)),), (4, 0), (4,)),
        ((2, 3), (Reshaped((2, 2)),), (1, 1), (1, 0)),
        ((6, 1, 4), (Reshaped((6, 4, 1)),), (9, 0), (2, 0, 1)),
        ((4, 6), (Columns(1, 6, 2),), (3, 2), (3, 5)),
        ((9, 4), (Picked((5, 8)),), (1, 3), (8, 3)),
        ((3, 6, 4), (Expert(2),), (5, 3), (2, 5, 3)),
        ((3, 6, 4), (Expert(1), Slice(3, 3)), (0, 2), (1, 3, 2)),
        ((3, 6, 4), (Expert(1), Alternate(1, 2)), (2, 0), (1, 5, 0)),
        ((3, 6, 8), (Expert(1), Transposed(), Alternate(1, 2)), (3, 4), (1, 4, 7)),
    ],
)
def test_where_a_value_is(shape, operations, at, place):
    assert view_of(shape, operations).place(*at) == place
