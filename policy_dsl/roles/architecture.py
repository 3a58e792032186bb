"""The table of a model family: which tensor names it has and what each is for.

architectures/<family>.yaml, with the parts of architectures/_parts.yaml that it includes
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from policy_dsl.roles.config_keys import ConfigKey, config_keys, merged_keys
from policy_dsl.roles.name_rules import NameRule, Need, Role, name_rules, role_of

TABLES = Path(__file__).parent.parent / "architectures"
_MAPPINGS = (
    *("top", "block", "ignored", "elsewhere", "aliases", "config", "needs", "where"),
    *("targets", "mlx"),
)
_VALUES = ("model_types", "models", "layers", "experts", "mtp_layers")


@dataclass(frozen=True)
class Architecture:
    """A model family's table: its names, aliases and how its config tells the sizes.

    roles: all that its names can have; the open sets below `elsewhere` (vision, MTP extras)
    come with a model. aliases: a known name -> the projections, role or component it means.
    layers, experts_key, mtp_layers: canonical keys of its config; None where it has none.
    config: canonical key -> where a config has it, and what its absence means.
    needs: what a model must hold, by slot. where: name -> the condition that it stands for.
    models: what may stand before `layers.0`.
    names: a name with `#` for each number -> its rule. elsewhere: prefix -> component.
    targets: format -> what it has to know of the family. mlx: what mlx-lm's classes do with it:
    `bare` roles, prefixes that it calls otherwise (`model`).
    """

    family: str
    model_types: tuple[str, ...]
    roles: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]]
    layers: str = field(repr=False)
    experts_key: str | None = field(repr=False)
    mtp_layers: str | None = field(repr=False)
    models: tuple[str, ...] = field(repr=False)
    names: Mapping[str, NameRule] = field(repr=False)
    elsewhere: Mapping[str, str] = field(repr=False)
    config: Mapping[str, ConfigKey] = field(repr=False)
    needs: Mapping[str, Need] = field(repr=False)
    where: Mapping[str, str] = field(repr=False)
    targets: Mapping[str, Mapping[str, Any]] = field(repr=False)
    mlx: Mapping[str, Any] = field(repr=False)

    @property
    def experts(self) -> tuple[str, ...]:
        """The names under which a config may tell how many experts a layer has."""
        key = self.experts_key
        if key is None:
            return ()
        return self.config[key].names if key in self.config else (key,)

    @cached_property
    def published_experts(self) -> tuple[str, Mapping[str, str]]:
        """The module of a layer's experts as published, and what projections are called in it."""
        block, words = "", dict[str, str]()
        for key, rule in self.names.items():
            if rule.expert_at is not None and rule.roles:
                *_, module, _, _, word = key.removesuffix(".weight").split(".")
                block = block or module
                words.setdefault(rule.roles[0].projection or "", word)
        return block or "mlp", words

    @property
    def renames_experts(self) -> bool:
        """Whether published experts have other names for their projections, such as `w1`."""
        return any(word != projection for projection, word in self.published_experts[1].items())

    def refusal(self, target: str) -> str | None:
        """Why a format cannot take the family, or None if it can."""
        unknown = {"refused": f"the table of {self.family} does not name it"}
        refused: str | None = self.targets.get(target, unknown).get("refused")
        return refused

    def facts(self, target: str) -> Mapping[str, Any]:
        """What a format has to know of the family; empty if its table does not name it."""
        return self.targets.get(target, {})


@cache
def families() -> tuple[str, ...]:
    """The names of all families that have a table, sorted."""
    return tuple(sorted(path.stem for path in TABLES.glob("[!_]*.yaml")))


@cache
def model_types() -> Mapping[str, str]:
    """The `model_type` of a config -> its family."""
    return {each: family for family in families() for each in _table(family)["model_types"]}


@cache
def architecture(family: str) -> Architecture:
    """The table of a family.

    Raises: KeyError if there is none; ValueError if a table contradicts itself.
    """
    # Not by trying to open the file: a family's name comes from a policy.
    if family not in families():
        raise KeyError(family)
    table = _merged(family)
    names = name_rules(table)
    roles = {role.name for rule in names.values() for role in rule.roles}
    return Architecture(
        family=family,
        model_types=tuple(table["model_types"]),
        roles=tuple(sorted(roles)),
        aliases={alias: tuple(meant) for alias, meant in table["aliases"].items()},
        layers=table["layers"],
        experts_key=table.get("experts"),
        mtp_layers=table.get("mtp_layers"),
        models=tuple(table["models"]),
        names=names,
        elsewhere=table.get("elsewhere", {}),
        config=config_keys(table.get("config", {})),
        needs={need.slot: need for rule in names.values() for need in rule.needs if need},
        where=table.get("where", {}),
        targets=table.get("targets", {}),
        mlx=table.get("mlx", {}),
    )


