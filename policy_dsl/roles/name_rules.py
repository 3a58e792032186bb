"""What the entries of an architecture table say about tensor names.

`model.layers.{layer}.mlp.{up_proj,down_proj}.weight: mlp.*` -> two names with a role each
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from policy_dsl.vocabulary import COMPONENTS, SINGLE_ROLES

# Single roles that are linear weights; the others are never quantized as matrices.
_MATRIX_ROLES = frozenset({"router", "shared_expert_gate", "embed", "lm_head"})
_MODEL = "{model}"
_BLOCK = "{model}.layers.{layer}."
_NUMBERS = ("{layer}", "{expert}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_CLAUSE = re.compile(r"(not )?(?:layer (in|from|every|at) )?(\w+)(?: (is) (\w+))?")


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """A tensor that a model has once, or in each layer where `when` holds, and in no other.

    slot: its role, or its name below the block. shape: the size of each axis, numbers and keys
    of the config. optional: it may be there or not. in_layers: it is in the blocks.
    """

    slot: str
    in_layers: bool
    shape: tuple[str, ...]
    when: str = ""
    optional: bool = False

    @property
    def shown(self) -> str:
        """The slot as messages name it."""
        return self.slot.replace("{model}", "model").removesuffix(".weight")


class Clause(NamedTuple):
    """One condition on a key of the config or the table's `where`; form: as in `clauses`."""

    negated: bool
    form: str
    key: str
    word: str


class Role(NamedTuple):
    """What a tensor is for. is_matrix None: its shape decides."""

    name: str
    component: str | None
    projection: str | None
    is_matrix: bool | None


@dataclass(frozen=True, slots=True)
class Fusion:
    """How one source tensor holds matrices of every expert, along its first axis.

    interleaved: rows of the projections take turns, else they are blocks one after the other.
    transposed: stored [experts, in, out]. mxfp4: stored as blocks beside scales.
    """

    interleaved: bool = False
    transposed: bool = False
    mxfp4: bool = False


@dataclass(frozen=True, slots=True)
class NameRule:
    """What a name means. Several roles: a fused tensor's, in order; none: it is not a weight.

    layer_at, expert_at: which of the numbers in the name they are. reason: why it is ignored.
    needs: what it fulfils, for each role; None where the table does not say.
    """

    roles: tuple[Role, ...]
    layer_at: int | None = None
    expert_at: int | None = None
    fusion: Fusion | None = None
    reason: str = ""
    needs: tuple[Need | None, ...] = (None,)


def role_of(text: str) -> Role:
    """The role that `component.projection` or a single role names.

    Raises: ValueError if the closed vocabulary lacks it.
    """
    component, _, last = text.rpartition(".")
    single = last in SINGLE_ROLES
    if not last or (not single and component not in COMPONENTS):
        raise ValueError(f"{text} is not a role: neither a single role nor in a component")
    projection = None if single else last
    return Role(text, component or None, projection, not single or last in _MATRIX_ROLES)


def name_rules(table: Mapping[str, Any]) -> dict[str, NameRule]:
    """Every name of a table, with `#` for each number, and its rule.

    Raises: ValueError if entries mean the same name, or nothing.
    """
    rules: dict[str, NameRule] = {}
    for pattern, rule in (*_named(table), *_ignored(table)):
        for model in table["models"] if _MODEL in pattern else [""]:
            name = pattern.replace(_MODEL, model)
            at = {
                part: at for at, part in enumerate(filter(_NUMBERS.__contains__, name.split(".")))
            }
            key = name.replace("{layer}", "#").replace("{expert}", "#")
            # A literal number would be taken out of the names that are looked up.
            if "{" in key or any(part.isdecimal() for part in key.split(".")):
                raise ValueError(f"a name may hold only the numbers {_NUMBERS}: {name}")
            # The later entry would win in a mapping, and a tensor would quietly change its role.
            if key in rules:
                raise ValueError(f"two entries for {key}")
            rules[key] = replace(rule, layer_at=at.get("{layer}"), expert_at=at.get("{expert}"))
    return rules


def _named(table: Mapping[str, Any]) -> Iterator[tuple[str, NameRule]]:
    """The names that have roles."""
    meant = [
        (prefix, below, *_meaning(meaning, met))
        for place, prefix in (("top", ""), ("block", _BLOCK))
        for pattern, meaning in table[place].items()
        for below, met in spelled(pattern)
    ]
    slots = {below: bool(prefix) for prefix, below, *_ in meant}
    slots |= {role.name: bool(prefix) for prefix, _, roles, _ in meant for role in roles}
    needs = _needs(table, slots)
    for prefix, below, roles, fusion in meant:
        own = tuple(needs.get(role.name, needs.get(below)) for role in roles)
        yield prefix + below, NameRule(roles, fusion=fusion, needs=own)


def _ignored(table: Mapping[str, Any]) -> Iterator[tuple[str, NameRule]]:
    for pattern, reason in table.get("ignored", {}).items():
        for name, _ in spelled(pattern):
            yield name, NameRule((), reason=reason, needs=())


def _meaning(meaning: str | Mapping[str, Any], met: str) -> tuple[tuple[Role, ...], Fusion | None]:
    if isinstance(meaning, str):
        return (role_of(meaning.replace("*", met)),), None
    options = dict(meaning)
    projections = options.pop("experts")
    return tuple(role_of(f"experts.{word}") for word in projections), Fusion(**options)


def numbered_key(name: str) -> tuple[str, list[int]]:
    """The name with `#` for each whole number between dots, and the numbers."""
    parts = name.split(".")
    numbers = []
    for i, part in enumerate(parts):
        # 01 is another name than 1, and a number of many digits is not a layer.
        if part.isdecimal() and len(part) < 8 and (part[0] != "0" or part == "0"):
            numbers.append(int(part))
            parts[i] = "#"
    return ".".join(parts), numbers


def _needs(table: Mapping[str, Any], slots: Mapping[str, bool]) -> dict[str, Need]:
    """The needs of a table by slot. slots: its roles and names -> whether they are in blocks."""
    needs = {}
    for pattern, entry in table.get("needs", {}).items():
        given = entry if isinstance(entry, Mapping) else {"shape": entry}
        fields = {**given, "shape": tuple(map(str, given["shape"]))}
        clauses(given.get("when", ""))
        for slot, _ in spelled(pattern):
            if slot not in slots:
                raise ValueError(f"needs: {slot} is neither a role nor a name")
            needs[slot] = Need(slot, slots[slot], **fields)
    return needs


def spelled(pattern: str, met: str = "") -> Iterator[tuple[str, str]]:
    """Every name that a pattern with `{a,b}` means, and the last choice met."""
    choice = _CHOICE.search(pattern)
    if choice is None:
        yield pattern, met
        return
    for word in choice[1].split(","):
        yield from spelled(pattern[: choice.start()] + word + pattern[choice.end() :], word)


@cache
def clauses(text: str) -> tuple[Clause, ...]:
    """The clauses of a condition, joined by `and`.

    `key`: true, or a number other than 0. `key is word`; of a list: its entry for the layer.
    `layer in key`, `layer from key`: it is listed, or not before it. `layer every key`,
    `layer at key`: each key-th one, counted from 1 or from 0. Raises: ValueError.
    """
    parts = []
    for part in filter(None, text.split(" and ")):
        matched = _CLAUSE.fullmatch(part.strip())
        if matched is None:
            raise ValueError(f"not a condition: {part}")
        negated, of_layer, key, is_word, word = matched.groups()
        parts.append(Clause(bool(negated), of_layer or is_word or "", key, word or ""))
    return tuple(parts)
