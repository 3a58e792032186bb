"""The selector tree: which tensors a rule means. Frozen values, no meaning attached yet.

Or(Except(And(Name, Layers …), …), …)     meaning: policy_dsl.planning.matching
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Layers `start` to `stop`, both included; negative numbers count from the end."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class All:
    """Every matrix of the language model, embeddings and head included."""


@dataclass(frozen=True, slots=True)
class Name:
    """A component, projection, `component.projection`, role, or an architecture's alias.

    `experts` narrows expert tensors to these expert numbers: `experts[0-15].down_proj`.
    """

    text: str
    experts: tuple[LayerRange, ...] = ()


@dataclass(frozen=True, slots=True)
class Layers:
    """`layers 0-1,-2..-1`; with `boundary`, `boundary layers …`: checked to be the boundary."""

    ranges: tuple[LayerRange, ...]
    boundary: bool = False


@dataclass(frozen=True, slots=True)
class LayersWhere:
    """`layers where EXPR`; the canonical text of an expression over `i` and `n`."""

    expression: str


@dataclass(frozen=True, slots=True)
class Boundary:
    """`boundary N`: the first N and the last N layers."""

    count: int


@dataclass(frozen=True, slots=True)
class Middle:
    """`middle`: the layers that the policy's `boundary` leaves."""


@dataclass(frozen=True, slots=True)
class Family:
    """`family NAME`: every tensor, if the model is of this family."""

    name: str


@dataclass(frozen=True, slots=True)
class Glob:
    """A quoted name pattern with `*`, `?` and `[…]`, matched against the whole source name."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Regex:
    """`/…/`: a regular expression, matched against the whole source name."""

    pattern: str


@dataclass(frozen=True, slots=True)
class And:
    """Tensors that every part means (`in` and `and`)."""

    parts: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Tensors that at least one part means (comma)."""

    parts: tuple[Selector, ...]


@dataclass(frozen=True, slots=True)
class Except:
    """Tensors of `base` that `excluded` does not mean."""

    base: Selector
    excluded: Selector


LayerSet = Layers | LayersWhere | Boundary | Middle
Leaf = All | Name | LayerSet | Family | Glob | Regex
Selector = Leaf | And | Or | Except


def any_of(*parts: Selector) -> Selector:
    """The union of the parts; unions among them become part of it."""
    flat: list[Selector] = []
    for part in parts:
        flat += part.parts if isinstance(part, Or) else (part,)
    return flat[0] if len(flat) == 1 else Or(tuple(flat))


def all_of(*parts: Selector) -> Selector:
    """What every part means; intersections among them become part of it."""
    flat: list[Selector] = []
    for part in parts:
        flat += part.parts if isinstance(part, And) else (part,)
    return flat[0] if len(flat) == 1 else And(tuple(flat))


def without(base: Selector, excluded: Selector) -> Selector:
    """`base` less `excluded`; leaving out twice is leaving out both."""
    if isinstance(base, Except):
        return Except(base.base, any_of(base.excluded, excluded))
    return Except(base, excluded)