def families_of(target: str) -> Mapping[str, str | None]:
    """Every family -> None if a format takes it, else the reason why not."""
    return {family: architecture(family).refusal(target) for family in families()}


def facts_of(target: str, fact: str) -> Mapping[str, Any]:
    """Family -> what a format has to know of it by this name, of those that have it."""
    facts = {family: architecture(family).facts(target) for family in families()}
    return {family: known[fact] for family, known in facts.items() if fact in known}


@cache
def packaged_table(path: Path) -> dict[str, Any]:
    """What a YAML file of ours says."""
    # libyaml reads all tables in 2 ms, pure Python in 12.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    table: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    return table


def _table(name: str) -> dict[str, Any]:
    return packaged_table(TABLES / f"{name}.yaml")


def _merged(family: str) -> dict[str, Any]:
    """A family's table with the parts it includes; what the family itself says, wins."""
    own = _table(family)
    merged: dict[str, Any] = {}
    for part in [*(_table("_parts")[name] for name in own["include"]), own]:
        # A misspelt key would silently be a table without its entries.
        unknown = set(part) - {*_MAPPINGS, *_VALUES, "include"}
        if unknown:
            raise ValueError(f"{family}.yaml: unknown key {sorted(unknown)}")
        for key, value in part.items():
            before = merged.get(key, {})
            own = merged_keys(before, value) if key == "config" else value
            merged[key] = {**before, **own} if key in _MAPPINGS else own
    return merged


def outside(architecture: Architecture, key: str, *, beyond: bool) -> NameRule | None:
    """The rule of a name that the table does not spell: vision towers and MTP blocks.

    key: the name with `#` for numbers. beyond: its first number is that of an MTP block which
    follows the last layer.
    """
    for prefix, component in architecture.elsewhere.items():
        if key.startswith(prefix):
            found = _rule_within(architecture, key, component)
            # Which kind of block it is, no config says.
            return replace(found, needs=(None,) * len(found.roles)) if found else None
    blocks = tuple(f"{model}.layers.#." for model in architecture.models)
    if beyond and key.startswith(blocks):
        return _rule_within(architecture, key, "mtp")
    return None


def _rule_within(architecture: Architecture, key: str, component: str) -> NameRule | None:
    alike = _like_a_block(architecture, key) if component == "mtp" else None
    return alike or _by_last_word(architecture, key, component)


def _like_a_block(architecture: Architecture, key: str) -> NameRule | None:
    """MTP blocks are built like the model's own; what is alike is named after them."""
    # Releases differ in what MTP blocks are called: behind the block's number they are alike.
    rest = key.partition(".#.")[2]
    rule = architecture.names.get(f"{architecture.models[0]}.layers.#.{rest}")
    if rule is None or not rule.roles:
        return rule
    roles = tuple(_moved(role, "mtp") for role in rule.roles)
    return replace(rule, roles=roles, layer_at=None)


def _moved(role: Role, component: str) -> Role:
    last = role.name.rpartition(".")[2]
    return role._replace(name=f"{component}.{last}", component=component)


def _by_last_word(architecture: Architecture, key: str, component: str) -> NameRule | None:
    """The role that the name's last word gives it: no table spells all vision towers."""
    named = key.replace(".#", "")
    path = named.removesuffix(".weight")
    word = path.rpartition(".")[2]
    if "norm" in word or word.startswith("ln"):
        word = "norm"
    elif component == "mtp":
        word = architecture.aliases.get(word, (word,))[0]
    if not word:
        return None
    role = role_of(f"{component}.{word}")
    may_be_linear = role.is_matrix and path != named and not _is_position_table(role)
    return NameRule((role._replace(is_matrix=None if may_be_linear else False),))


def _is_position_table(role: Role) -> bool:
    """Embeddings of positions have two axes too, but are no linear layers."""
    return role.component != "mtp" and "embed" in (role.projection or "")
