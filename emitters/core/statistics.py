"""Statistics of a model's inputs, read once at the start of a build, and what they decide."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from emitters import get
from emitters.core.interface import Prepared, Statistics
from emitters.tensor_io.imatrix import Imatrix, open_imatrix
from policy_dsl.diagnostics import Diagnostic
from policy_dsl.plan import Module, Plan, StatisticsFile
from policy_dsl.sources.local_files import located

_CHUNK_NBYTES = 4 * 2**20
# The statistics that a build reads; others decide the plan, and are read before it is made.
_READ_HERE = frozenset({"imatrix"})


def statistics_findings(plan: Plan) -> tuple[Diagnostic, ...]:
    """Warnings about the files of statistics, from their headers.

    A file that a policy names may be missing: a plan needs none.
    Raises: PolicyError if one cannot be read, or the command line named it and it is not there.
    """
    files = [
        one
        for one in _to_read(plan)
        if one.span is None or located(one.path, one.span).exists()
    ]
    return tuple(found for file in files for found in _opened(file).findings)


def prepare(plan: Plan) -> tuple[Plan, Prepared]:
    """The plan with the bytes that statistics decide, and the scales of columns.

    Its files of statistics have their digests then.
    Raises: PolicyError if a file of statistics cannot be read or is another model's.
    """
    opened = {file.name: _opened(file) for file in _to_read(plan)}
    if not opened:
        return plan, Prepared.nothing()
    prepared = get(plan.target).prepare(plan, Statistics(**opened))
    return replace(
        plan,
        modules=tuple(_filled(module, prepared.contents) for module in plan.modules),
        statistics=tuple(
            replace(file, sha256=_sha256(opened[file.name])) if file.name in opened else file
            for file in plan.statistics
        ),
    ), prepared


def _to_read(plan: Plan) -> list[StatisticsFile]:
    return [file for file in plan.statistics if file.name in _READ_HERE]


def _opened(file: StatisticsFile) -> Imatrix:
    return open_imatrix(located(file.path, file.span), file.span)


def _filled(module: Module, contents: Mapping[str, bytes]) -> Module:
    """The module with the contents that were decided now, which then are constants of it."""
    if not any(tensor.name in contents for tensor in module.tensors):
        return module
    tensors = tuple(
        replace(tensor, tail=contents.get(tensor.name, tensor.tail))
        for tensor in module.tensors
    )
    return replace(module, tensors=tensors)


def _sha256(imatrix: Imatrix) -> str:
    """The digest of a file that is still the one whose sums were read."""
    digest, name = hashlib.sha256(), imatrix.path.name
    nbytes = imatrix.source.facts[name].nbytes
    for start in range(0, nbytes, _CHUNK_NBYTES):
        count = min(_CHUNK_NBYTES, nbytes - start)
        digest.update(imatrix.source.read(name, start, count).data)
    return digest.hexdigest()
