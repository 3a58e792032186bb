"""Decisions -> output modules: treatments made whole, tensors grouped to stacks of experts."""

import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from math import prod

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Format
from policy_dsl.inventory import tensor_nbytes
from policy_dsl.plan import Module, Omission, PlannedTensor
from policy_dsl.planning.decisions import Decision
from policy_dsl.planning.fill import Filling, Settled, Unheld
from policy_dsl.planning.matching import is_guarded
from policy_dsl.policy import Policy
from policy_dsl.roles.model import BY_EXPERT, Model
from policy_dsl.treatments import Stored, scheme_of

_DIGITS = re.compile(r"([0-9]+)")
# Tensors of one output module, each with what is stored of it.
_Stack = Sequence[tuple[Decision, Settled]]


def lower(
    made: Iterable[Decision], model: Model, policy: Policy, format: Format
) -> tuple[list[Module], list[Omission], list[Diagnostic]]:
    """The modules of the output in natural order, not placed yet; what is left out; findings."""
    filling, stacking = Filling(policy.defaults, model, format), _Stacking(policy, model, format)
    modules: list[Module] = []
    omitted: list[Omission] = []
    stacks: dict[str, list[tuple[Decision, Settled]]] = defaultdict(list)
    # One finding for a rule and defect, not one for each of its 15,000 experts.
    defects: dict[tuple[int | None, Diagnostic | Unheld], list[tuple[Decision, str]]]
    defects = defaultdict(list)
    broken: set[str] = set()
    for decision in made:
        if omission := _omission(decision, model, format):
            omitted.append(omission)
            continue
        tensor = decision.tensor
        settled, path = filling.settle(decision), format.spec.module_path(tensor, model)
        if isinstance(settled, Settled):
            stacks[path].append((decision, settled))
        else:
            what = f"tensor {tensor.source.name}"
            defects[decision.decided_by, settled].append((decision, what))
            broken.add(path)
    for path, stack in stacks.items():
        # The others of a stack would only be found to be too few.
        if path in broken:
            continue
        found = stacking.modules(path, stack)
        if isinstance(found, Diagnostic):
            first = stack[0][0]
            defects[first.decided_by, found].append((first, f"stack {path}"))
        else:
            modules += found
    for method in format.methods.values():
        modules += method.added(modules) if method.added else ()
    # Sorted, so that the bundle does not depend on the order of the source's shards.
    modules.sort(key=lambda module: list(map(_ordered, _DIGITS.split(module.name))))
    findings = [_finding(of, among, policy) for (_, of), among in defects.items()]
    findings += _namesakes(modules, format.spec.name)
    return modules, omitted, findings


def _namesakes(modules: Sequence[Module], target: str) -> Iterator[Diagnostic]:
    """Modules, in order, that a table of a family gives one name."""
    for one, after in pairwise(modules):
        if one.name == after.name:
            reason = f"two modules would be called {one.name}"
            yield diagnostic("conflict", target=target, reason=reason, of=one.name)


@cache
def _ordered(piece: str) -> tuple[int, str, str]:
    """A sort key of a piece of a name, by which 2 precedes 10."""
    # Compared as texts: a name may hold more digits than Python makes a number of.
    digits = piece.lstrip("0") if "0" <= piece[:1] <= "9" else ""
    return len(digits), digits, piece


def _omission(decision: Decision, model: Model, format: Format) -> Omission | None:
    tensor, dropped = decision.tensor, decision.written.action == "drop"
    # The author's own decision is the better reason where the format would drop it too.
    own = f"dropped by {decision.origin}" if dropped else None
    reason = own or format.review.left_out(tensor, model)
    if reason is None:
        return None
    # Whoever drops a head knows of it; else readers must get its values from the embedding.
    embedding = model.embedding if tensor.role == "lm_head" and not dropped else None
    equals = embedding.source.name if embedding else ""
    return Omission(tensor.source, tensor.role, tensor.layer, reason, equals=equals)


def _finding(
    of: Diagnostic | Unheld, among: Sequence[tuple[Decision, str]], policy: Policy
) -> Diagnostic:
    """What is wrong with all these, at the treatment that is to blame, with an example."""
    decision, example = among[0]
    if isinstance(of, Unheld):
        of = of.of(list(dict.fromkeys(one.tensor.role for one, _ in among)))
    otherwise = policy.key_spans.get("defaults.otherwise")
    span = None if is_guarded(decision.tensor) else otherwise
    if decision.rule is not None:
        # The selector was right if it got here: the caret belongs under the treatment.
        span = decision.rule.treatment_span or decision.rule.span
    more = f" and {len(among) - 1} more" if len(among) > 1 else ""
    return replace(of, span=span, notes=(*of.notes, f"{example}{more}"))


