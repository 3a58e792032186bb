"""Which tensors that a config means are there, which are not, and which should not be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.roles.expected import Expectation
from policy_dsl.roles.misfits import Misfit, misfit_findings
from policy_dsl.roles.needs import Need

_MOST_SHOWN = 5
# Layers of the language model; None is what is outside of its blocks.
_Layers = tuple[int | None, ...]
# What the config says, and the layers that it says it of -> what they lack or have.
_Because = dict[tuple[str, _Layers], list[str]]


@dataclass
class Presence:
    """Which needs of a family the tensors of a checkpoint fulfil, and which they contradict.

    seen: need -> layer -> the first of its tensors there. fitting: needs of which a tensor has
    the right shape. misfits: tensors that have not.
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

    @property
    def blocks(self) -> frozenset[int]:
        """The blocks that have any of what the table names."""
        return frozenset(at for seen in self.seen.values() for at in seen if at is not None)

    def shape_findings(self, model_id: str) -> Iterator[Diagnostic]:
        """Shapes that the config does not mean."""
        # What the config denies is reported as that, of whatever shape it is.
        misfits = [
            one
            for one in self.misfits
            if one.need.optional or self.expected.holds(one.need, one.layer)
        ]
        yield from misfit_findings(model_id, misfits, self.fitting, self.expected)

    def absences(self, model_id: str, layers: Sequence[int]) -> Iterator[Diagnostic]:
        """What the config means and these layers lack, or have though the config denies it."""
        lacking, denied = self._unlike(layers, wanted=True), self._unlike(layers, wanted=False)
        for (reason, where), shown in denied.items():
            lacks = lacking.pop((reason, where), [])
            what = _some(shown) + (f" and no {_some(lacks)}" if lacks else "")
            at = _where(where)
            yield diagnostic("config-disagrees", reason=reason, model=model_id, what=what, where=at)
        by_place: dict[_Layers, dict[str, list[str]]] = defaultdict(dict)
        for (reason, where), shown in lacking.items():
            by_place[where][reason] = shown
        for where, shown_by_reason in by_place.items():
            what, why = _with_reasons(shown_by_reason)
            yield diagnostic("missing-tensor", model=model_id, what=what, why=_where(where) + why)

    def _unlike(self, layers: Sequence[int], *, wanted: bool) -> _Because:
        """What layers should have and have not, or the other way round."""
        found: _Because = defaultdict(list)
        for need in self.expected.table.needs.values():
            if not need.optional:
                places: Sequence[int | None] = layers if need.in_layers else [None]
                for reason, where in self._places(need, places, wanted=wanted).items():
                    found[reason, tuple(where)].append(need.shown)
        return found

    def _places(
        self, need: Need, places: Sequence[int | None], *, wanted: bool
    ) -> Mapping[str, list[int | None]]:
        """The layers that are not as they should be, by what the config says of them."""
        seen: Mapping[int | None, str] = self.seen.get(need, {})
        found: dict[str, list[int | None]] = defaultdict(list)
        for layer in places:
            if (layer in seen) != wanted and self.expected.holds(need, layer) == wanted:
                found[self.expected.reason(need, layer)].append(layer)
        return found


def _with_reasons(shown: Mapping[str, list[str]]) -> tuple[str, str]:
    """What is lacking, and why the config means it: each of several reasons by its names."""
    if len(shown) == 1:
        ((reason, names),) = shown.items()
        return _some(names), f"; {reason}" if reason else ""
    return _some(
        f"{name} ({reason})" if reason else name
        # What needs no reason is first.
        for reason in sorted(shown, key=bool)
        for name in shown[reason]
    ), ""


def _where(layers: _Layers) -> str:
    """` in layer 1`, ` in layers 0, 1, …`; empty for what is in no layer."""
    if layers == (None,):
        return ""
    shown = _some(map(str, layers))
    return f" in layer{'s' if len(layers) > 1 else ''} {shown}"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _MOST_SHOWN
    return ", ".join(listed[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")
