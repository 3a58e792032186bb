"""`jangtq_runtime.safetensors`: signs and codebooks of a bundle, for readers that make none.

Source: jang 2.5.50, `build_jangtq_sidecar`; widths of 3-bit rows are the true ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from emitters.jangtq_prestack.names import SEED
from emitters.numerics.mxtq_tables import codebook, signs
from emitters.numerics.value_types import Array
from emitters.tensor_io.read import Source, file_facts
from policy_dsl.inventory import TensorInfo, tensor_nbytes
from policy_dsl.plan import PlannedTensor
from policy_dsl.planning.layout import header_bytes, in_file_order
from policy_dsl.sources.safetensors_header import LENGTH_NBYTES, header_nbytes, parse_header

SIDECAR = "jangtq_runtime.safetensors"
# Width of rows and bits of a code.
Code = tuple[int, int]


def sidecar(codes: Iterable[Code]) -> bytes:
    """The file for a bundle with these codes, as the safetensors library would write it."""
    tables = _tables(codes)
    tensors = []
    for name, table in tables.items():
        size = tensor_nbytes("F32", table.shape)
        tensors.append(PlannedTensor(name, "", "F32", table.shape, size, SIDECAR, 0))
    return header_bytes(tensors, {}) + b"".join(
        _stored(tables[tensor.name]) for tensor in in_file_order(tensors)
    )


def wrong_tables(folder: Path, codes: Iterable[Code]) -> Iterator[str]:
    """What the file of a bundle with these codes lacks or holds wrongly.

    Raises: PolicyError if it cannot be read, or is no safetensors file.
    """
    source = Source(folder, file_facts(folder, [SIDECAR]))
    held = _header(source)
    for name, table in _tables(codes).items():
        tensor = held.get(name)
        if tensor is None:
            yield f"it has no {name}"
        elif (tensor.dtype, tensor.shape) != ("F32", table.shape):
            yield f"{name} is {tensor.dtype} {list(tensor.shape)}, not F32 {list(table.shape)}"
        elif source.read(SIDECAR, tensor.start, tensor.nbytes).tobytes() != _stored(table):
            yield f"{name} does not hold the values that the codes were made with"


def _tables(codes: Iterable[Code]) -> Mapping[str, Array]:
    tables = {}
    for columns, bits in sorted(set(codes)):
        tables[f"signs.{columns}.{SEED}"] = signs(columns, SEED)
        tables[f"codebook.{columns}.{bits}"] = codebook(columns, bits)
    return tables


def _stored(table: Array) -> bytes:
    return table.astype("<f4").tobytes()


def _header(source: Source) -> dict[str, TensorInfo]:
    size = source.facts[SIDECAR].nbytes
    prefix = source.read(SIDECAR, 0, min(size, LENGTH_NBYTES)).tobytes()
    length = header_nbytes(prefix, file=SIDECAR, file_nbytes=size)
    header = source.read(SIDECAR, LENGTH_NBYTES, length).tobytes()
    return parse_header(header, file=SIDECAR, file_nbytes=size)
