"""Whether a config can be one, and a model's tensors are those it means: once, in their shapes."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

from policy_dsl import packaged_table
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.policy import OUTSIDE_LANGUAGE_MODEL
from policy_dsl.quantities import counted, first_few
from policy_dsl.roles.architecture import TABLES, Need
from policy_dsl.roles.config_facts import (
    LARGEST_SIZE,
    UNLIMITED,
    ConfigFacts,
    config_levels,
    is_whole,
)
from policy_dsl.roles.model import Model, ModelTensor, numbered_key

# Layers of the language model; None is what is outside of its blocks.
_Layers = tuple[int | None, ...]
# What the config says, and the layers that it says it of -> what they lack or have.
_Because = dict[tuple[str, _Layers], list[str]]


class Misfit(NamedTuple):
    """A tensor of another shape than its need has. sizes: those of the need in the layer."""

    need: Need
    layer: int | None
    name: str
    shape: tuple[int, ...]
    sizes: tuple[str, ...]


@dataclass
class Presence:
    """Which needs of a family the tensors of a checkpoint fulfil, and which they contradict.

    seen: need -> layer -> the first of its tensors there. right: sizes of shapes that fit.
    """

    facts: ConfigFacts
    seen: dict[Need, dict[int | None, str]] = field(default_factory=dict)
    right: set[tuple[str, ...]] = field(default_factory=set)
    misfits: list[Misfit] = field(default_factory=list)

    def add(self, need: Need, layer: int | None, name: str, shape: tuple[int, ...] | None) -> None:
        """Take a tensor, or a matrix of a fused one; shape: None if it is not compared."""
        self.seen.setdefault(need, {}).setdefault(layer, name)
        sizes = self.facts.sizes(need, layer)
        wanted = self.facts.shape(sizes)
        if shape is not None and shape == wanted:
            self.right.add(sizes)
        elif shape is not None and sizes:
            self.misfits.append(Misfit(need, layer, name, shape, sizes))

    def shape_findings(self) -> Iterator[Diagnostic]:
        """Shapes that the config does not mean: a finding for each size that differs."""
        groups: dict[str, list[Misfit]] = defaultdict(list)
        for one in self.misfits:
            # What the config denies is reported as that, of whatever shape it is.
            if self.facts.may_lack(one.need, one.layer) or self.facts.holds(one.need, one.layer):
                groups[self._differing(one)].append(one)
        # Of these sizes the config is right.
        right = {size for sizes in self.right for size in sizes}
        for size, alike in groups.items():
            # The embedding is what readers start from.
            first = min(alike, key=lambda one: one.need.slot != "embed")
            by_config = None if size in right else self._config_finding(size, first, alike)
            yield by_config or self._shape_finding(first, alike)

    def _differing(self, one: Misfit) -> str:
        """The first size that differs or is unknown; of other axes altogether, the slot."""
        if len(one.shape) != len(one.sizes):
            return one.need.slot
        axes = zip(one.sizes, one.shape, strict=True)
        return next(size for size, n in axes if self.facts.computed(size) != n)

    def _config_finding(self, size: str, first: Misfit, alike: list[Misfit]) -> Diagnostic | None:
        """That the config is wrong: all tensors with this size have the same other one."""
        same_axes = all(len(one.shape) == len(one.sizes) for one in alike)
        held = {one.shape[one.sizes.index(size)] for one in alike} if same_axes else set()
        if len(held) != 1:
            return None
        facts, value = self.facts, self.facts.computed(size)
        if absent := facts.absent_keys(size):
            without = "" if value is None else f"; without it, {size} is {value}"
            why = f", on which the shape of {alike[0].need.shown} depends{without}"
            key = " or ".join(absent)
            return diagnostic("missing-config-key", model=facts.model_id, key=key, why=why)
        is_null = facts.is_given(size) and facts.given(size) is None
        # Experts are counted by themselves.
        is_sure = size == facts.table.experts_key or first.need.slot == "embed"
        if is_sure and not is_null:
            return None
        reason = f"it is {held.pop()} in {first_few([one.name for one in alike], 1)}"
        return facts.bad_value(size, None if is_null else value, reason)

    def _shape_finding(self, first: Misfit, alike: list[Misfit]) -> Diagnostic:
        sizes = ((size, self.facts.computed(size)) for size in first.sizes)
        axes = ", ".join(size if size.isdecimal() else f"{size} = {n}" for size, n in sizes)
        wanted, shape = f"[{axes}] as the config says", list(first.shape)
        finding = diagnostic("wrong-shape", name=first.name, shape=shape, wanted=wanted)
        names = tuple(dict.fromkeys([first.name, *(one.name for one in alike)]))
        return replace(finding, count=len(names), examples=names[:3])

    def absences(self, layers: Sequence[int]) -> Iterator[Diagnostic]:
        """What the config means and these layers lack, or have though the config denies it."""
        lacking, denied = self._unlike(layers, wanted=True), self._unlike(layers, wanted=False)
        model = self.facts.model_id
        for (reason, where), shown in denied.items():
            lacks = lacking.pop((reason, where), [])
            what = first_few(shown) + (f" and no {first_few(lacks)}" if lacks else "")
            at = _where(where)
            yield diagnostic("config-disagrees", reason=reason, model=model, what=what, where=at)
        by_place: dict[_Layers, list[tuple[str, str]]] = defaultdict(list)
        for (reason, where), shown in lacking.items():
            by_place[where] += ((reason, name) for name in shown)
        for where, named in by_place.items():
            # What needs no reason is first; what all have in common is said once.
            named.sort(key=lambda one: bool(one[0]))
            why = named[0][0] if len({reason for reason, _ in named}) == 1 else ""
            what = first_few(name if due == why else f"{name} ({due})" for due, name in named)
            at = _where(where) + "; " * bool(why)
            yield diagnostic("missing-tensor", model=model, what=what, why=at + why)

    def _unlike(self, layers: Sequence[int], *, wanted: bool) -> _Because:
        """What layers should have and have not, or the other way round."""
        because: _Because = defaultdict(list)
        for need in self.facts.table.needs.values():
            reasons: dict[str, list[int | None]] = defaultdict(list)
            places: Sequence[int | None] = layers if need.in_layers else [None]
            seen: Collection[int | None] = self.seen.get(need, ())
            for layer in places:
                is_odd = (layer in seen) != wanted and self.facts.holds(need, layer) == wanted
                if is_odd and not self.facts.may_lack(need, layer):
                    reasons[self.facts.reason(need, layer)].append(layer)
            for reason, where in reasons.items():
                because[reason, tuple(where)].append(need.shown)
        return because


def _where(layers: _Layers) -> str:
    """` in layer 1`, ` in layers 0, 1, …`; empty for what is in no layer."""
    if layers == (None,):
        return ""
    return f" in layer{'s' if len(layers) > 1 else ''} {first_few(map(str, layers))}"


def review(model: Model, presence: Presence) -> Iterator[Diagnostic]:
    """What is missing, there twice, or there although the config denies it."""
    there, count = {one.layer for one in model.tensors if one.layer is not None}, model.n_layers
    if missing := shown_first(layer for layer in range(count) if layer not in there):
        yield diagnostic("missing-layers", model=model.id, missing=missing, n_layers=count)
    # MTP blocks may be left out whole.
    seen = {at for layers in presence.seen.values() for at in layers if at is not None}
    yield from presence.absences(sorted(there.union(at for at in seen if at >= count)))
    places: dict[tuple[int | None, str], list[ModelTensor]] = defaultdict(list)
    in_mtp: dict[tuple[int, str], list[ModelTensor]] = defaultdict(list)
    for tensor in model.tensors:
        if tensor.component == "mtp" and tensor.expert is not None:
            in_mtp[numbered_key(tensor.source.name)[1][0], tensor.role].append(tensor)
        # Norms and biases share a role, so only matrices can be there twice.
        elif tensor.is_matrix and tensor.component not in OUTSIDE_LANGUAGE_MODEL:
            places[tensor.layer, tensor.role].append(tensor)
    yield from _numbered(model)
    if not model.tied and (None, "lm_head") not in places:
        yield diagnostic("missing-tensor", model=model.id, what="lm_head", why="")
    for (layer, role), tensors in (*places.items(), *in_mtp.items()):
        first: dict[int | None, ModelTensor] = {}
        for tensor in tensors if tensors[0].component != "mtp" else ():
            known = first.setdefault(tensor.expert, tensor)
            one, other = known.source.name, tensor.source.name
            # Of names that differ in a number, a layer has several.
            if known is not tensor and numbered_key(one)[0] != numbered_key(other)[0]:
                yield diagnostic("ambiguous-tensor", first=one, second=other, role=role)
                break
        if numbers := [tensor.expert for tensor in tensors if tensor.expert is not None]:
            yield from wrong_experts(role, layer, numbers, model.n_experts)


def _numbered(model: Model) -> Iterator[Diagnostic]:
    """Tensors of a layer that are missing under one of the numbers of their names, or beyond."""
    table, held = model.architecture, defaultdict[tuple[str, int | None], set[int]](set)
    wanted = set(range(table.numbers))
    for tensor in model.tensors if table.numbers > 1 else ():
        key, numbers = numbered_key(tensor.source.name)
        rule = table.names.get(key)
        if rule and rule.arranged and rule.arranged.number_at is not None:
            held[key, tensor.layer].add(numbers[rule.arranged.number_at])
    for (key, layer), found in held.items():
        name = key.replace("#", str(layer), 1)
        shown = [name.replace("#", str(number), 1) for number in sorted(wanted ^ found)]
        if wanted - found:
            yield diagnostic("missing-tensor", model=model.id, what=shown[0], why="")
        elif shown:
            names, tensors = first_few(shown), counted(len(shown), "tensor")
            about: dict[str, Any] = {"family": table.family, "names": names, "tensors": tensors}
            yield diagnostic("tensor-without-role", **about)


def wrong_experts(
    role: str, layer: int | None, numbers: Iterable[int], count: int
) -> Iterator[Diagnostic]:
    """Which of `count` experts of a projection in a layer are missing, or beyond them."""
    held, wanted = set(numbers), range(count)
    if missing := shown_first(number for number in wanted if number not in held):
        yield diagnostic("missing-experts", role=role, layer=layer, missing=missing, count=count)
    if beyond := shown_first(sorted(held.difference(wanted))):
        yield diagnostic("expert-beyond-config", role=role, layer=layer, beyond=beyond, count=count)


def shown_first(things: Iterable[object]) -> str:
    """The first five as text; `…` if there are more, and nothing if there are none."""
    # A hostile config may leave millions missing; only what is shown is looked for.
    shown = list(map(str, islice(things, 6)))
    return ", ".join(shown[:5]) + (", …" if len(shown) > 5 else "")


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= LARGEST_SIZE
    return type(value) is float and math.isfinite(value)


def _are_tokens(value: Any) -> bool:
    tokens = value if isinstance(value, list) else [value]
    # -1 is written for a token that there is not.
    return all(type(token) is int and -1 <= token <= LARGEST_SIZE for token in tokens)


def _list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_one, value))


_counts = _list_of(lambda value: is_whole(value) and value <= LARGEST_SIZE)
# kind -> (whether a value is of it, what the value must be)
VALUE_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "size": (lambda value: is_whole(value) and 1 <= value <= LARGEST_SIZE, "a whole number from 1"),
    "count": (lambda value: _counts([value]), "a whole number from 0"),
    "number": (_is_number, "a number"),
    "positive": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "flag": (lambda value: type(value) is bool, "true or false"),
    "list": (lambda value: isinstance(value, list), "a list"),
    "numbers": (_list_of(_is_number), "a list of numbers"),
    "by layer": (
        lambda value: _counts(value if isinstance(value, list) else [value]),
        "a whole number from 0, or a list of them",
    ),
    # A limit may be that there is none.
    "limits": (_list_of(lambda one: _is_number(one) or one in UNLIMITED), "a list of numbers"),
    "texts": (_list_of(lambda value: isinstance(value, str)), "a list of texts"),
    "mapping": (lambda value: isinstance(value, dict), "an object"),
    "text": (lambda value: isinstance(value, str), "a text"),
    "pattern": (lambda value: isinstance(value, int | str), "a number or a text"),
    "tokens": (_are_tokens, "the number of a token, or a list of them"),
    # Models of several parts have one for each.
    "dtype": (lambda value: isinstance(value, str | dict), "the name of a dtype"),
}


def config_findings(facts: ConfigFacts) -> Iterator[Diagnostic]:
    """Values that sizes or readers need and that are not what they must be."""
    for kind, keys in packaged_table(TABLES / "_every_config.yaml").items():
        for key in keys:
            for before, level in zip(
                ("", "text_config."), config_levels(facts.config), strict=False
            ):
                yield from _kind_findings(facts, before + key, level.get(key), kind)
    for entry in facts.table.config.values():
        written = reversed(facts.written(entry.name))
        # Of the same key at the top and in `text_config` the first counts that is not null.
        for place, value in {at: one for at, one in written if one is not None}.items():
            wrong = list(_kind_findings(facts, place, value, entry.kind))
            yield from wrong
            for name, kind in entry.entries.items() if isinstance(value, Mapping) else ():
                yield from _kind_findings(facts, f"{place}.{name}", value.get(name), kind)
            # A list is of layers' numbers, or of a word for each layer.
            reason = entry.kind != "limits" and _layers_defect(value, facts)
            if reason and not wrong:
                yield facts.bad_value(place, value, reason)
        most = facts.computed(entry.at_most) if entry.at_most else None
        value = facts.value(entry.name)
        # A limit of 0 is that of a model that uses neither.
        if most and is_whole(value) and value > most:
            yield facts.bad_value(entry.name, value, f"it must be at most {most}")


def _layers_defect(value: Any, facts: ConfigFacts) -> str:
    if not isinstance(value, list) or all(map(is_whole, value)):
        return ""
    if not all(isinstance(word, str | bool) for word in value):
        return "its entries must be numbers of layers"
    count, layers = len(value), facts.n_layers
    # Blocks that predict tokens may have entries too.
    fits = count in (layers, layers + facts.n_mtp_blocks)
    return "" if fits else f"it has {count} entries, and there are {layers} layers"


def _kind_findings(facts: ConfigFacts, place: str, value: Any, kind: str) -> Iterator[Diagnostic]:
    is_of_kind, wanted = VALUE_KINDS[kind]
    if value is not None and not is_of_kind(value):
        yield facts.bad_value(place, value, f"it must be {wanted}")
