"""Whether a model's tensors are those that its config means: each once, in the right shape.

needs of the family's table, ConfigFacts ──> Expectation ── tensors ──> Presence ──> findings
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.quantities import first_few
from policy_dsl.roles.architecture import Derived
from policy_dsl.roles.config_facts import ConfigFacts, is_whole, keys_of
from policy_dsl.roles.model import Model, ModelTensor
from policy_dsl.roles.name_rules import Clause, Need, clauses, numbered_key
from policy_dsl.vocabulary import OUTSIDE_LANGUAGE_MODEL

_LONGEST_VALUE = 60
_MOST_EXAMPLES = 3
# Layers of the language model; None is what is outside of its blocks.
_Layers = tuple[int | None, ...]
# What the config says, and the layers that it says it of -> what they lack or have.
_Because = dict[tuple[str, _Layers], list[str]]
_Place = tuple[int | None, str]


class Expectation:
    """The needs of a family, in the sizes and layers of one config."""

    def __init__(self, facts: ConfigFacts) -> None:
        self.facts = facts
        self.shapes = {need: self._shape(need) for need in facts.table.needs.values()}

    def holds(self, need: Need, layer: int | None) -> bool:
        """Whether the config says that a layer has it."""
        return self._all(need.when, -1 if layer is None else layer)

    def reason(self, need: Need, layer: int | None) -> str:
        """What the config says that decides whether a layer has it; empty if nothing does."""
        at = -1 if layer is None else layer
        said = list(self._deciding(need.when, at))
        # Of `experts, and from this layer on`, the layer explains what one layer lacks; and
        # what is written explains more than what is not.
        said = [clause for clause in said if clause.form] or said
        said = [one for one in said if self.facts.is_given(self._root(one.key))] or said
        return " and ".join(dict.fromkeys(self._said(clause, at) for clause in said))

    def absent_keys(self, expression: str) -> tuple[str, ...]:
        """The keys that decide a size and that the config leaves out."""
        absent: dict[str, None] = {}
        for key in keys_of(expression):
            if not self.facts.is_given(key):
                sizes = [default.fields.get("text", "") for default in self._derived(key)]
                deciding = [one for size in sizes for one in self.absent_keys(size)]
                absent |= dict.fromkeys(deciding or [key])
        return tuple(absent)

    def _shape(self, need: Need) -> tuple[int, ...] | None:
        sizes = [self.facts.computed(size) for size in need.shape]
        return tuple(sizes) if all(map(is_whole, sizes)) else None  # type: ignore[arg-type]

    def _derived(self, key: str) -> list[Derived]:
        entry = self.facts.table.config.get(key)
        return [one for one in entry.defaults if isinstance(one, Derived)] if entry else []

    def _all(self, condition: str, layer: int) -> bool:
        return all(self._is(one, layer) != one.negated for one in clauses(condition))

    def _is(self, clause: Clause, layer: int) -> bool:
        if clause.key in self.facts.table.where:
            return self._all(self.facts.table.where[clause.key], layer)
        value = self.facts.value(clause.key)
        if clause.form == "in":
            return isinstance(value, list) and layer in value
        if clause.form == "is":
            return bool(self._at(value, layer) == clause.word)
        if not clause.form:
            return value not in (None, False, 0)
        if clause.form == "from" or not is_whole(value):
            return is_whole(value) and layer >= value
        return bool(value > 0 and (layer + (clause.form == "every")) % value == 0)

    def _at(self, value: Any, layer: int) -> Any:
        """The entry of a list for a layer; an MTP block is one like the last."""
        layer = min(layer, (self.facts.n_layers or layer + 1) - 1)
        if not isinstance(value, list):
            return value
        return value[layer] if 0 <= layer < len(value) else None

    def _deciding(self, condition: str, layer: int) -> Iterator[Clause]:
        """The clauses about the config that decide a condition: those that fail, or all."""
        parts = clauses(condition)
        failing = [one for one in parts if self._is(one, layer) == one.negated]
        for clause in failing or parts:
            if clause.key in self.facts.table.where:
                yield from self._deciding(self.facts.table.where[clause.key], layer)
            else:
                yield clause

    def _said(self, clause: Clause, layer: int) -> str:
        key = self._root(clause.key)
        value = self.facts.value(key)
        if clause.form == "is" and isinstance(value, list):
            return f"{key} says {json.dumps(self._at(value, layer))} there"
        shown = json.dumps(value)[:_LONGEST_VALUE]
        if self.facts.is_given(key):
            is_null = self.facts.given(key) is None and value is not None
            return f"{key} is null, which means {shown}" if is_null else f"{key} is {shown}"
        return f"the config has no {key}, which means {shown}"

    def _root(self, key: str) -> str:
        """The key that decides: of one that the config leaves out, what its default is of."""
        for default in () if self.facts.is_given(key) else self._derived(key):
            deciding = default.fields.get(default.form)
            if default.form in ("first", "every") and isinstance(deciding, str):
                return self._root(deciding)
        return key


class Misfit(NamedTuple):
    """A tensor of another shape than its need has."""

    need: Need
    layer: int | None
    name: str
    shape: tuple[int, ...]

    def held(self, size: str) -> int | None:
        """What the tensor has where its need has a size; None if it has other axes."""
        same_axes = len(self.shape) == len(self.need.shape)
        return self.shape[self.need.shape.index(size)] if same_axes else None


@dataclass
class Presence:
    """Which needs of a family the tensors of a checkpoint fulfil, and which they contradict.

    seen: need -> layer -> the first of its tensors there. fitting: needs of which a tensor has
    the right shape. misfits: tensors that do not.
    """

    expected: Expectation
    seen: dict[Need, dict[int | None, str]] = field(default_factory=dict)
    fitting: set[Need] = field(default_factory=set)
    misfits: list[Misfit] = field(default_factory=list)

    def add(self, need: Need, layer: int | None, name: str, shape: tuple[int, ...] | None) -> None:
        """Take a tensor, or a matrix of a fused one; shape: None if it is not compared."""
        self.seen.setdefault(need, {}).setdefault(layer, name)
        if shape == self.expected.shapes[need]:
            self.fitting.add(need)
        elif shape is not None:
            self.misfits.append(Misfit(need, layer, name, shape))

    def shape_findings(self) -> Iterator[Diagnostic]:
        """Shapes that the config does not mean: a finding for each size that differs."""
        groups: dict[str, list[Misfit]] = defaultdict(list)
        for misfit in self.misfits:
            # What the config denies is reported as that, of whatever shape it is.
            if misfit.need.optional or self.expected.holds(misfit.need, misfit.layer):
                groups[self._differing(misfit)].append(misfit)
        # Of these sizes the config is right.
        right = {size for need in self.fitting for size in need.shape}
        for size, alike in groups.items():
            by_config = None if size in right else self._config_finding(size, alike)
            yield by_config or self._shape_finding(alike)

    def _differing(self, misfit: Misfit) -> str:
        """The first size that differs or is unknown; of other axes altogether, the slot."""
        if len(misfit.shape) != len(misfit.need.shape):
            return misfit.need.slot
        axes = zip(misfit.need.shape, misfit.shape, strict=True)
        return next(size for size, held in axes if self.expected.facts.computed(size) != held)

    def _config_finding(self, size: str, alike: list[Misfit]) -> Diagnostic | None:
        """That the config is wrong: all tensors with this size have the same other one."""
        held = {misfit.held(size) for misfit in alike}
        if len(held) != 1 or None in held:
            return None
        first, facts = alike[0], self.expected.facts
        absent, value = self.expected.absent_keys(size), facts.computed(size)
        if absent:
            without = "" if value is None else f"; without it, {size} is {value}"
            why = f", on which the shape of {first.need.shown} depends{without}"
            key = " or ".join(absent)
            return diagnostic("missing-config-key", model=facts.model_id, key=key, why=why)
        is_null = facts.is_given(size) and facts.given(size) is None
        # The embedding is what readers start from, and experts are counted by themselves.
        is_sure = size == facts.table.experts_key or _embed(alike) is not None
        if is_sure and not is_null:
            return None
        reason = f"it is {held.pop()} in {first_few([misfit.name for misfit in alike], 1)}"
        return facts.bad_value(size, None if is_null else value, reason)

    def _shape_finding(self, alike: list[Misfit]) -> Diagnostic:
        first = _embed(alike) or alike[0]
        sizes = ((size, self.expected.facts.computed(size)) for size in first.need.shape)
        axes = ", ".join(size if size.isdecimal() else f"{size} = {n}" for size, n in sizes)
        wanted = f"[{axes}] as the config says"
        shape = list(first.shape)
        finding = diagnostic("wrong-shape", name=first.name, shape=shape, wanted=wanted)
        names = dict.fromkeys([first.name, *(misfit.name for misfit in alike)])
        return replace(finding, count=len(names), examples=tuple(names)[:_MOST_EXAMPLES])

    def absences(self, layers: Sequence[int]) -> Iterator[Diagnostic]:
        """What the config means and these layers lack, or have though the config denies it."""
        lacking, denied = self._unlike(layers, wanted=True), self._unlike(layers, wanted=False)
        model = self.expected.facts.model_id
        for (reason, where), shown in denied.items():
            lacks = lacking.pop((reason, where), [])
            what = first_few(shown) + (f" and no {first_few(lacks)}" if lacks else "")
            at = _where(where)
            yield diagnostic("config-disagrees", reason=reason, model=model, what=what, where=at)
        by_place: dict[_Layers, dict[str, list[str]]] = defaultdict(dict)
        for (reason, where), shown in lacking.items():
            by_place[where][reason] = shown
        for where, shown_by_reason in by_place.items():
            what, why = _with_reasons(shown_by_reason)
            yield diagnostic("missing-tensor", model=model, what=what, why=_where(where) + why)

    def _unlike(self, layers: Sequence[int], *, wanted: bool) -> _Because:
        """What layers should have and have not, or the other way round."""
        because: _Because = defaultdict(list)
        for need in self.expected.shapes:
            reasons: dict[str, list[int | None]] = defaultdict(list)
            places: Sequence[int | None] = layers if need.in_layers else [None]
            seen: Collection[int | None] = self.seen.get(need, ())
            for layer in () if need.optional else places:
                if (layer in seen) != wanted and self.expected.holds(need, layer) == wanted:
                    reasons[self.expected.reason(need, layer)].append(layer)
            for reason, where in reasons.items():
                because[reason, tuple(where)].append(need.shown)
        return because


def _embed(alike: list[Misfit]) -> Misfit | None:
    return next((misfit for misfit in alike if misfit.need.slot == "embed"), None)


def _with_reasons(shown: Mapping[str, list[str]]) -> tuple[str, str]:
    """What is lacking, and why the config means it: each of several reasons by its names."""
    if len(shown) == 1:
        ((reason, names),) = shown.items()
        return first_few(names), f"; {reason}" if reason else ""
    # What needs no reason is first.
    named = [(name, reason) for reason in sorted(shown, key=bool) for name in shown[reason]]
    return first_few(f"{name} ({why})" if why else name for name, why in named), ""


def _where(layers: _Layers) -> str:
    """` in layer 1`, ` in layers 0, 1, …`; empty for what is in no layer."""
    if layers == (None,):
        return ""
    return f" in layer{'s' if len(layers) > 1 else ''} {first_few(map(str, layers))}"


def review(model: Model, presence: Presence) -> Iterator[Diagnostic]:
    """What is missing, there twice, or there although the config denies it."""
    there = {tensor.layer for tensor in model.tensors if tensor.layer is not None}
    missing = shown_first(layer for layer in range(model.n_layers) if layer not in there)
    if missing:
        yield diagnostic("missing-layers", model=model.id, missing=missing, n_layers=model.n_layers)
    # MTP blocks may be left out whole.
    seen = {at for layers in presence.seen.values() for at in layers if at is not None}
    blocks = {at for at in seen if at >= model.n_layers}
    yield from presence.absences(sorted(there | blocks))
    places: dict[_Place, list[ModelTensor]] = defaultdict(list)
    in_mtp: dict[_Place, list[ModelTensor]] = defaultdict(list)
    for tensor in model.tensors:
        if tensor.component == "mtp" and tensor.expert is not None:
            in_mtp[numbered_key(tensor.source.name)[1][0], tensor.role].append(tensor)
        # Norms and biases share a role, so only matrices can be there twice.
        elif tensor.is_matrix and tensor.component not in OUTSIDE_LANGUAGE_MODEL:
            places[tensor.layer, tensor.role].append(tensor)
    if not model.tied and (None, "lm_head") not in places:
        yield diagnostic("missing-tensor", model=model.id, what="lm_head", why="")
    for (layer, role), tensors in (*places.items(), *in_mtp.items()):
        numbers = [tensor.expert for tensor in tensors if tensor.expert is not None]
        if tensors[0].component != "mtp":
            yield from _ambiguous(tensors)
        if numbers:
            yield from wrong_experts(role, layer, numbers, model.n_experts)


def wrong_experts(
    role: str, layer: int | None, numbers: Iterable[int], count: int
) -> Iterator[Diagnostic]:
    """Which of `count` experts of a projection in a layer are missing, or beyond them."""
    held, wanted = set(numbers), range(count)
    missing = shown_first(number for number in wanted if number not in held)
    if missing:
        yield diagnostic("missing-experts", role=role, layer=layer, missing=missing, count=count)
    beyond = shown_first(sorted(held.difference(wanted)))
    if beyond:
        yield diagnostic("expert-beyond-config", role=role, layer=layer, beyond=beyond, count=count)


def shown_first(things: Iterable[object], limit: int = 5) -> str:
    """The first few as text; `…` if there are more, and nothing if there are none."""
    # A hostile config may leave millions missing; only what is shown is looked for.
    shown = list(map(str, islice(things, limit + 1)))
    text = ", ".join(shown[:limit])
    return f"{text}, …" if len(shown) > limit else text


def _ambiguous(tensors: list[ModelTensor]) -> Iterator[Diagnostic]:
    first: dict[int | None, ModelTensor] = {}
    for tensor in tensors:
        known = first.setdefault(tensor.expert, tensor)
        if known is not tensor:
            first_name, second_name = known.source.name, tensor.source.name
            yield diagnostic(
                "ambiguous-tensor", first=first_name, second=second_name, role=tensor.role
            )
            return
