"""Decisions -> output modules: treatments filled in, experts stacked, parts named and sized."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import FormatSpec, PartShape
from policy_dsl.inventory import tensor_nbytes
from policy_dsl.plan import Module, Omission, PlannedTensor, SourceRows
from policy_dsl.planning.decisions import Decision
from policy_dsl.planning.fill import PLAIN_WORDS, describe, fill, role_class
from policy_dsl.policy import PLAIN_DTYPES, Defaults, Treatment
from policy_dsl.roles.classify import Model, ModelTensor


@dataclass
class Lowered:
    """What lowering yields: modules without places, omissions, findings."""

    modules: list[Module] = field(default_factory=list)
    omitted: list[Omission] = field(default_factory=list)
    findings: list[Diagnostic] = field(default_factory=list)


@dataclass(frozen=True)
class _Settled:
    """A tensor whose treatment is whole; `dtype` is that of its values in the output."""

    tensor: ModelTensor
    decision: Decision
    treatment: Treatment
    dtype: str


def lower(
    made: Iterable[Decision], model: Model, defaults: Defaults, spec: FormatSpec
) -> Lowered:
    """The modules of the output in natural order of their names, not placed yet."""
    lowered = Lowered()
    defects = _Defects()
    stacks: dict[str, list[_Settled]] = {}
    filled: dict[tuple[Treatment, str], Treatment | Diagnostic] = {}
    for decision in made:
        tensor = decision.tensor
        reason = _omission(decision, model, spec)
        if reason is not None:
            lowered.omitted.append(Omission(tensor.source, tensor.role, tensor.layer, reason))
            continue
        # A hundred thousand tensors have a handful of treatments: each is filled in once.
        key = (decision.written, role_class(tensor))
        if key not in filled:
            filled[key] = fill(decision.written, key[1], defaults, spec)
        settled = _settle(decision, filled[key], model, spec)
        if isinstance(settled, Diagnostic):
            defects.add(decision, settled)
        else:
            stacks.setdefault(spec.module_path(tensor, model), []).append(settled)
    # Sorted, so that the bundle does not depend on the order of the source's shards.
    for path in sorted(stacks, key=natural_key):
        module = _module(path, stacks[path], spec)
        if isinstance(module, Diagnostic):
            defects.add(stacks[path][0].decision, module, what="stack", name=path)
        else:
            lowered.modules.append(module)
    lowered.findings = defects.findings()
    return lowered


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """A sort key in which layers.2 precedes layers.10."""
    pieces = re.split(r"(\d+)", name)
    return [(piece.isdigit(), int(piece) if piece.isdigit() else 0, piece) for piece in pieces]


class _Defects:
    """Findings about tensors, one a rule and code, with a count and an example."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str, str], tuple[Decision, Diagnostic, list[str]]] = {}

    def add(
        self, decision: Decision, found: Diagnostic, *, what: str = "tensor", name: str = ""
    ) -> None:
        # One finding for a rule, not one for each of its 15,000 experts.
        key = (id(decision.rule), found.code, found.message)
        entry = self._seen.setdefault(key, (decision, found, []))
        entry[2].append(f"{what} {name or decision.tensor.source.name}")

    def findings(self) -> list[Diagnostic]:
        return [_placed(*entry) for entry in self._seen.values()]


def _placed(decision: Decision, found: Diagnostic, names: list[str]) -> Diagnostic:
    rule = decision.rule.rule if decision.rule else None
    # The selector was right if it got here: the caret belongs under the treatment.
    span = (rule.treatment_span or rule.span) if rule else None
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return replace(found, span=span, notes=(*found.notes, f"{names[0]}{more}"))


def _omission(decision: Decision, model: Model, spec: FormatSpec) -> str | None:
    # The author's own decision is the better reason where the format would drop it too.
    if decision.written.action == "drop":
        return f"dropped by {decision.origin}"
    return spec.omission(decision.tensor, model)


