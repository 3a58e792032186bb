"""The outline of a bundle, what each module got and what it costs, and what two of them differ in.

Plan ─────────────┐
saved plan.json ──┼─> Outline ─> groups, diff
bundle on disk ───┘
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from policy_dsl.diagnostics import Diagnostic
from policy_dsl.documents import RuleAt
from policy_dsl.inventory import DTYPE_BITS
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

    experts: of a layer, without the added ones that only the bundle has; None if not known.
    unread: why it is not known how some modules are stored.
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
    title, model, experts = plan.policy.name, plan.model, plan.model.n_experts
    pruned, added = plan.pruning, plan.added_experts
    return Outline(title, plan.target, model.id, tuple(modules), experts, pruned, added)


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


def bits_of(module: Module) -> int:
    """The bits of a code, or of a value as it is."""
    stored = module.treatment
    return stored.bits if isinstance(stored, Coded) else DTYPE_BITS[module.dtype]


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
        Group(role, _layers(members), treatment, rule, *_sums(members), members[0].rule_at)
        for (role, treatment, rule), members in found.items()
    ]
    return tuple(sorted(made, key=lambda group: (first_seen[group.role], group.layers)))


def _layers(modules: Iterable[OutlineModule]) -> tuple[int, ...]:
    return tuple(sorted({module.layer for module in modules if module.layer is not None}))


def _sums(modules: Sequence[OutlineModule]) -> tuple[int, int, int]:
    """All their tensors, parameters and bytes."""
    figures = [(module.tensors, module.parameters, module.nbytes) for module in modules]
    tensors, parameters, nbytes = map(sum, zip(*figures, strict=True)) if figures else (0, 0, 0)
    return tensors, parameters, nbytes


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
        before, after = self.before.bpw, self.after.bpw
        return None if before is None or after is None else after - before

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
        # Of a bundle without a record, nobody knows which experts are left.
        prunings = self.before.pruning, self.after.pruning
        kept = [pruning.kept for pruning in prunings if pruning and pruning.chosen]
        if len(kept) < 2 or kept[0] == kept[1]:
            return ""
        layers = [n for n in {**kept[0], **kept[1]} if kept[0].get(n) != kept[1].get(n)]
        return f"{after} a layer, not the same ones in layers {layer_list(layers)}"


_Modules = list[OutlineModule]
# Of A and B; one side may lack the module.
_Pair = tuple[OutlineModule | None, OutlineModule | None]


def diff(before: Outline, after: Outline) -> PlanDiff:
    """The difference of two outlines.

    Modules are the same if their names are, or if they hold all values of a role in a layer.
    """
    old = {module.name: module for module in before.modules}
    new = {module.name: module for module in after.modules}
    shared = [([old.pop(name)], [new.pop(name)]) for name in list(new) if name in old]
    changed: list[_Pair] = []
    for one, other in (*shared, *_stacked(old.values(), new.values())):
        for module in (*one, *other):
            old.pop(module.name, None)
            new.pop(module.name, None)
        # Rules and lines are not part of it: the same bundle comes of both.
        if _held(one) != _held(other):
            count = max(len(one), len(other))
            changed += zip(_shares(one, count), _shares(other, count), strict=True)
    added = _changes((None, module) for module in new.values())
    removed = _changes((module, None) for module in old.values())
    return PlanDiff(before, after, _changes(changed), added, removed)


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
        if one and other and 1 in (len(one), len(other)) and _sums(one)[1] == _sums(other)[1]
    ]


def _held(modules: _Modules) -> tuple[set[str], int]:
    return {module.stored for module in modules}, sum([module.nbytes for module in modules])


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
        before, after = (module.stored if module else None for module in pair)
        found[role, before, after].append(pair)
    changes = [_change(*key, members) for key, members in found.items()]
    # What costs most is what the reader looks for.
    return tuple(sorted(changes, key=lambda change: (-abs(change.nbytes_delta), change.role)))


def _change(role: str, before: str | None, after: str | None, pairs: list[_Pair]) -> Change:
    old, new = ([one for one in side if one] for side in zip(*pairs, strict=True))
    # Both sides of a pair hold the same values, and a stack means each of its experts.
    known, first = new or old, [next(iter(side), None) for side in (old, new)]
    names = tuple(dict.fromkeys(module.name for module in known))
    rule, new_rule = (module.rule if module else "" for module in first)
    place, new_place = (module.rule_at if module else None for module in first)
    (_, parameters, _), delta = _sums(known), _sums(new)[2] - _sums(old)[2]
    about = role, _layers(known), before, after, rule, new_rule
    return Change(*about, names, parameters, delta, place, new_place)
