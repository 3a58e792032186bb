"""What the entries of an architecture table say about tensor names.

`model.layers.{layer}.mlp.{up_proj,down_proj}.weight: mlp.*` -> two names with a role each
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from policy_dsl.vocabulary import COMPONENTS, SINGLE_ROLES

# Single roles that are linear weights; the others are never quantized as matrices.
MATRIX_ROLES = frozenset({"router", "shared_expert_gate", "embed", "lm_head"})
_MODEL = "{model}"
_BLOCK = "{model}.layers.{layer}."
_NUMBERS = ("{layer}", "{expert}")
_FIELDS = frozenset({"shape", "when", "optional"})
ALWAYS = "always"
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_CLAUSE = re.compile(r"(not )?(?:layer (in|from|every|at) )?(\w+)(?: (is) (\w+))?")


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """A tensor that a model has once, or once in each layer where `when` holds.

    slot: the role, or the name below the block, that tells it from others. shape: the size of
    each axis, numbers and keys of the config. when: clauses joined by `and`; where they do not
    hold, the tensor may not be there. optional: it may be there or not. in_layers: it is in
    the blocks.
    """

    slot: str
    shape: tuple[str, ...]
    when: str
    optional: bool
    in_layers: bool

    @property
    def shown(self) -> str:
        """The slot as messages name it."""
        return self.slot.replace("{model}", "model").removesuffix(".weight")


class Clause(NamedTuple):
    """One condition.

    form: `in`, `from`, `every`, `at` (of a layer), `is`, or empty: it is true. key: of the
    config, of the table's `where`, or `always` or `never`.
    """

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
    """What a name means. Several roles: a fused tensor's, in order; none: it is no weight.

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
        raise ValueError(f"{text} is no role: neither a single role nor in a component")
    projection = None if single else last
    return Role(text, component or None, projection, not single or last in MATRIX_ROLES)


def name_rules(table: Mapping[str, Any]) -> dict[str, NameRule]:
    """Every name of a table, with `#` for each number, and its rule.

    Raises: ValueError if two entries mean the same name, an entry none, or a need neither a
    role nor a name.
    """
    rules: dict[str, NameRule] = {}
    for key, rule in (*_named(table), *_ignored(table)):
        # The later entry would win in a mapping, and a tensor would quietly change its role.
        if key in rules:
            raise ValueError(f"two entries for {key}")
        rules[key] = rule
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
    known = needs(table, slots)
    for prefix, below, roles, fusion in meant:
        own = tuple(known.get(role.name, known.get(below)) for role in roles)
        for name in _of_models(prefix + below, table["models"]):
            yield _rule(name, roles, fusion, needs=own)


def _ignored(table: Mapping[str, Any]) -> Iterator[tuple[str, NameRule]]:
    for pattern, reason in table.get("ignored", {}).items():
        for below, _ in spelled(pattern):
            for name in _of_models(below, table["models"]):
                yield _rule(name, reason=reason)


def _of_models(name: str, models: list[str]) -> list[str]:
    return [name.replace(_MODEL, model) for model in models] if _MODEL in name else [name]


def _meaning(meaning: str | Mapping[str, Any], met: str) -> tuple[tuple[Role, ...], Fusion | None]:
    if isinstance(meaning, str):
        return (role_of(meaning.replace("*", met)),), None
    options = dict(meaning)
    projections = options.pop("experts")
    return tuple(role_of(f"experts.{each}") for each in projections), Fusion(**options)


def _rule(
    name: str,
    roles: tuple[Role, ...] = (),
    fusion: Fusion | None = None,
    *,
    reason: str = "",
    needs: tuple[Need | None, ...] = (),
) -> tuple[str, NameRule]:
    parts = name.split(".")
    numbers = [part for part in parts if part in _NUMBERS]
    at = {place: place_at for place_at, place in enumerate(numbers)}
    key = name.replace("{layer}", "#").replace("{expert}", "#")
    # A literal number would be taken out of the names that are looked up.
    if "{" in key or any(part.isdecimal() for part in parts):
        raise ValueError(f"a name may hold only the numbers {_NUMBERS}: {name}")
    return key, NameRule(roles, at.get("{layer}"), at.get("{expert}"), fusion, reason, needs)


def numbered_key(name: str) -> tuple[str, list[int]]:
    """The name with `#` for each whole number between dots, and the numbers."""
    parts = name.split(".")
    numbers = []
    for i, part in enumerate(parts):
        # 01 is another name than 1, and a number of many digits is no layer.
        if part.isdecimal() and len(part) < 8 and (part[0] != "0" or part == "0"):
            numbers.append(int(part))
            parts[i] = "#"
    return ".".join(parts), numbers


def needs(table: Mapping[str, Any], slots: Mapping[str, bool]) -> dict[str, Need]:
    """The needs of a table by slot; the later of two entries for one slot counts.

    slots: the roles and names of the table -> whether they are in the blocks.
    Raises: ValueError if an entry means none of them, or says what it cannot say.
    """
    found = {}
    for pattern, entry in table.get("needs", {}).items():
        given = entry if isinstance(entry, Mapping) else {"shape": entry}
        clauses(given.get("when", ALWAYS))
        for slot, _ in spelled(pattern):
            if slot not in slots or not set(given) <= _FIELDS:
                raise ValueError(f"needs: {slot} is neither a role nor a name, or bad fields")
            found[slot] = Need(
                slot,
                tuple(map(str, given["shape"])),
                given.get("when", ALWAYS),
                given.get("optional", False),
                slots[slot],
            )
    return found


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

    `key`: it is true, or a number other than 0. `key is word`; of a list: its entry for the
    layer. `layer in key`, `layer from key`: the layer is listed, or not before it. `layer every
    key`, `layer at key`: it is each key-th one, counted from the first or starting with it.
    Raises: ValueError if there is another.
    """
    return tuple(map(_clause, text.split(" and ")))


def _clause(text: str) -> Clause:
    found = _CLAUSE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"not a condition: {text}")
    negated, of_layer, key, is_word, word = found.groups()
    return Clause(bool(negated), of_layer or is_word or "", key, word or "")
