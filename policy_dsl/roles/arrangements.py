"""What a family's table says of a reader's tensors: new names, parts, other shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Part(NamedTuple):
    """One tensor of the reader: its name, with `{model}`, `{layer}`, `{n}`, and its role.

    role: empty for that of the source. transposed: columns as rows, of every matrix of a stack.
    """

    name: str
    role: str = ""
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What becomes of a tensor. What its fields mean: docs/extending.md.

    model: how the source calls the model. number_at: the place of `{n}` among the numbers of its
    name. place: among the tensors that are joined, by number; None if it is not.
    """

    parts: tuple[Part, ...]
    model: str = ""
    number_at: int | None = None
    split: str | tuple[str, ...] = ""
    stack: bool = False
    along: str = "first"
    shape: tuple[str, ...] = ()
    axes: tuple[int, ...] = ()
    take: str = ""
    add: float = 0.0
    drop: str = ""
    last: str = ""
    layers: str = ""
    place: int | None = None

    @property
    def as_published(self) -> Arrangement:
        """The tensor with only the reader's word for the model, where the rule does not hold."""
        return Arrangement(self.parts[-1:], self.model, self.number_at)


class Spelled(NamedTuple):
    """A name that a pattern means, after `prefix`. met: its last choice; at: its number in all."""

    prefix: str
    below: str
    met: str
    at: int


def arrangement(name: Spelled, rule: Any, roles: Sequence[str]) -> Arrangement:
    """What a rule of a table says of a name. roles: of the source, several if it is fused.

    Raises: TypeError for a key that means nothing, ValueError for parts without a split.
    """
    fields = dict(rule) if isinstance(rule, Mapping) else {"to": rule}
    joined = fields.pop("concat", None)
    given = joined or fields.pop("to", name.below)
    named = [_named(one) for one in (given if isinstance(given, list) else [given])]
    split = fields.pop("split", "")
    fused = len(roles) > 1
    if fused != (len(named) > 1) and not split:
        raise ValueError(f"{name.below}: {len(named)} names for {len(roles)} roles, and no split")
    parts = []
    for number, (word, transposed) in enumerate(named):
        called = name.prefix + word.replace("*", name.met)
        role = roles[number] if fused else _part_role(roles[0], called) if split or joined else ""
        parts.append(Part(called, role, transposed))
    fields |= {key: tuple(map(str, fields[key])) for key in ("shape",) if key in fields}
    fields |= {key: tuple(fields[key]) for key in ("axes",) if key in fields}
    fields["split"] = split if isinstance(split, str) else tuple(map(str, split))
    return Arrangement(tuple(parts), place=name.at if joined else None, **fields)


def _named(given: str | Mapping[str, Any]) -> tuple[str, bool]:
    if isinstance(given, str):
        return given, False
    return given["name"], bool(given.get("transpose", False))


def _part_role(role: str, name: str) -> str:
    """The role of a part: the last word of its name, in the component of its source."""
    component, _, _ = role.rpartition(".")
    word = name.removesuffix(".weight").rpartition(".")[2]
    return f"{component}.{word}" if component else role


def placed(found: Arrangement, pattern: str, model: str) -> Arrangement:
    """The rule for a source that calls the model so; pattern: of its name, with numbers."""
    numbers = [part for part in pattern.split(".") if part.startswith("{") and part != "{model}"]
    number_at = numbers.index("{n}") if "{n}" in numbers else None
    return replace(found, model=model, number_at=number_at)


def part_roles(found: Iterable[Arrangement]) -> Iterator[str]:
    """The roles that only parts have."""
    return (part.role for one in found for part in one.parts if part.role)
