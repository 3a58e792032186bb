"""What a model of a family must hold: the keys `needs` and `where` of its table.

A role or a name ──> a Need: its shape as sizes of the config, and where it must be
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

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
