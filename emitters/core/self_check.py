"""A written bundle compared with its plan, read by code that did not write it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from emitters.core.bundle import tensor_files
from emitters.core.bundle_reading import open_bundle
from emitters.core.record import record_of
from emitters.core.verify import written_stages
from policy_dsl.diagnostics import (
    Diagnostic,
    DiskError,
    PermanentError,
    PolicyError,
    diagnostic,
    errors,
)
from policy_dsl.formats import Format
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Plan
from policy_dsl.planning.record import RECORD, UNKNOWN_HASH, record_document
from policy_dsl.regular_files import opened
from policy_dsl.sources.checkpoint import HFQ_MAGIC
from policy_dsl.sources.hfq_container import HEADER_NBYTES, parse_container
from policy_dsl.sources.hfq_container import header_nbytes as hfq_header_nbytes
from policy_dsl.sources.safetensors_header import LENGTH_NBYTES, header_nbytes, parse_header

# One wrong offset makes every tensor after it wrong.
_MOST_FINDINGS = 20


def check_bundle(plan: Plan, folder: Path, format: Format) -> None:
    """Raises: PermanentError unless the written bundle is planned and sound.

    The headers hold exactly the planned tensors at their places, and nothing that `verify`
    looks at, hashes and values aside, is wrong.
    """
    written: dict[str, TensorInfo] = {}
    sizes = {file.name: (file.nbytes or 0, UNKNOWN_HASH) for file in plan.files}
    sizes.pop(RECORD, None)
    try:
        for file in tensor_files(plan):
            written.update(read_header(folder / file.name))
        _refuse(_tensor_defects(plan, written))
        hashes = dict.fromkeys(written, UNKNOWN_HASH)
        document = record_document(plan, files=sizes, tensors=hashes)
        bundle = open_bundle(folder, record_of(document), formats={format.name: format})
    except DiskError:
        raise
    except PolicyError as error:
        raise PermanentError(error.diagnostics) from error
    _refuse(errors([found for stage in written_stages(bundle) for found in stage.findings]))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file or of a container, by name.

    Raises: PolicyError if it cannot be read or is no whole file of either kind.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(HEADER_NBYTES)
        if prefix.startswith(HFQ_MAGIC):
            more = hfq_header_nbytes(prefix, file=path.name, file_nbytes=size) - len(prefix)
            header = prefix + file.read(more)
            held = parse_container(header, file=path.name, file_nbytes=size)
            return {name: tensor.info for name, tensor in held.tensors.items()}
        file.seek(LENGTH_NBYTES)
        header = file.read(header_nbytes(prefix, file=path.name, file_nbytes=size))
    return parse_header(header, file=path.name, file_nbytes=size)


def _tensor_defects(plan: Plan, written: Mapping[str, TensorInfo]) -> Iterator[Diagnostic]:
    planned = {tensor.name: tensor for module in plan.modules for tensor in module.tensors}
    for name in sorted(written.keys() - planned.keys()):
        yield _wrong(f"{name} is one tensor too many")
    for name, tensor in planned.items():
        found = written.get(name)
        wanted = (tensor.dtype, tensor.shape, tensor.nbytes, tensor.file, tensor.start)
        if found is None:
            yield _wrong(f"{name} is missing")
        elif (found.dtype, found.shape, found.nbytes, found.file, found.start) != wanted:
            yield _wrong(f"{name} is not where or what it should be")


def _wrong(reason: str) -> Diagnostic:
    return diagnostic("wrong-result", reason=reason)


def _refuse(found: Iterable[Diagnostic]) -> None:
    some = list(islice(found, _MOST_FINDINGS))
    if some:
        raise PermanentError(some)
