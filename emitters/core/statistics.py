"""Statistics of a model's inputs, read once at the start of a build, and what they decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from hashlib import sha256
from threading import Lock
from typing import TYPE_CHECKING

from emitters.numerics import Array
from emitters.tensor_io.files import CHANGED, FileFacts, Source, file_facts
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
    files = _with(plan, file, replace(file, state=_facts(imatrix)))
    return replace(plan, findings=(*plan.findings, *imatrix.findings), statistics=files)


def prepare(plan: Plan, format: Format) -> tuple[Plan, Contexts | None]:
    """The plan with the bytes that statistics decide, and the contexts of its matrices.

    Its files of statistics have their digests then. Without statistics there are no contexts:
    the codec's own encoder chooses codes.
    Raises: PolicyError if a file of statistics cannot be read, is another model's, or is not
    what it was when the plan was made.
    """
    _ensure_same(plan)
    file = _file_read(plan)
    if file is None:
        return plan, None
    imatrix = _opened(file)
    statistics, solvers = Lookup(plan, imatrix), _solvers(plan, format)
    contents: dict[str, bytes] = {}
    for solver in solvers.values():
        contents |= solver.contents(plan, statistics) if solver.contents else {}
    # Before anything is written: an entry that is missing must not stop a build half-way.
    for at, module in enumerate(plan.modules):
        for source in range(len(module.sources)):
            _context(plan, solvers, statistics, at, source)
    modules = tuple(_filled(module, contents) for module in plan.modules)
    digest = _sha256(imatrix.source, imatrix.path.name)
    files = _with(plan, file, replace(file, sha256=digest))
    plan = replace(plan, modules=modules, statistics=files)
    return plan, partial(_context, plan, solvers, statistics)


class Lookup:
    """What an importance matrix says about the matrices of a plan, read when it is asked for.

    The entries of the last few roles and layers are kept. Many threads may share it.
    """

    def __init__(self, plan: Plan, imatrix: Imatrix) -> None:
        self._plan, self._imatrix = plan, imatrix
        # One entry holds all experts of a layer: read once for all of them.
        self._sums = lru_cache(maxsize=4)(imatrix.sums)
        self._made: dict[object, Array] = {}
        self._lock = Lock()

    def of_matrix(self, module: Module, source: int) -> InputSums:
        """Of the one matrix that is a module's source of this index."""
        expert = expert_of(module.name)
        if expert is None and len(module.shape) > 2:
            expert = source
        without = describe(replace(coded(module.treatment), method=""))
        n_matrices = 1 if expert is None else self._plan.source_experts
        # The file is about the model as it was before experts were pruned.
        number = 0 if expert is None else self._plan.old_experts(module.layer)[expert]
        return self._entry(module.role, module, n_matrices, f"{without} by rtn").of([number])

    def of_layer(self, role: str, module: Module) -> InputSums:
        """Of all matrices of a role in a module's layer; the experts that stay, in their order."""
        entry = self._entry(role, module, self._plan.source_experts, "")
        return entry.of(self._plan.old_experts(module.layer))

    def _entry(self, role: str, module: Module, n_matrices: int, instead: str) -> InputSums:
        columns = module.shape[-1]
        return self._sums(
            role, module.layer, n_matrices=n_matrices, columns=columns, instead=instead
        )

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


def _solvers(plan: Plan, format: Format) -> dict[str, Solver]:
    used = {how.method for _, how in coded_modules(plan.modules)}
    methods = ((name, format.methods[name].solver) for name in format.methods if name in used)
    return {name: solver() for name, solver in methods if solver}


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


def _with(plan: Plan, old: StatisticsFile, new: StatisticsFile) -> tuple[StatisticsFile, ...]:
    return tuple(new if file is old else file for file in plan.statistics)


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
        if file.sha256 and file.name != _READ_HERE:
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
    return module._replace(tensors=tensors)


def _sha256(source: Source, name: str) -> str:
    """The digest of a file that is still the one whose facts are known."""
    digest = sha256()
    for piece in source.pieces(name):
        digest.update(piece)
    return digest.hexdigest()