def _settle(
    decision: Decision, filled: Treatment | Diagnostic, model: Model, spec: FormatSpec
) -> _Settled | Diagnostic:
    tensor = decision.tensor
    if isinstance(filled, Diagnostic):
        return filled
    # Before the layout is looked at: bytes that are copied are not read as rows.
    if filled.action == "raw":
        return _raw(decision, filled, spec)
    if tensor.transposed or tensor.row_step != 1:
        return diagnostic("unsupported-source-layout", target=spec.name, role=tensor.role)
    if filled.action == "cast":
        return _Settled(tensor, decision, filled, PLAIN_DTYPES[filled.dtype or ""])
    dtype = spec.plain_dtype(tensor, model)
    if filled.action == "keep":
        return _Settled(
            tensor, decision, replace(filled, dtype=PLAIN_WORDS.get(dtype, dtype)), dtype
        )
    return _not_quantizable(tensor, filled, model, spec) or _Settled(
        tensor, decision, filled, dtype
    )


def _raw(decision: Decision, filled: Treatment, spec: FormatSpec) -> _Settled | Diagnostic:
    source = decision.tensor.source
    if source.dtype not in spec.plain_dtypes:
        return diagnostic("raw-unreadable", target=spec.name, dtype=source.dtype)
    return _Settled(decision.tensor, decision, filled, source.dtype)


def _not_quantizable(
    tensor: ModelTensor, filled: Treatment, model: Model, spec: FormatSpec
) -> Diagnostic | None:
    # The general reason first: what no format quantizes is not blamed on this one.
    if not tensor.is_matrix:
        return diagnostic("not-a-matrix", role=tensor.role, shape=list(tensor.shape))
    reason = spec.unquantizable(tensor, model)
    if reason is not None:
        return diagnostic("unquantizable", target=spec.name, role=tensor.role, reason=reason)
    group = filled.group_size
    if group and tensor.shape[-1] % group:
        return diagnostic("group-does-not-divide", group_size=group, columns=tensor.shape[-1])
    return None


def _module(path: str, stack: list[_Settled], spec: FormatSpec) -> Module | Diagnostic:
    # Expert 10 stands before expert 2 in files that sort their names.
    stack = sorted(stack, key=lambda settled: settled.tensor.expert or 0)
    first = stack[0]
    defect = _uneven(stack)
    if defect is not None:
        return defect
    # A stack of one expert has the expert axis too: readers index it.
    stacked = first.tensor.expert is not None
    shape = (len(stack), *first.tensor.shape) if stacked else first.tensor.shape
    bare = _is_bare(path, first.tensor)
    parts = spec.part_shapes(first.treatment, shape, first.dtype)
    return Module(
        name=path,
        role=first.tensor.role,
        layer=first.tensor.layer,
        treatment=first.treatment,
        shape=shape,
        dtype=first.dtype,
        rule=first.decision.origin,
        sources=tuple(_rows(stack)),
        tensors=tuple(_unplaced(path, part, bare) for part in parts),
        parameters=math.prod(shape),
    )


def _is_bare(path: str, tensor: ModelTensor) -> bool:
    # A parameter that no module holds, such as a router's bias, has no part to append.
    name = tensor.source.name
    if tensor.expert is not None:
        return path == name
    return path.rpartition(".")[2] == name.rpartition(".")[2]


def _uneven(stack: list[_Settled]) -> Diagnostic | None:
    first = stack[0]
    for other in stack[1:]:
        if (other.treatment, other.dtype) != (first.treatment, first.dtype):
            return diagnostic(
                "mixed-stack",
                one=describe(first.treatment),
                other=describe(other.treatment),
                notes=[f"decided by {first.decision.origin} and {other.decision.origin}"],
            )
        if other.tensor.shape != first.tensor.shape:
            return diagnostic(
                "uneven-stack",
                one=list(first.tensor.shape),
                other=list(other.tensor.shape),
            )
    return None


def _rows(stack: list[_Settled]) -> Iterable[SourceRows]:
    at = 0
    for settled in stack:
        tensor = settled.tensor
        count = math.prod(tensor.shape[:-1])
        yield SourceRows(tensor.source, tensor.scale, tensor.first_row, count, at)
        at += count


def _unplaced(path: str, part: PartShape, bare: bool) -> PlannedTensor:
    name = path if bare else f"{path}.{part.part}"
    size = tensor_nbytes(part.dtype, part.shape)
    return PlannedTensor(name, part.part, part.dtype, part.shape, size, "", 0)
