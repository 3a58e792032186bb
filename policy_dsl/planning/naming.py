"""What a name in a selector means for an architecture: which roles, and which it spells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from policy_dsl.diagnostics import Diagnostic, diagnostic, did_you_mean
from policy_dsl.roles.architecture import Architecture, architecture, families
from policy_dsl.vocabulary import COMPONENTS, OUTSIDE_LANGUAGE_MODEL, SINGLE_ROLES

if TYPE_CHECKING:
    from policy_dsl.roles.model import Model


if TYPE_CHECKING:
    from policy_dsl.roles.model import Model


@dataclass(frozen=True, slots=True)
class Meaning:
    """The roles that a name means; `named` are those that it spells as a role of their own."""

    roles: frozenset[str]
    named: frozenset[str]


def meaning_of(text: str, model: Model, *, optional: bool) -> Meaning | Diagnostic:
    """The roles that a name means in this model, or the defect of the name.

    With `optional`, a name that only other architectures have means no role at all.
    """
    own = model.architecture
    if meaning := _roles(text, own.roles, own.aliases):
        return meaning
    # A word of the language that this model has nothing of: the rule matches nothing, which is
    # a finding of its own and says more than "unknown".
    if text in COMPONENTS or text in SINGLE_ROLES:
        return Meaning(frozenset({text}), frozenset({text} & SINGLE_ROLES))
    if optional and name_defect(text) is None:
        return Meaning(frozenset(), frozenset())
    return _unknown(text, f"architecture {own.family}", [own])


def name_defect(text: str) -> Diagnostic | None:
    """What is wrong with a name in every family that there is, else None."""
    # What towers and MTP blocks have besides, only a model shows.
    if text.rpartition(".")[0] in OUTSIDE_LANGUAGE_MODEL:
        return None
    if text in COMPONENTS | SINGLE_ROLES:
        return None
    tables = [architecture(family) for family in families()]
    if any(_roles(text, table.roles, table.aliases) is not None for table in tables):
        return None
    return _unknown(text, "the language", tables)


def family_defect(name: str) -> Diagnostic | None:
    """What is wrong with the name of a family, else None."""
    if name in families():
        return None
    return diagnostic("unknown-family", suggestion=did_you_mean(name, families()), family=name)


def _unknown(text: str, where: str, tables: Iterable[Architecture]) -> Diagnostic:
    # Everything that would have been understood may be what was meant.
    words = {*COMPONENTS, *SINGLE_ROLES}
    for table in tables:
        words |= {*table.roles, *table.aliases}
        words |= {role.split(".", 1)[1] for role in table.roles if "." in role}
    return diagnostic("unknown-role", suggestion=did_you_mean(text, words), where=where, role=text)


def _roles(
    text: str, roles: tuple[str, ...], aliases: Mapping[str, tuple[str, ...]]
) -> Meaning | None:
    component, _, projection = text.rpartition(".")
    components = aliases.get(component, (component,))
    found: set[str] = set()
    for word in aliases.get(projection, (projection,)):
        for part in components:
            found.update(role for role in roles if _means(part, word, role))
    if not found:
        return None
    # Only a name that is a role by itself spells it: a component never opens the guard.
    spelled = set(aliases.get(text, (text,)))
    return Meaning(frozenset(found), frozenset(found & (spelled | {text})))


def _means(component: str, word: str, role: str) -> bool:
    if component:
        return role == f"{component}.{word}"
    # Vision and MTP have a `down_proj` too; the bare word means the language model's.
    outside, _, last = role.rpartition(".")
    return word in (role, outside) or (last == word and outside not in OUTSIDE_LANGUAGE_MODEL)
