"""Statistics of a model's inputs, read once at the start of a build, and what they decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import sha256
from threading import Lock
from typing import TYPE_CHECKING, Any

from emitters.numerics import Array
from emitters.tensor_io.files import CHANGED, Source, file_facts
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.formats import Context, Format, Solver
from policy_dsl.plan import Module, Plan, StatisticsFile, coded_modules
from policy_dsl.roles.model import expert_of
from policy_dsl.sources.local_files import located
from policy_dsl.treatments import Coded, coded, describe

if TYPE_CHECKING:
    from emitters.core.work_units import Contexts
    from emitters.tensor_io.imatrix import Imatrix, InputSums

_MOST_KEPT = 8
# The statistics that a build reads; others decide the plan, and are read before it is made.
_READ_HERE = "imatrix"


def with_statistics(plan: Plan) -> Plan:
    """The plan with warnings about its importance matrix, from the file's header.

    A file that a policy names may be missing: a plan needs none.
    Raises: PolicyError if it cannot be read, or the command line named it and it is not there.
    """
    file = _file_read(plan)
    if file is None or (file.span is not None and not located(file.path, file.span).exists()):
        return plan
    imatrix = _opened(file)
    plan = _with(plan, file, state=imatrix.source.facts[imatrix.path.name])
    return replace(plan, findings=(*plan.findings, *imatrix.findings))


def prepare(plan: Plan, format: Format) -> tuple[Plan, Contexts | None]:
    """The plan with the bytes and digests that statistics decide, and the contexts of its matrices.

    Without statistics there are no contexts: the codec's own encoder chooses codes.
    Raises: PolicyError if a file of statistics cannot be read, is another model's, or is not
    what it was when the plan was made.
    """
    _ensure_same(plan)
    read = _file_read(plan)
    if read is None:
        return plan, None
    imatrix = _opened(read)
    used = {how.method for _, how in coded_modules(plan.modules)}
    methods = ((name, method.solver) for name, method in format.methods.items() if name in used)
    solvers = {name: solver() for name, solver in methods if solver}
    statistics, contents = Lookup(plan, imatrix), dict[str, bytes]()
    for solver in solvers.values():
        contents |= solver.contents(plan, statistics) if solver.contents else {}
    # Before anything is written: an entry that is missing must not stop a build half-way.
    for at, module in enumerate(plan.modules):
        for source in range(len(module.sources)):
            _context(plan, solvers, statistics, at, source)
    plan = replace(plan, modules=tuple(_filled(module, contents) for module in plan.modules))
    plan = _with(plan, read, sha256=_sha256(imatrix.source, imatrix.path.name))
    return plan, partial(_context, plan, solvers, statistics)


class Lookup:
    """What an importance matrix says about a plan's matrices, read on demand, from many threads."""

    def __init__(self, plan: Plan, imatrix: Imatrix) -> None:
        self._plan, self._imatrix = plan, imatrix
        # One entry holds all experts of a layer: read once for all of them.
        self._sums = lru_cache(maxsize=4)(imatrix.sums)
        self._made: dict[object, Array] = {}
        self._lock = Lock()

    def of_matrix(self, module: Module, source: int) -> Array:
        """float32 [in]: means, of the one matrix that is a module's source of this index."""
        expert = expert_of(module.name)
        if expert is None and len(module.shape) > 2:
            expert = source
        without = f"{describe(replace(coded(module.treatment), method=''))} by rtn"
        n_matrices, number = 1, 0
        if expert is not None:
            # The file is about the model as it was before experts were pruned.
            n_matrices = self._plan.source_experts
            number = self._plan.old_experts(module.layer)[expert]
        entry = self._entry(module.role, module, n_matrices, without)
        importance: Array = entry.of([number]).importance()[0]
        return importance

    def of_layer(self, role: str, module: Module) -> Array:
        """float32 [n_matrices, in]: sums, of the experts of a layer that stay, in their order."""
        entry = self._entry(role, module, self._plan.source_experts, "")
        return entry.of(self._plan.old_experts(module.layer)).sums

    def _entry(self, role: str, module: Module, count: int, instead: str) -> InputSums:
        columns = module.shape[-1]
        return self._sums(role, module.layer, n_matrices=count, columns=columns, instead=instead)

    def once(self, key: object, made: Callable[[], Array]) -> Array:
        """What is made for this key; the last few are kept."""
        with self._lock:
            if key not in self._made:
                self._made[key] = made()
            if len(self._made) > _MOST_KEPT:
                del self._made[next(iter(self._made))]
            return self._made[key]

    def unusable(self, module: Module, reason: str, cure: str) -> PolicyError:
        """The error of an entry that is well formed and that a method cannot take."""
        path, facts = str(self._imatrix.path), {"entry": module.name, "reason": reason}
        return fail("bad-imatrix-entry", self._imatrix.span, path=path, suggestion=cure, **facts)


def _context(
    plan: Plan, solvers: Mapping[str, Solver], statistics: Lookup, module: int, source: int
) -> Context | None:
    """What its method computes once for a source of a module. Raises: PolicyError if it cannot."""
    planned = plan.modules[module]
    method = planned.treatment.method if isinstance(planned.treatment, Coded) else ""
    solver = solvers.get(method)
    return solver.context(plan, planned, source, statistics) if solver else None


def _file_read(plan: Plan) -> StatisticsFile | None:
    return next((file for file in plan.statistics if file.name == _READ_HERE), None)


def _with(plan: Plan, old: StatisticsFile, **changes: Any) -> Plan:
    files = [replace(file, **changes) if file is old else file for file in plan.statistics]
    return replace(plan, statistics=tuple(files))


def _opened(file: StatisticsFile) -> Imatrix:
    # Late: most builds read no statistics.
    from emitters.tensor_io.imatrix import open_imatrix  # noqa: PLC0415

    found = open_imatrix(located(file.path, file.span), file.span)
    if file.state not in (None, found.source.facts[found.path.name]):
        raise _changed(file)
    return found


def _ensure_same(plan: Plan) -> None:
    """Raises: PolicyError if a file that decided the plan is another one now."""
    for file in plan.statistics:
        if file.sha256 and file.name != _READ_HERE:
            path = located(file.path, file.span)
            source = Source(path.parent, file_facts(path.parent, [path.name]))
            if _sha256(source, path.name) != file.sha256:
                raise _changed(file)


def _changed(file: StatisticsFile) -> PolicyError:
    reason, path = f"the plan was made with another {file.name}", file.path
    return fail("source-changed", file.span, suggestion=CHANGED, file=path, reason=reason)


def _filled(module: Module, contents: Mapping[str, bytes]) -> Module:
    """The module with the contents that were decided now, which then are constants of it."""
    if not any(tensor.name in contents for tensor in module.tensors):
        return module
    tensors = tuple(
        tensor._replace(tail=contents.get(tensor.name, tensor.tail)) for tensor in module.tensors
    )
    return module._replace(tensors=tensors)


def _sha256(source: Source, name: str) -> str:
    digest = sha256()
    for piece in source.pieces(name):
        digest.update(piece)
    return digest.hexdigest()
