"""Settled tensors -> modules: experts stacked or apart, some added, parts named and sized."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import ExpertPadding, ExpertsApart, FormatSpec, PartShape
from policy_dsl.inventory import tensor_nbytes
from policy_dsl.plan import Module, PlannedTensor
from policy_dsl.planning.decisions import Decision
from policy_dsl.policy import Policy
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.model import BY_EXPERT
from policy_dsl.treatments import Stored, describe, scheme_of


@dataclass(frozen=True)
class Settled:
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
        # Expert 10 stands before expert 2 in files that sort their names.
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
