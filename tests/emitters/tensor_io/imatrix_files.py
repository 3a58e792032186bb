"""Importance matrix files of made-up statistics: GGUF by the library's writer, and legacy."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from numpy.typing import NDArray

from emitters.tensor_io.imatrix import Imatrix, InputSums

Array = NDArray[Any]
GATE = "blk.0.ffn_gate_exps.weight"
QUERY = "blk.0.attn_q.weight"


class Statistics(NamedTuple):
    """What one entry holds: float32 [n_matrices, in] and float32 [n_matrices]."""

    sums: Array
    counts: Array


def random_statistics(seed: int = 0, experts: int = 4, columns: int = 32) -> dict[str, Statistics]:
    """An entry of experts, the third of which got no token, and one of a single matrix."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 5000, experts).astype(np.float32)
    counts[2 % experts] = 0
    squares = random.gamma(0.5, 2, (experts, columns)).astype(np.float32)
    dense = random.gamma(0.5, 2000, (1, columns)).astype(np.float32)
    return {
        GATE: Statistics(squares * counts[:, None], counts),
        QUERY: Statistics(dense, np.array([4096], np.float32)),
    }


def write_gguf(path: Path, tensors: Mapping[str, Array], kind: str | None = "imatrix") -> Path:
    """A GGUF file with these tensors and the keys that llama-imatrix writes."""
    writer = gguf.GGUFWriter(path, arch="imatrix")
    if kind is not None:
        writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 8)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(statistics: Mapping[str, Statistics]) -> dict[str, Array]:
    """The tensors of an importance matrix, with one that is not read."""
    tensors: dict[str, Array] = {}
    for name, (sums, counts) in statistics.items():
        tensors[f"{name}.in_sum2"] = sums
        tensors[f"{name}.counts"] = counts[:, None]
        tensors[f"{name}.in_sum"] = -sums
    return tensors


def legacy_entry(name: str, statistics: Statistics, chunk: int = 512) -> bytes:
    """One entry, as llama-imatrix writes it: means times calls, 1 where no token came."""
    sums, counts = statistics
    calls = -(-int(counts.max()) // chunk)
    used = counts[:, None] > 0
    means = np.where(used, sums / np.where(used, counts[:, None], 1), np.float32(1))
    values = (means.astype(np.float32) * np.float32(calls)).tobytes()
    head = struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, sums.size)
    return head + values


def legacy_file(statistics: Mapping[str, Statistics], text: bytes | None = b"text") -> bytes:
    """A whole legacy file; without what follows the entries if text is None."""
    entries = b"".join(legacy_entry(name, one) for name, one in statistics.items())
    end = b"" if text is None else struct.pack("<ii", 8, len(text)) + text
    return struct.pack("<i", len(statistics)) + entries + end


def gate_sums(imatrix: Imatrix) -> InputSums:
    """The entry of the experts of `random_statistics`."""
    return imatrix.sums("experts.gate_proj", 0, n_matrices=4, columns=32)


def query_sums(imatrix: Imatrix) -> InputSums:
    """The entry of the single matrix of `random_statistics`."""
    return imatrix.sums("attention.q_proj", 0, columns=32)
