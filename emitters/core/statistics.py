"""Statistics of a model's inputs, read once at the start of a build, and what they decide."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from emitters.tensor_io.imatrix import Imatrix, open_imatrix
from emitters.tensor_io.prepared import Prepared, Statistics
from emitters.tensor_io.read import CHANGED, FileFacts, Source, file_facts
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.formats import Format
from policy_dsl.plan import Module, Plan, StatisticsFile
from policy_dsl.sources.local_files import located

_CHUNK_NBYTES = 4 * 2**20
# The statistics that a build reads; others decide the plan, and are read before it is made.
_READ_HERE = frozenset({"imatrix"})


def with_statistics(plan: Plan) -> Plan:
    """The plan with warnings about its files of statistics, from their headers.

    A file that a policy names may be missing: a plan needs none.
    Raises: PolicyError if one cannot be read, or the command line named it and it is not there.
    """
    opened = {
        file.name: _opened(file)
        for file in _to_read(plan)
        if file.span is None or located(file.path, file.span).exists()
    }
    findings = tuple(found for imatrix in opened.values() for found in imatrix.findings)
    states = {name: _facts(imatrix) for name, imatrix in opened.items()}
    return replace(
        plan,
        findings=(*plan.findings, *findings),
        statistics=tuple(replace(file, state=states.get(file.name)) for file in plan.statistics),
    )


def prepare(plan: Plan, format: Format) -> tuple[Plan, Prepared]:
    """The plan with the bytes that statistics decide, and the scales of columns.

    Its files of statistics have their digests then.
    Raises: PolicyError if a file of statistics cannot be read, is another model's, or is not
    what it was when the plan was made.
    """
    _ensure_same(plan)
    opened = {file.name: _opened(file) for file in _to_read(plan)}
    if not opened or format.prepare is None:
        return plan, Prepared.nothing()
    prepared: Prepared = format.prepare(plan, Statistics(**opened))
    return replace(
        plan,
        modules=tuple(_filled(module, prepared.contents) for module in plan.modules),
        statistics=tuple(
            _with_digest(file, opened[file.name]) if file.name in opened else file
            for file in plan.statistics
        ),
    ), prepared


def _with_digest(file: StatisticsFile, opened: Imatrix) -> StatisticsFile:
    return replace(file, sha256=_sha256(opened.source, opened.path.name))


def _to_read(plan: Plan) -> list[StatisticsFile]:
    return [file for file in plan.statistics if file.name in _READ_HERE]


def _opened(file: StatisticsFile) -> Imatrix:
    found = open_imatrix(located(file.path, file.span), file.span)
    if file.state not in (None, _facts(found)):
        raise _changed(file)
    return found


def _ensure_same(plan: Plan) -> None:
    """Raises: PolicyError if a file that decided the plan is another one now."""
    for file in plan.statistics:
        if file.sha256 and file.name not in _READ_HERE:
            path = located(file.path, file.span)
            facts = file_facts(path.parent, [path.name])
            if _sha256(Source(path.parent, facts), path.name) != file.sha256:
                raise _changed(file)


def _changed(file: StatisticsFile) -> PolicyError:
    reason = f"the plan was made with another {file.name}"
    path = file.path
    return fail("source-changed", file.span, suggestion=CHANGED, file=path, reason=reason)


def _facts(imatrix: Imatrix) -> FileFacts:
    return imatrix.source.facts[imatrix.path.name]


def _filled(module: Module, contents: Mapping[str, bytes]) -> Module:
    """The module with the contents that were decided now, which then are constants of it."""
    if not any(tensor.name in contents for tensor in module.tensors):
        return module
    tensors = tuple(
        replace(tensor, tail=contents.get(tensor.name, tensor.tail)) for tensor in module.tensors
    )
    return replace(module, tensors=tensors)


def _sha256(source: Source, name: str) -> str:
    """The digest of a file that is still the one whose facts are known."""
    digest, nbytes = hashlib.sha256(), source.facts[name].nbytes
    for start in range(0, nbytes, _CHUNK_NBYTES):
        count = min(_CHUNK_NBYTES, nbytes - start)
        digest.update(source.read(name, start, count).data)
    return digest.hexdigest()
