"""What changed between two bundles, planned or built: Outline x Outline -> PlanDiff."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from policy_dsl.documents import RuleAt
from policy_dsl.planning.outline import Outline, OutlineModule
from policy_dsl.quantities import layer_list


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
        return f"{after} a layer, not the same ones in layers {layer_list(sorted(layers))}"


def _kept(side: Outline) -> Mapping[int, tuple[int, ...]]:
    """The old numbers of the experts of each layer; empty unless some are known to be left."""
    return side.pruning.kept if side.pruning and side.pruning.chosen else {}


Pair = tuple[OutlineModule | None, OutlineModule | None]
Modules = list[OutlineModule]


def diff(before: Outline, after: Outline) -> PlanDiff:
    """The difference of two outlines.

    Modules are the same if their names are, or if they hold all values of a role in a layer.
    """
    old = {module.name: module for module in before.modules}
    new = {module.name: module for module in after.modules}
    shared = [(old[name], module) for name, module in new.items() if name in old]
    gone = [module for name, module in old.items() if name not in new]
    come = [module for name, module in new.items() if name not in old]
    stacked = _stacked(gone, come)
    found = {module.name for sides in stacked for side in sides for module in side}
    changed = [pair for pair in shared if _differ(*pair)]
    for one, other in stacked:
        changed += _paired(one, other) if _hold(one) != _hold(other) else ()
    return PlanDiff(
        before,
        after,
        changed=_changes(changed),
        added=_changes((None, module) for module in come if module.name not in found),
        removed=_changes((module, None) for module in gone if module.name not in found),
    )


def _stacked(
    gone: Iterable[OutlineModule], come: Iterable[OutlineModule]
) -> list[tuple[Modules, Modules]]:
    """Modules of one side that are those of the other, where one of them stacks experts."""
    old, new = _by_place(gone), _by_place(come)
    # Roles tell it, which a bundle without a record has not.
    sides = [(old[place], new[place]) for place in old if place[0] and place in new]
    # As many values on both sides: what is pruned or left out is another matter.
    return [
        (one, other)
        for one, other in sides
        if 1 in (len(one), len(other)) and _parameters(one) == _parameters(other)
    ]


def _by_place(modules: Iterable[OutlineModule]) -> dict[tuple[str, int | None], Modules]:
    found: dict[tuple[str, int | None], Modules] = defaultdict(list)
    for module in modules:
        found[module.role, module.layer].append(module)
    return found


def _parameters(modules: Modules) -> int:
    return sum(module.parameters for module in modules)


def _hold(modules: Modules) -> tuple[set[str], int]:
    return {module.stored for module in modules}, sum(module.nbytes for module in modules)


def _paired(one: Modules, other: Modules) -> Iterable[tuple[OutlineModule, OutlineModule]]:
    count = max(len(one), len(other))
    return zip(_shares(one, count), _shares(other, count), strict=True)


def _shares(modules: Modules, count: int) -> Modules:
    """The modules, or the only one in so many shares; the first takes what is left over."""
    if len(modules) == count:
        return modules
    (whole,) = modules
    nbytes, parameters = whole.nbytes // count, whole.parameters // count
    share = replace(whole, nbytes=nbytes, parameters=parameters)
    first = replace(
        whole,
        nbytes=whole.nbytes - nbytes * (count - 1),
        parameters=whole.parameters - parameters * (count - 1),
    )
    return [first, *[share] * (count - 1)]


def _differ(before: OutlineModule, after: OutlineModule) -> bool:
    # Rules and lines are not part of it: the same bundle comes of both.
    return (before.stored, before.nbytes) != (after.stored, after.nbytes)


def _changes(pairs: Iterable[Pair]) -> tuple[Change, ...]:
    """The pairs grouped by role and both treatments, the largest difference first."""
    found: dict[tuple[str, str | None, str | None], list[Pair]] = {}
    for pair in pairs:
        known = [module for module in pair if module is not None]
        # A bundle read from headers alone does not know roles; the other side may.
        role = next((module.role for module in known if module.role), known[0].kind)
        old, new = (module.stored if module else None for module in pair)
        found.setdefault((role, old, new), []).append(pair)
    changes = [_change(key, members) for key, members in found.items()]
    # What costs most is what the reader looks for.
    return tuple(sorted(changes, key=lambda change: (-abs(change.nbytes_delta), change.role)))


def _change(key: tuple[str, str | None, str | None], pairs: list[Pair]) -> Change:
    first_before, first_after = pairs[0]
    shown = [after or before for before, after in pairs]
    members = [module for module in shown if module is not None]
    return Change(
        role=key[0],
        layers=tuple(sorted({m.layer for m in members if m.layer is not None})),
        before=key[1],
        after=key[2],
        before_rule=first_before.rule if first_before else "",
        after_rule=first_after.rule if first_after else "",
        # A stack means each of its experts.
        names=tuple(dict.fromkeys(module.name for module in members)),
        parameters=sum(module.parameters for module in members),
        nbytes_delta=sum(
            (after.nbytes if after else 0) - (before.nbytes if before else 0)
            for before, after in pairs
        ),
        before_rule_at=first_before.rule_at if first_before else None,
        after_rule_at=first_after.rule_at if first_after else None,
    )
