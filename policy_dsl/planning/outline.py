"""The outline of a bundle, what each module got and what it costs, and what two of them differ in.

Plan ─────────────┐
saved plan.json ──┼─> Outline ─> groups, diff
bundle on disk ───┘
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from policy_dsl.diagnostics import Diagnostic
from policy_dsl.documents import RuleAt
from policy_dsl.plan import Module, Plan, Pruning
from policy_dsl.quantities import bits_per_weight, layer_list
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
    forms = plan.forms
    texts = [(treatment_of(one), stored_as(one.treatment, one.dtype)) for one in forms.examples]
    rules = [plan.rule_of(one) for one in forms.examples]
    modules = []
    for module, form in zip(plan.modules, forms.numbers, strict=True):
        (treatment, stored), (rule, rule_at) = texts[form], rules[form]
        places = module.name, module.role, module.layer
        counts = len(module.tensors), module.parameters, module.nbytes
        modules.append(OutlineModule(*places, treatment, stored, rule, *counts, rule_at))
    return Outline(
        title=plan.policy.name,
        target=plan.target,
        model=plan.model.id,
        modules=tuple(modules),
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
    found: dict[tuple[str, str, str], list[OutlineModule]] = defaultdict(list)
    for module in modules:
        # Layers are not part of the key: treatments alike far apart are one line.
        found[module.kind, module.treatment, module.rule].append(module)
    first_seen = {role: at for at, role in enumerate(dict.fromkeys(role for role, _, _ in found))}
    made = [
        Group(
            *(role, _layers(members), treatment, rule),
            tensors=sum(module.tensors for module in members),
            parameters=sum(module.parameters for module in members),
            nbytes=sum(module.nbytes for module in members),
            rule_at=members[0].rule_at,
        )
        for (role, treatment, rule), members in found.items()
    ]
    return tuple(sorted(made, key=lambda group: (first_seen[group.role], group.layers)))


def _layers(modules: Iterable[OutlineModule]) -> tuple[int, ...]:
    return tuple(sorted({module.layer for module in modules if module.layer is not None}))


@dataclass(frozen=True, slots=True)
class Change:
    """Modules of one role that changed alike; `layers` sorted, maybe empty.

    before, after: how the values are held; None on the side that lacks the modules. The rules
    are those of the first module, empty if not known. names: of the modules, in order.
    """

    role: str
    layers: tuple[int, ...]
    before: str | None
    after: str | None
    before_rule: str
    after_rule: str
    names: tuple[str, ...]
    parameters: int
    nbytes_delta: int
    before_rule_at: RuleAt | None = None
    after_rule_at: RuleAt | None = None


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """What must be done to A to get B: changed treatments, added and removed modules."""

    before: Outline
    after: Outline
    changed: tuple[Change, ...]
    added: tuple[Change, ...]
    removed: tuple[Change, ...]

    @property
    def nbytes_delta(self) -> int:
        """Bytes of all output tensors of B, less those of A."""
        return self.after.nbytes - self.before.nbytes

    @property
    def bpw_delta(self) -> float | None:
        """Bits per weight of B, less those of A; None if one has no parameters."""
        if self.before.bpw is None or self.after.bpw is None:
            return None
        return self.after.bpw - self.before.bpw

    @property
    def is_empty(self) -> bool:
        """Whether every module has the same treatment, size and place in both."""
        return not (self.changed or self.added or self.removed or self.experts)

    @property
    def experts(self) -> str:
        """How the experts of a layer differ, in number or in which they are; else empty."""
        before, after = self.before.experts, self.after.experts
        if before != after and None not in (before, after):
            return f"{before} -> {after} a layer"
        one, other = _kept(self.before), _kept(self.after)
        # Of a bundle without a record, nobody knows which experts are left.
        if not one or not other or one == other:
            return ""
        layers = [layer for layer in {**one, **other} if one.get(layer) != other.get(layer)]
        return f"{after} a layer, not the same ones in layers {layer_list(layers)}"


def _kept(side: Outline) -> Mapping[int, tuple[int, ...]]:
    """The old numbers of the experts of each layer; empty unless some are known to be left."""
    return side.pruning.kept if side.pruning and side.pruning.chosen else {}


_Modules = list[OutlineModule]
# Of A and B; one side may lack the module.
_Pair = tuple[OutlineModule | None, OutlineModule | None]


def diff(before: Outline, after: Outline) -> PlanDiff:
    """The difference of two outlines.

    Modules are the same if their names are, or if they hold all values of a role in a layer.
    """
    old = {module.name: module for module in before.modules}
    new = {module.name: module for module in after.modules}
    shared = [(old.pop(name), new.pop(name)) for name in list(new) if name in old]
    # Rules and lines are not part of it: the same bundle comes of both.
    changed: list[_Pair] = [pair for pair in shared if _held(*pair[:1]) != _held(*pair[1:])]
    for one, other in _stacked(old.values(), new.values()):
        for module in (*one, *other):
            old.pop(module.name, None)
            new.pop(module.name, None)
        if _held(*one) != _held(*other):
            count = max(len(one), len(other))
            changed += zip(_shares(one, count), _shares(other, count), strict=True)
    return PlanDiff(
        before,
        after,
        changed=_changes(changed),
        added=_changes((None, module) for module in new.values()),
        removed=_changes((module, None) for module in old.values()),
    )


def _stacked(
    gone: Iterable[OutlineModule], come: Iterable[OutlineModule]
) -> list[tuple[_Modules, _Modules]]:
    """Modules of one side that are those of the other, where one of them stacks experts."""
    places: dict[tuple[str, int | None], tuple[_Modules, _Modules]] = defaultdict(lambda: ([], []))
    for side, modules in enumerate((gone, come)):
        for module in modules:
            # Roles tell it, which a bundle without a record has not.
            if module.role:
                places[module.role, module.layer][side].append(module)
    # As many values on both sides: what is pruned or left out is another matter.
    return [
        (one, other)
        for one, other in places.values()
        if (one and other and 1 in (len(one), len(other)))
        and sum(module.parameters for module in one) == sum(module.parameters for module in other)
    ]


def _held(*modules: OutlineModule) -> tuple[set[str], int]:
    return {module.stored for module in modules}, sum(module.nbytes for module in modules)


def _shares(modules: _Modules, count: int) -> _Modules:
    """The modules, or the only one in so many shares; the first takes what is left over."""
    if len(modules) == count:
        return modules
    (whole,) = modules
    nbytes, parameters = divmod(whole.nbytes, count), divmod(whole.parameters, count)
    share = replace(whole, nbytes=nbytes[0], parameters=parameters[0])
    first = replace(whole, nbytes=sum(nbytes), parameters=sum(parameters))
    return [first, *[share] * (count - 1)]


def _changes(pairs: Iterable[_Pair]) -> tuple[Change, ...]:
    """The pairs grouped by role and both treatments, the largest difference first."""
    found: dict[tuple[str, str | None, str | None], list[_Pair]] = defaultdict(list)
    for pair in pairs:
        known = [module for module in pair if module is not None]
        # A bundle read from headers alone does not know roles; the other side may.
        role = next((module.role for module in known if module.role), known[0].kind)
        old, new = (module.stored if module else None for module in pair)
        found[role, old, new].append(pair)
    changes = [_change(*key, members) for key, members in found.items()]
    # What costs most is what the reader looks for.
    return tuple(sorted(changes, key=lambda change: (-abs(change.nbytes_delta), change.role)))


def _change(role: str, before: str | None, after: str | None, pairs: list[_Pair]) -> Change:
    old, new = ([one for one in side if one is not None] for side in zip(*pairs, strict=True))
    # Both sides of a pair hold the same values.
    members = new or old
    (rule, place), (new_rule, new_place) = _rule(old), _rule(new)
    # A stack means each of its experts.
    names = tuple(dict.fromkeys(module.name for module in members))
    parameters = sum(module.parameters for module in members)
    delta = sum(module.nbytes for module in new) - sum(module.nbytes for module in old)
    rules, places = (rule, new_rule), (place, new_place)
    about = role, _layers(members), before, after
    return Change(*about, *rules, names, parameters, delta, *places)


def _rule(modules: Sequence[OutlineModule]) -> tuple[str, RuleAt | None]:
    return (modules[0].rule, modules[0].rule_at) if modules else ("", None)