class _Stacking:
    """How a bundle holds experts: in stacks, or apart, and with some that no source has."""

    def __init__(self, policy: Policy, model: Model, format: Format) -> None:
        self._spec = format.spec
        self._apart = self._spec.layouts.get(self._spec.layout(policy))
        self._count = model.n_experts
        self._padding = self._spec.padding.get(model.architecture.family)
        wanted = self._padding is not None and policy.output.pad_experts is not False
        self._added = self._padding.added(self._count) if self._padding and wanted else 0
        self._known: dict[tuple[Stored, tuple[int, ...], str], tuple[list[PlannedTensor], int]] = {}

    def modules(self, path: str, stack: _Stack) -> Sequence[Module] | Diagnostic:
        """The modules of a stack or a single tensor, not placed yet; or what is wrong."""
        # Expert 10 comes before expert 2 in files that sort their names.
        stack = sorted(stack, key=lambda one: one[0].tensor.order)
        tensor, treatment = stack[0][0].tensor, stack[0][1].treatment
        if tensor.place is not None:
            return self._joined(path, stack)
        if tensor.expert is None and len(stack) > 1:
            return self._alike(path, stack)
        if tensor.expert is None:
            added = self._added if tensor.role in BY_EXPERT else 0
            return [self._module(path, stack, tensor.shape, added)]
        # Also where experts lie apart: readers stack them after loading.
        if (defect := self._defect(stack)) is not None:
            return defect
        if self._apart is None or (scheme_of(treatment) or None) not in self._apart.schemes:
            # A stack of one expert has the expert axis too: readers index it.
            return [self._module(path, stack, (self._count, *tensor.shape), self._added)]
        return list(self._each(self._apart.path, path, stack))

    def _alike(self, path: str, stack: _Stack) -> Diagnostic:
        names = " and ".join(one.tensor.source.name for one, _ in stack[:2])
        reason = f"{names} would both be called {path}"
        return diagnostic("conflict", target=self._spec.name, reason=reason)

    def _joined(self, path: str, stack: _Stack) -> Sequence[Module] | Diagnostic:
        """The module that holds the rows of all, one tensor below the other."""
        if (defect := self._uneven(stack, first_axis=1)) is not None:
            return defect
        rows, rest = sum(one.tensor.shape[0] for one, _ in stack), stack[0][0].tensor.shape[1:]
        return [self._module(path, stack, (rows, *rest), 0)]

    def _defect(self, stack: _Stack) -> Diagnostic | None:
        if (defect := self._uneven(stack)) is not None:
            return defect
        if len(stack) != self._count:
            return diagnostic("partial-stack", kept=len(stack), count=self._count)
        return None

    def _uneven(self, stack: _Stack, first_axis: int = 0) -> Diagnostic | None:
        """What is different among tensors that are to be one; shapes from this axis on."""
        decision, settled = stack[0]
        shape = decision.tensor.shape
        for other, stored in stack[1:]:
            if stored != settled:
                notes = [f"decided by {decision.origin} and {other.origin}"]
                return diagnostic("mixed-stack", notes=notes, one=settled.text, other=stored.text)
            if other.tensor.shape[first_axis:] != shape[first_axis:]:
                return diagnostic("uneven-stack", one=list(shape), other=list(other.tensor.shape))
        return None

    def _each(self, name: Callable[[str, int], str], path: str, stack: _Stack) -> Iterator[Module]:
        rows, *rest = stack[0][0].tensor.shape
        for number, one in enumerate(stack):
            yield self._module(name(path, number), [one], (rows, *rest), 0)
        for number in range(self._count, self._count + self._added):
            # Nothing but added rows.
            module = self._module(name(path, number), stack[:1], (0, *rest), rows)
            yield module._replace(sources=())

    def _module(self, path: str, stack: _Stack, shape: tuple[int, ...], added: int) -> Module:
        """The module of a stack of this shape, to which `added` of the first axis come."""
        (decision, (treatment, dtype, action)), tensor = stack[0], stack[0][0].tensor
        padded = (shape[0] + added, *shape[1:]) if added else shape
        parts, together = self._parts(treatment, padded, dtype)
        tail = b""
        if self._padding is not None and tensor.role == "router_bias":
            tail = _stored(self._padding.router_bias, dtype) * added
        # A parameter that no module holds, such as a router's bias, has no part to append.
        name, own = tensor.called or tensor.source.name, path
        if tensor.expert is None and not tensor.called:
            name, own = name.rpartition(".")[2], own.rpartition(".")[2]
        names = [path if own == name else f"{path}.{one.part}" for one in parts]
        named = zip(names, parts, strict=True)
        return Module(
            *(path, tensor.role, tensor.layer, treatment, padded, dtype),
            sources=tuple([view for one, _ in stack for view in one.tensor.views]),
            tensors=tuple([PlannedTensor(n, *one[1:-1], one.tail or tail) for n, one in named]),
            parameters=prod(shape),
            added=added,
            together=together,
            decided_by=decision.decided_by,
            written=action,
        )

    def _parts(
        self, treatment: Stored, shape: tuple[int, ...], dtype: str
    ) -> tuple[list[PlannedTensor], int]:
        """The tensors of a module without their names, and the rows that are coded as one."""
        # A hundred thousand modules are of a handful of kinds.
        key = treatment, shape, dtype
        if key not in self._known:
            parts = self._spec.part_shapes(treatment, shape, dtype)
            unnamed = []
            for one in parts:
                size = tensor_nbytes(one.dtype, one.shape) if one.nbytes is None else one.nbytes
                form = one.part, one.dtype, one.shape, size, "", 0, one.order == "columns"
                unnamed.append(PlannedTensor("", *form, one.constant))
            self._known[key] = unnamed, parts[0].together
        return self._known[key]


def _stored(value: float, dtype: str) -> bytes:
    """A value as its bytes in F32, F16 or BF16, cut off where BF16 cannot hold it."""
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack("<e" if dtype == "F16" else "<f", value)
