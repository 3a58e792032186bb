"""A written bundle compared with its plan, read by code that did not write it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from emitters.core.bundle import tensor_files
from emitters.core.interface import Emitter, forms_of
from emitters.core.record import record_schema
from emitters.tensor_io.shards import writing
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Plan
from policy_dsl.planning.fill import describe
from policy_dsl.policy import Treatment
from policy_dsl.sources.hfq_container import HEADER_NBYTES, MAGIC, parse_container
from policy_dsl.sources.hfq_container import header_nbytes as hfq_header_nbytes
from policy_dsl.sources.safetensors_header import LENGTH_NBYTES, header_nbytes, parse_header

# One wrong offset makes every tensor after it wrong.
_MOST_FINDINGS = 20


def check_bundle(plan: Plan, emitter: Emitter, folder: Path) -> None:
    """Raises: PolicyError unless the written headers and metadata are what the plan says.

    The headers hold exactly the planned tensors at their places, and for each module their
    shapes are those of the widths that a reader takes from the written metadata files.
    """
    written: dict[str, TensorInfo] = {}
    for file in tensor_files(plan):
        written.update(read_header(folder / file.name))
    _refuse(_tensor_defects(plan, written))
    names = [file.name for file in plan.files if file.kind == "metadata"]
    forms = forms_of({name: (found.dtype, found.shape) for name, found in written.items()})
    with writing(folder):
        files = {name: (folder / name).read_bytes() for name in names}
    claims = {name: claim.treatment for name, claim in emitter.claims(files, forms).items()}
    _refuse(_width_defects(plan, emitter, claims, written))


def check_record(document: Mapping[str, Any]) -> None:
    """Raises: PolicyError if a record is not what the published schema says."""
    defects = Draft202012Validator(record_schema()).iter_errors(document)
    _refuse(_wrong(f"record: {defect.json_path}: {defect.message}") for defect in defects)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file or of a container, by name.

    Raises: PolicyError if it cannot be read or is no whole file of either kind.
    """
    with writing(path), path.open("rb") as opened:
        size = path.stat().st_size
        prefix = opened.read(HEADER_NBYTES)
        if prefix.startswith(MAGIC):
            more = hfq_header_nbytes(prefix, file=path.name, file_nbytes=size) - len(prefix)
            header = prefix + opened.read(more)
            held = parse_container(header, file=path.name, file_nbytes=size)
            return {name: tensor.info for name, tensor in held.tensors.items()}
        opened.seek(LENGTH_NBYTES)
        header = opened.read(header_nbytes(prefix, file=path.name, file_nbytes=size))
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


def _width_defects(
    plan: Plan,
    emitter: Emitter,
    claims: Mapping[str, Treatment],
    written: Mapping[str, TensorInfo],
) -> Iterator[Diagnostic]:
    quantized = {
        module.name: module for module in plan.modules if module.treatment.action == "quantize"
    }
    for name in sorted(claims.keys() ^ quantized.keys()):
        yield _wrong(f"{name} is quantized, or the metadata says so, but not both")
    for name in claims.keys() & quantized.keys():
        claimed, module = claims[name], quantized[name]
        # The shapes of a width differ from those of any other, given the logical shape.
        parts = emitter.spec.part_shapes(claimed, module.shape, module.dtype)
        found = [written[tensor.name].shape for tensor in module.tensors]
        if found != [part.shape for part in parts] or claimed.scheme != module.treatment.scheme:
            yield diagnostic(
                "width-disagrees", module=name, found=found, written=describe(claimed)
            )


def _wrong(reason: str) -> Diagnostic:
    return diagnostic("wrong-result", reason=reason)


def _refuse(found: Iterable[Diagnostic]) -> None:
    some = list(islice(found, _MOST_FINDINGS))
    if some:
        raise PolicyError(some)
