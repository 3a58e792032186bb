"""The entries of an importance matrix in GGUF, read without reading its sums.

Only imported to read such a file: the library loads its tables of all model families.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from gguf.gguf_reader import GGUFReader, ReaderTensor

from emitters.tensor_io.imatrix_entries import Entry
from policy_dsl.escaping import shown
from policy_dsl.regular_files import opened

_SUMS, _COUNTS = ".in_sum2", ".counts"
# Each read of a header keeps about 700 bytes; a file of 1,000 entries needs 18,000.
_MAX_READS = 50_000


class _CheckedReader(GGUFReader):
    """The library's reader, which else takes lengths beyond the file as empty, and goes on."""

    _reads = 0

    def _get(
        self,
        offset: int,
        dtype: npt.DTypeLike,
        count: int = 1,
        override_order: Literal["I", "S", "<"] | None = None,
    ) -> npt.NDArray[Any]:
        self._reads += 1
        if self._reads > _MAX_READS:
            raise ValueError("its header has more parts than an importance matrix ever has")
        left = max(0, self.data.size - int(offset))
        if int(count) * np.dtype(dtype).itemsize > left or int(offset) > self.data.size:
            raise ValueError(f"it is cut short: {count} values do not fit into {left} bytes")
        return super()._get(offset, dtype, count, override_order)


def gguf_entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entry by name, and by name what is wrong with others. Sums and counts are never touched.

    Raises: ValueError, LookupError, ArithmeticError, TypeError, RecursionError or OSError if
    the file is not a whole GGUF file of an importance matrix.
    Source: gguf 0.19.0, `GGUFReader`; ggml-org/llama.cpp 006e7ef, tools/imatrix/imatrix.cpp,
    `save_imatrix`; offsets without gaps as ggml's `gguf_init_from_file` demands.
    """
    # Offsets beyond 64 bits must not become small ones.
    with np.errstate(over="raise"), opened(path) as file:
        # The file and not its path, which may lead to another one by now.
        reader = _CheckedReader(cast("Any", file))
    if reader.byte_order != "I":
        raise ValueError("its numbers are big-endian")
    kind = reader.get_field("general.type")
    said = kind.contents() if kind else None
    if said != "imatrix":
        raise ValueError(f'its general.type is "{shown(str(said))}", not "imatrix"')
    _check_offsets(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    entries: dict[str, Entry] = {}
    defects: dict[str, str] = {}
    for name in _entry_names(tensors):
        try:
            entries[name] = _entry(tensors, name)
        except ValueError as defect:
            defects[name] = str(defect)
    if not entries and not defects:
        raise ValueError("it has no entries")
    return entries, defects


def _check_offsets(reader: GGUFReader) -> None:
    end = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != end:
            at = f"byte {tensor.data_offset} and not at {end}"
            raise ValueError(f'tensor "{shown(tensor.name)}" starts at {at}')
        end += -(-tensor.n_bytes // int(reader.alignment)) * int(reader.alignment)


def _entry_names(tensors: Mapping[str, ReaderTensor]) -> Iterator[str]:
    """The names that have sums or counts, each once; `.in_sum` and all else is not used."""
    for name in tensors:
        if name.endswith(_SUMS):
            yield name.removesuffix(_SUMS)
        elif name.endswith(_COUNTS) and name.removesuffix(_COUNTS) + _SUMS not in tensors:
            yield name.removesuffix(_COUNTS)


def _entry(tensors: Mapping[str, ReaderTensor], name: str) -> Entry:
    if not name.isprintable():
        raise ValueError("its name holds characters that cannot be printed")
    for part in (_SUMS, _COUNTS):
        if name + part not in tensors:
            raise ValueError(f"it has no {part}")
        dtype = tensors[name + part].tensor_type.name
        if dtype != "F32":
            raise ValueError(f"its {part} are {dtype}, not F32")
    sums, counts = tensors[name + _SUMS], tensors[name + _COUNTS]
    n_sums, n_counts = int(sums.n_elements), int(counts.n_elements)
    # One count for each matrix; [in, 1] is also written as [in].
    if not n_sums or n_sums != int(sums.shape[0]) * n_counts:
        shape = sums.shape.tolist()
        raise ValueError(f"it has sums of shape {shape} and {n_counts} counts")
    return Entry(sums.data_offset, n_sums, n_counts, counts.data_offset)
