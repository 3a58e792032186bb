"""Readers of the recorded vectors, and a report of where two results differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[Any]

GOLDEN = Path(__file__).parents[2] / "golden"
STORAGE: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I32": np.int32,
    "I16": np.int16,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "I64": np.int64,
    "F8_E4M3": np.uint8,
}


def read_vectors(name: str) -> dict[str, Array]:
    """The tensors of tests/golden/<name>.safetensors; BF16 and FP8 as their bits."""
    content = (GOLDEN / f"{name}.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    vectors = {}
    for key, entry in json.loads(content[8:start]).items():
        if key != "__metadata__":
            begin, end = (start + offset for offset in entry["data_offsets"])
            flat = np.frombuffer(content[begin:end], STORAGE[entry["dtype"]])
            vectors[key] = flat.reshape(entry["shape"])
    return vectors


def compare_groups(expected: Array, got: Array, group: int) -> None:
    """Fails unless the bits are equal: says how many groups differ, and shows the worst.

    group: consecutive elements that belong together.
    """
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    unsigned = np.dtype(f"u{got.dtype.itemsize}")
    pairs = [np.ascontiguousarray(a).view(unsigned).reshape(-1, group) for a in (expected, got)]
    wrong = (pairs[0] != pairs[1]).sum(axis=1)
    worst = int(wrong.argmax())
    report = (
        f"{np.count_nonzero(wrong)} of {len(wrong)} groups differ; worst is group {worst}: "
        f"expected {[hex(v) for v in pairs[0][worst]]}, got {[hex(v) for v in pairs[1][worst]]}"
    )
    assert not wrong.any(), report


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Array]]:
    """read_vectors."""
    return read_vectors


@pytest.fixture(scope="session")
def same_groups() -> Callable[[Array, Array, int], None]:
    """compare_groups."""
    return compare_groups
