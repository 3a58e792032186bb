"""The outline of a bundle: what each module got and what it costs; from a plan or a record.

Plan ─────────────┐
saved plan.json ──┼─> Outline ─> groups, diff
bundle on disk ───┘
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from policy_dsl.diagnostics import Diagnostic
from policy_dsl.documents import RuleAt
from policy_dsl.plan import Module, Plan, Pruning
from policy_dsl.quantities import bits_per_weight
from policy_dsl.treatments import Coded, Plain, Stored, Unread, describe

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class OutlineModule:
    """One decision. `treatment` includes the cast, `stored` is only what is on disk.

    tensors: output tensors (codes, scales …). rule: `file:line` or `defaults.otherwise`. role
    and rule are empty where they are not known.
    """

    name: str
    role: str
    layer: int | None
    treatment: str
    stored: str
    rule: str
    tensors: int
    parameters: int
    nbytes: int
    rule_at: RuleAt | None = field(default=None, compare=False, repr=False)

    @property
    def kind(self) -> str:
        """The role; where it is not known, the name with its numbers left open."""
        return self.role or _NUMBER.sub("{}", self.name)


@dataclass(frozen=True)
class Outline:
    """A bundle, planned or built, as far as it can be compared with another one.

    experts: of a layer, without those that only the bundle has; None where it is not known.
    added: those that only the bundle has. unread: why it is not known how some modules are
    stored.
    """

    title: str
    target: str
    model: str
    modules: tuple[OutlineModule, ...]
    experts: int | None = None
    pruning: Pruning | None = None
    added: int = 0
    unread: tuple[Diagnostic, ...] = ()

    @property
    def tensors(self) -> int:
        """How many output tensors there are."""
        return sum(module.tensors for module in self.modules)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(module.nbytes for module in self.modules)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the logical model."""
        return sum(module.parameters for module in self.modules)

    @property
    def bpw(self) -> float | None:
        """8 x bytes of all output tensors / parameters of the logical model, if known."""
        return None if self.unread else bits_per_weight(self.nbytes, self.parameters)


@dataclass(frozen=True, slots=True)
class Group:
    """Modules of one role with one treatment and one reason; `layers` sorted, maybe empty."""

    role: str
    layers: tuple[int, ...]
    treatment: str
    rule: str
    tensors: int
    parameters: int
    nbytes: int
    rule_at: RuleAt | None = field(default=None, compare=False, repr=False)

    @property
    def bpw(self) -> float | None:
        """8 x bytes / parameters of the group."""
        return bits_per_weight(self.nbytes, self.parameters)


def outline(plan: Plan) -> Outline:
    """The outline of a plan."""
    return Outline(
        title=plan.policy.name,
        target=plan.target,
        model=plan.model.id,
        modules=tuple(_outline_module(module, plan) for module in plan.modules),
        experts=plan.model.n_experts,
        pruning=plan.pruning,
        added=plan.added_experts,
    )


def stored_as(treatment: Stored | Unread, dtype: str) -> str:
    """What is on disk: `4bit affine g64`, or the dtype of plain values such as `bf16`."""
    return dtype.lower() if isinstance(treatment, Plain) else describe(treatment)


def treatment_of(module: Module) -> str:
    """What happens to a module's values: `4bit affine g64`, `keep (f32 -> bf16)`."""
    stored = stored_as(module.treatment, module.dtype)
    if isinstance(module.treatment, Coded):
        return stored
    # The cast is part of what happens, so it is always shown.
    given = ", ".join(source_dtypes(module)).lower()
    change = stored if given in ("", stored) else f"{given} -> {stored}"
    return f"{module.written} ({change})"


def source_dtypes(module: Module) -> tuple[str, ...]:
    """The dtypes of a module's source tensors, sorted."""
    return tuple(sorted({rows.tensor.dtype for rows in module.sources}))


def groups(modules: Iterable[OutlineModule]) -> tuple[Group, ...]:
    """The modules by role, treatment and rule; roles as they first appear, then by layer."""
    found: dict[tuple[str, str, str], list[OutlineModule]] = {}
    first_seen: dict[str, int] = {}
    for module in modules:
        first_seen.setdefault(module.kind, len(first_seen))
        found.setdefault((module.kind, module.treatment, module.rule), []).append(module)
    # Layers are not part of the key: treatments alike far apart are one line.
    made = [_group(key, members) for key, members in found.items()]
    return tuple(sorted(made, key=lambda group: (first_seen[group.role], group.layers)))


def _outline_module(module: Module, plan: Plan) -> OutlineModule:
    stored = stored_as(module.treatment, module.dtype)
    return OutlineModule(
        name=module.name,
        role=module.role,
        layer=module.layer,
        treatment=stored if isinstance(module.treatment, Coded) else treatment_of(module),
        stored=stored,
        rule=plan.rule_text(module),
        rule_at=plan.rule_at(module),
        tensors=len(module.tensors),
        parameters=module.parameters,
        nbytes=module.nbytes,
    )


def _group(key: tuple[str, str, str], members: list[OutlineModule]) -> Group:
    role, treatment, rule = key
    return Group(
        role=role,
        layers=tuple(sorted({m.layer for m in members if m.layer is not None})),
        treatment=treatment,
        rule=rule,
        tensors=sum(m.tensors for m in members),
        parameters=sum(m.parameters for m in members),
        nbytes=sum(m.nbytes for m in members),
        rule_at=members[0].rule_at,
    )
