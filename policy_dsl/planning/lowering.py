"""Decisions -> output modules: treatments filled in, tensors grouped to stacks of experts."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import ExpertPadding, ExpertsApart, Format, FormatSpec, PartShape
from policy_dsl.inventory import tensor_nbytes
from policy_dsl.plan import Module, Omission, PlannedTensor
from policy_dsl.planning.decisions import Decision, TensorDefects, Unheld
from policy_dsl.planning.fill import fill, plain_of, role_class
from policy_dsl.policy import Defaults, Policy
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.model import BY_EXPERT
from policy_dsl.treatments import KEEP, Coded, Plain, Stored, Written, describe, scheme_of


class Settled(NamedTuple):
    """A tensor whose treatment is whole; `dtype` is that of its values in the output."""

    tensor: ModelTensor
    decision: Decision
    treatment: Stored
    dtype: str

    @property
    def text(self) -> str:
        """The treatment in words: `4bit affine g64`, `keep (bf16)`, `raw`, `f32`."""
        stored, action = describe(self.treatment), self.decision.written.action
        return {"keep": f"keep ({stored})", "raw": "raw"}.get(action, stored)

    def is_unlike(self, other: Settled) -> bool:
        """Whether the two cannot be in one stack."""
        written = self.decision.written.action, other.decision.written.action
        unlike = (self.treatment, self.dtype) != (other.treatment, other.dtype)
        return unlike or written[0] != written[1]


@dataclass(frozen=True)
class Stacking:
    """How a bundle holds experts.

    apart: None for stacks. count: experts of every layer in the source. added: experts at its
    end that no source has.
    """

    spec: FormatSpec
    apart: ExpertsApart | None
    padding: ExpertPadding | None
    count: int
    added: int
    known: dict[tuple[Stored, tuple[int, ...], str], tuple[list[PlannedTensor], int]]

    @classmethod
    def of(cls, policy: Policy, model: Model, spec: FormatSpec) -> Stacking:
        """What the policy's `output` and the format make of this model's experts."""
        apart = spec.layouts.get(spec.layout(policy))
        padding = spec.padding.get(model.architecture.family)
        wanted = padding is not None and policy.output.pad_experts is not False
        added = padding.added(model.n_experts) if padding and wanted else 0
        return cls(spec, apart, padding, model.n_experts, added, {})

    def modules(self, path: str, stack: list[Settled]) -> list[Module] | Diagnostic:
        """The modules of a stack or a single tensor, not placed yet; or what is wrong."""
        # Expert 10 comes before expert 2 in files that sort their names.
        stack = sorted(stack, key=lambda settled: settled.tensor.expert or 0)
        first = stack[0]
        shape = first.tensor.shape
        if first.tensor.expert is None:
            added = self.added if first.tensor.role in BY_EXPERT else 0
            return [self._module(path, stack, shape, added)]
        # Also where experts lie apart: readers stack them after loading.
        defect = _uneven(stack) or self._partial(stack)
        if defect is not None:
            return defect
        if self.apart is None or (scheme_of(first.treatment) or None) not in self.apart.schemes:
            # A stack of one expert has the expert axis too: readers index it.
            return [self._module(path, stack, (self.count, *shape), self.added)]
        return list(self._each(self.apart, path, stack))

    def _partial(self, stack: Sequence[Settled]) -> Diagnostic | None:
        if len(stack) == self.count:
            return None
        return diagnostic("partial-stack", kept=len(stack), count=self.count)

    def _each(self, apart: ExpertsApart, path: str, stack: Sequence[Settled]) -> Iterator[Module]:
        first = stack[0]
        rows, *rest = first.tensor.shape
        for number, settled in enumerate(stack):
            yield self._module(apart.path(path, number), [settled], (rows, *rest), 0)
        for number in range(self.count, self.count + self.added):
            # Nothing but added rows.
            module = self._module(apart.path(path, number), [first], (0, *rest), rows)
            yield replace(module, sources=())

    def _module(
        self, path: str, stack: Sequence[Settled], shape: tuple[int, ...], added: int
    ) -> Module:
        """The module of a stack of this shape, to which `added` of the first axis come."""
        first = stack[0]
        padded = (shape[0] + added, *shape[1:]) if added else shape
        bare = _is_bare(path, first.tensor)
        parts, together = self._parts(first.treatment, padded, first.dtype)
        tail = self._tail(first, added)
        return Module(
            name=path,
            role=first.tensor.role,
            layer=first.tensor.layer,
            treatment=first.treatment,
            shape=padded,
            dtype=first.dtype,
            sources=tuple(settled.tensor.view for settled in stack),
            tensors=tuple(
                [
                    part._replace(
                        name=path if bare else f"{path}.{part.part}", tail=part.tail or tail
                    )
                    for part in parts
                ]
            ),
            parameters=math.prod(shape),
            added=added,
            together=together,
            decided_by=first.decision.decided_by,
            written=first.decision.written.action,
        )

    def _parts(
        self, treatment: Stored, shape: tuple[int, ...], dtype: str
    ) -> tuple[list[PlannedTensor], int]:
        """The tensors of a module without their names, and the rows that are coded as one."""
        # A hundred thousand modules are of a handful of kinds.
        key = treatment, shape, dtype
        if key not in self.known:
            parts = self.spec.part_shapes(treatment, shape, dtype)
            self.known[key] = [_unnamed(part) for part in parts], parts[0].together
        return self.known[key]

    def _tail(self, first: Settled, added: int) -> bytes:
        if self.padding is None or first.tensor.role != "router_bias":
            return b""
        return _stored(self.padding.router_bias, first.dtype) * added


def _stored(value: float, dtype: str) -> bytes:
    """A value as its bytes in F32, F16 or BF16, cut off where BF16 cannot hold it."""
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    return struct.pack("<e" if dtype == "F16" else "<f", value)


def _is_bare(path: str, tensor: ModelTensor) -> bool:
    # A parameter that no module holds, such as a router's bias, has no part to append.
    name = tensor.source.name
    if tensor.expert is not None:
        return path == name
    return path.rpartition(".")[2] == name.rpartition(".")[2]


def _uneven(stack: Sequence[Settled]) -> Diagnostic | None:
    first = stack[0]
    for other in stack[1:]:
        if other.is_unlike(first):
            return diagnostic(
                "mixed-stack",
                one=first.text,
                other=other.text,
                notes=[f"decided by {first.decision.origin} and {other.decision.origin}"],
            )
        if other.tensor.shape != first.tensor.shape:
            return diagnostic(
                "uneven-stack", one=list(first.tensor.shape), other=list(other.tensor.shape)
            )
    return None


def _unnamed(part: PartShape) -> PlannedTensor:
    nbytes = tensor_nbytes(part.dtype, part.shape) if part.nbytes is None else part.nbytes
    form = part.part, part.dtype, part.shape, nbytes
    return PlannedTensor("", *form, "", 0, part.order == "columns", part.constant)


@dataclass
class Lowered:
    """What lowering yields: modules without places, omissions, findings."""

    modules: list[Module] = field(default_factory=list)
    omitted: list[Omission] = field(default_factory=list)
    findings: list[Diagnostic] = field(default_factory=list)


def lower(made: Iterable[Decision], model: Model, policy: Policy, format: Format) -> Lowered:
    """The modules of the output in natural order of their names, not placed yet."""
    lowered = Lowered()
    defects = TensorDefects(policy)
    stacks: dict[str, list[Settled]] = {}
    broken: set[str] = set()
    filled: dict[tuple[int, str], Stored | Diagnostic | None] = {}
    for decision in made:
        tensor = decision.tensor
        reason = _omission(decision, model, format)
        if reason is not None:
            lowered.omitted.append(_left_out(decision, reason, model))
            continue
        # A hundred thousand tensors have a handful of treatments: each is filled in once.
        key = (id(decision.written), role_class(tensor))
        if key not in filled:
            filled[key] = fill(decision.written, key[1], policy.defaults, format.spec)
        settled = _settle(decision, filled[key], model, format)
        path = format.spec.module_path(tensor, model)
        if isinstance(settled, Settled):
            stacks.setdefault(path, []).append(settled)
        else:
            defects.add(decision, settled)
            broken.add(path)
    stacking = Stacking.of(policy, model, format.spec)
    for path, stack in stacks.items():
        # The others of a stack would only be found to be too few.
        if path in broken:
            continue
        found = stacking.modules(path, stack)
        if isinstance(found, Diagnostic):
            defects.add(stack[0].decision, found, what="stack", name=path)
        else:
            lowered.modules += found
    for method in format.methods.values():
        lowered.modules += method.added(lowered.modules) if method.added else ()
    # Sorted, so that the bundle does not depend on the order of the source's shards.
    lowered.modules.sort(key=lambda module: natural_key(module.name))
    lowered.findings = defects.findings()
    return lowered


def natural_key(name: str) -> list[tuple[int, str, str]]:
    """A sort key in which layers.2 precedes layers.10."""
    # Compared as texts: a name may hold more digits than Python makes a number of.
    return [_ordered(piece) for piece in re.split(r"([0-9]+)", name)]


@cache
def _ordered(piece: str) -> tuple[int, str, str]:
    digits = piece.lstrip("0") if "0" <= piece[:1] <= "9" else ""
    return len(digits), digits, piece


def _left_out(decision: Decision, reason: str, model: Model) -> Omission:
    tensor, embedding = decision.tensor, model.embedding
    omission = Omission(tensor.source, tensor.role, tensor.layer, reason)
    # Whoever drops a head knows of it; else readers must get its values from the embedding.
    if tensor.role != "lm_head" or decision.written.action == "drop" or embedding is None:
        return omission
    return replace(omission, equals=embedding.source.name)


def _omission(decision: Decision, model: Model, format: Format) -> str | None:
    # The author's own decision is the better reason where the format would drop it too.
    if decision.written.action == "drop":
        return f"dropped by {decision.origin}"
    return format.review.left_out(decision.tensor, model)


def _settle(
    decision: Decision, filled: Stored | Diagnostic | None, model: Model, format: Format
) -> Settled | Diagnostic | Unheld:
    tensor = decision.tensor
    if isinstance(filled, Diagnostic):
        return filled
    stored = filled or plain_of(decision.written, tensor, model, format.spec)
    defect = _refused(decision, stored, model, format) or _unusable(decision, format)
    if defect is not None:
        return defect
    if isinstance(stored, Plain):
        return Settled(tensor, decision, stored, stored.dtype)
    scheme = format.spec.scheme(stored.scheme)
    values = (scheme.values if scheme else None) or format.spec.plain_dtype(tensor, model)
    found = _not_quantizable(tensor, stored, model, format)
    return found or Settled(tensor, decision, stored, values)


def _refused(decision: Decision, stored: Stored, model: Model, format: Format) -> Unheld | None:
    """What readers of the format have against a tensor stored like that, if anything."""
    tensor, action = decision.tensor, decision.written.action
    # What nobody quantizes is said where it is tried.
    if isinstance(stored, Coded) and not tensor.is_matrix:
        return None
    reason = format.review.held(tensor, model, stored)
    if reason is None:
        return None
    text = action if action in ("keep", "raw") else describe(stored)
    return Unheld(format.spec.name, text, reason, _cure(tensor, stored, model, format))


def _cure(tensor: ModelTensor, stored: Stored, model: Model, format: Format) -> str:
    """A treatment that readers would take, as near to what was wanted as can be; else empty."""
    if isinstance(stored, Plain):
        return ""
    scheme = format.spec.scheme(stored.scheme)
    plainer = replace(stored, method=scheme.methods[0]) if scheme else stored
    width = Written("quantize", bits=stored.bits)
    by_table = fill(width, role_class(tensor), Defaults(), format.spec)
    kept = plain_of(KEEP, tensor, model, format.spec)
    for word, other in (
        (describe(plainer), plainer),
        (f"{stored.bits}bit", by_table),
        ("keep", kept),
    ):
        if other is None or isinstance(other, Diagnostic) or other == stored:
            continue
        if format.review.held(tensor, model, other) is None:
            return word
    return ""


def _unusable(decision: Decision, format: Format) -> Diagnostic | None:
    tensor = decision.tensor
    dtype = tensor.source.dtype
    if decision.written.action == "raw" and dtype not in format.spec.plain_dtypes:
        return diagnostic("raw-unreadable", target=format.spec.name, dtype=dtype)
    # Raw bytes too: the bundle names a tensor as if its rows were in order.
    if not tensor.is_rows_of_source:
        return diagnostic("unsupported-source-layout", target=format.spec.name, role=tensor.role)
    return None


def _not_quantizable(
    tensor: ModelTensor, coded: Coded, model: Model, format: Format
) -> Diagnostic | None:
    # The general reason first: what no format quantizes is not blamed on this one.
    if not tensor.is_matrix:
        return diagnostic("not-a-matrix", role=tensor.role, shape=list(tensor.shape))
    scheme = format.spec.scheme(coded.scheme)
    flat, sizes = (scheme.flat, scheme.group_sizes) if scheme else (False, ())
    group, columns = coded.group_size, tensor.shape[-1]
    divided = prod(tensor.shape) if flat else columns
    if not group or divided % group == 0:
        return None
    fitting = [
        f"g{size}"
        for size in sizes
        if divided % size == 0
        and format.review.held(tensor, model, replace(coded, group_size=size)) is None
    ]
    cure = f"{' or '.join(fitting)} would"
    if not fitting:
        kept = format.review.held(tensor, model, plain_of(KEEP, tensor, model, format.spec)) is None
        cure = f"no group size of {coded.scheme} does{': `keep` it' if kept else ''}"
    return diagnostic("group-does-not-divide", suggestion=cure, group_size=group, columns=columns)
