"""Statistics of a model's inputs, read once at the start of a build, and what they decide."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

from emitters.numerics.value_types import Array
from emitters.tensor_io.read import CHANGED, FileFacts, Source, file_facts
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.formats import Context, Format, Solver
from policy_dsl.plan import Module, Plan, StatisticsFile, coded_modules
from policy_dsl.roles.published_names import expert_of
from policy_dsl.sources.local_files import located
from policy_dsl.treatments import Coded, coded, describe

if TYPE_CHECKING:
    from emitters.tensor_io.imatrix import Imatrix, InputSums

_MOST_KEPT = 8
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


class Lookup:
    """What an importance matrix says about the matrices of a plan, read when it is asked for.

    The entries of the last few roles and layers are kept. Many threads may share it.
    """

    def __init__(self, plan: Plan, imatrix: Imatrix) -> None:
        self._plan, self._imatrix = plan, imatrix
        # One entry holds all experts of a layer: read once for all of them.
        self._entry = lru_cache(maxsize=4)(self._read)
        self._made: OrderedDict[object, Array] = OrderedDict()
        self._lock = Lock()

    def of_matrix(self, module: Module, source: int) -> InputSums:
        """Of the one matrix that is a module's source of this index."""
        expert = expert_of(module.name)
        if expert is None and len(module.shape) > 2:
            expert = source
        without = describe(replace(coded(module.treatment), method=""))
        count = 1 if expert is None else self._plan.source_experts
        what = module.role, module.layer, module.shape[-1], count, f"{without} by rtn"
        # The file is about the model as it was before experts were pruned.
        number = 0 if expert is None else self._plan.old_experts(module.layer)[expert]
        return self._entry(*what).of([number])

    def of_layer(self, role: str, module: Module) -> InputSums:
        """Of all matrices of a role in a module's layer; the experts that stay, in their order."""
        what = role, module.layer, module.shape[-1], self._plan.source_experts
        return self._entry(*what, "").of(self._plan.old_experts(module.layer))

    def once(self, key: object, made: Callable[[], Array]) -> Array:
        """What is made for this key; the last few are kept."""
        with self._lock:
            if key not in self._made:
                self._made[key] = made()
            if len(self._made) > _MOST_KEPT:
                self._made.popitem(last=False)
            return self._made[key]

    def unusable(self, module: Module, reason: str, cure: str) -> PolicyError:
        """The error of an entry that is well formed and that a method cannot take."""
        path, facts = str(self._imatrix.path), {"entry": module.name, "reason": reason}
        return fail("bad-imatrix-entry", self._imatrix.span, path=path, suggestion=cure, **facts)

    def _read(
        self, role: str, layer: int | None, columns: int, n_matrices: int, instead: str
    ) -> InputSums:
        return self._imatrix.sums(
            role, layer, n_matrices=n_matrices, columns=columns, instead=instead
        )


class Contexts:
    """What methods compute once for a matrix, made when it is asked for, and not kept.

    statistics: None where none are given; then the codec's own encoder chooses codes.
    """

    def __init__(self, plan: Plan, format: Format, statistics: Lookup | None) -> None:
        self._plan, self._format, self._statistics = plan, format, statistics

    def of(self, module: int, source: int) -> Context:
        """The context of a source of a module, both by their indices.

        Raises: PolicyError if the statistics are not those of this model, or cannot be used.
        """
        planned = self._plan.modules[module]
        solver = self._solver(planned)
        if solver is None or self._statistics is None:
            return Context(self._format.codec().encode)
        return solver.context(self._plan, planned, source, self._statistics)

    def check(self) -> None:
        """Raises: PolicyError as `of` does, for the first matrix that it does for."""
        for at, module in enumerate(self._plan.modules):
            for source in range(len(module.sources) if self._solver(module) else 0):
                self.of(at, source)

    def _solver(self, module: Module) -> Solver | None:
        if not isinstance(module.treatment, Coded):
            return None
        method = self._format.methods.get(module.treatment.method)
        return method.solver() if method and method.solver else None


def prepare(plan: Plan, format: Format) -> tuple[Plan, Contexts]:
    """The plan with the bytes that statistics decide, and the contexts of its matrices.

    Its files of statistics have their digests then.
    Raises: PolicyError if a file of statistics cannot be read, is another model's, or is not
    what it was when the plan was made.
    """
    _ensure_same(plan)
    opened = {file.name: _opened(file) for file in _to_read(plan)}
    if not opened:
        return plan, Contexts(plan, format, None)
    statistics = Lookup(plan, opened["imatrix"])
    contents: dict[str, bytes] = {}
    used = {how.method for _, how in coded_modules(plan.modules)}
    for name, method in format.methods.items():
        solver = method.solver() if method.solver and name in used else None
        if solver is not None and solver.contents is not None:
            contents |= solver.contents(plan, statistics)
    # Before anything is written: an entry that is missing must not stop a build half-way.
    Contexts(plan, format, statistics).check()
    plan = replace(
        plan,
        modules=tuple(_filled(module, contents) for module in plan.modules),
        statistics=tuple(
            _with_digest(file, opened[file.name]) if file.name in opened else file
            for file in plan.statistics
        ),
    )
    return plan, Contexts(plan, format, statistics)


def _with_digest(file: StatisticsFile, opened: Imatrix) -> StatisticsFile:
    return replace(file, sha256=_sha256(opened.source, opened.path.name))


def _to_read(plan: Plan) -> list[StatisticsFile]:
    return [file for file in plan.statistics if file.name in _READ_HERE]


def _opened(file: StatisticsFile) -> Imatrix:
    # Late: most builds read no statistics.
    from emitters.tensor_io.imatrix import open_imatrix  # noqa: PLC0415

    found = open_imatrix(located(file.path, file.span), file.span)
    if file.state not in (None, _facts(found)):
        raise _changed(file)
    return found


def _ensure_same(plan: Plan) -> None:
    """Raises: PolicyError if a file that decided the plan is another one now."""
    for file in plan.statistics:
        if not file.sha256 or file.name in _READ_HERE:
            continue
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
        tensor._replace(tail=contents.get(tensor.name, tensor.tail)) for tensor in module.tensors
    )
    return replace(module, tensors=tensors)


def _sha256(source: Source, name: str) -> str:
    """The digest of a file that is still the one whose facts are known."""
    digest, nbytes = hashlib.sha256(), source.facts[name].nbytes
    for start in range(0, nbytes, _CHUNK_NBYTES):
        count = min(_CHUNK_NBYTES, nbytes - start)
        digest.update(source.read(name, start, count).data)
    return digest.hexdigest()
