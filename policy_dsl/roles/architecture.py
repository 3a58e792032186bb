"""The table of a model family: its names and what each is for, its config, what readers need.

architectures/<family>.yaml, with the parts of architectures/_parts.yaml that it includes.
`model.layers.{layer}.mlp.{up_proj,down_proj}.weight: mlp.*` is two names with a role each.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from policy_dsl import packaged_table
from policy_dsl.diagnostics import did_you_mean, fail
from policy_dsl.inventory import Inventory
from policy_dsl.policy import COMPONENTS, SINGLE_ROLES
from policy_dsl.roles.table_entries import (
    Arrangement,
    ConfigKey,
    Part,
    Spelled,
    arrangement,
    config_keys,
    fields_of,
    part_roles,
    placed,
)

TABLES = Path(__file__).parent.parent / "architectures"
# Keys of `mlx` that are read into names.
_RULES = ("names", "block")
# Keys of a table that are read into names and needs.
_READ = ("include", "top", "block", "ignored", "needs", "config", "aliases", "mlx", "block_of")
# Single roles that are linear weights; the others are never quantized as matrices.
_MATRIX_ROLES = frozenset({"router", "shared_expert_gate", "embed", "embed_per_layer", "lm_head"})
_MODEL = "{model}"
_NUMBERS = ("{layer}", "{expert}", "{n}")
_BLOCK = "{model}.layers.{layer}."
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_CLAUSE = re.compile(
    r"(not )?(?:(?:layer )?(in|from|last|every|at|listed|several) )?"
    r"(\w+)(?: (is|has|below) ([\w-]+))?"
)


@dataclass(frozen=True, slots=True, eq=False)
class Need:
    """A tensor that a model has once, or in each layer where `when` holds, and in no other.

    slot: its role, or its name below the block. shape: numbers and keys of the config, or `one if
    condition else other`; `key[layer]` is an entry of a list. Empty: not compared. because:
    condition -> why a layer must have it.
    """

    slot: str
    in_layers: bool
    shape: tuple[str, ...]
    when: str = ""
    optional: bool | str = False
    because: Mapping[str, str] = field(default_factory=dict)

    @property
    def by_layer(self) -> bool:
        """Whether a size depends on the layer."""
        return any(" else " in size or "[layer]" in size for size in self.shape)

    @property
    def shown(self) -> str:
        """The slot as messages name it."""
        return self.slot.replace(_MODEL, "model").removesuffix(".weight")


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


class Fusion(NamedTuple):
    """How one source tensor holds matrices of every expert, along its first axis.

    interleaved: rows of the projections take turns. transposed: stored [experts, in, out];
    `by shape`: so or the other way round.
    """

    interleaved: bool = False
    transposed: bool | str = False
    mxfp4: bool = False


@dataclass(frozen=True, slots=True)
class NameRule:
    """What a name means. Several roles: a fused tensor's, in order; none: it is not a weight.

    layer_at, expert_at: which of the numbers in the name they are. reason: why it is ignored.
    needs: what it fulfils, for each role. arranged: what mlx-lm makes of it.
    """

    roles: tuple[Role, ...]
    layer_at: int | None = None
    expert_at: int | None = None
    fusion: Fusion | None = None
    reason: str = ""
    needs: tuple[Need | None, ...] = (None,)
    arranged: Arrangement | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Modules:
    """What mlx-lm's classes make of a family's modules, by its names for them, as globs.

    model: what it calls `{model}`, also by model_type; empty: as published. bare: without a
    quantized form. plain, bits: what its own conversion leaves as it is, or gives more bits.
    keep_dtype: never cast.
    """

    model: str | Mapping[str, str] = ""
    bare: Sequence[str] = ()
    plain: Sequence[str] = ()
    bits: Mapping[str, int] = field(default_factory=dict)
    keep_dtype: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model family's table; what its keys mean: docs/extending.md.

    roles: all that its names can have; those below `elsewhere` (vision, MTP extras) come with a
    model. names: a name with `#` for each number -> its rule. needs: by slot. layers,
    experts_key, identity_experts, mtp_layers: canonical keys of its counts. numbers: how many there
    are of `{n}`. renamed: prefixes that transformers saves -> those of publishers. architectures,
    text_model_types, only_where: what a config must name for this table, or give a key as, where
    several are for one model_type; empty: anything.
    """

    family: str
    model_types: Sequence[str]
    roles: tuple[str, ...]
    aliases: Mapping[str, tuple[str, ...]]
    names: Mapping[str, NameRule] = field(repr=False)
    needs: Mapping[str, Need] = field(repr=False)
    config: Mapping[str, ConfigKey] = field(repr=False)
    where: Mapping[str, str] = field(repr=False)
    models: Sequence[str] = field(repr=False)
    layers: str = field(repr=False)
    experts_key: str | None = field(default=None, repr=False)
    identity_experts: str | None = field(default=None, repr=False)
    mtp_layers: str | None = field(default=None, repr=False)
    numbers: int = field(default=1, repr=False)
    elsewhere: Mapping[str, str] = field(default_factory=dict, repr=False)
    renamed: Mapping[str, str] = field(default_factory=dict, repr=False)
    targets: Mapping[str, Mapping[str, Any]] = field(repr=False)
    architectures: Sequence[str] = ()
    text_model_types: Sequence[str] = ()
    only_where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    mlx: Modules = field(default_factory=Modules, repr=False)

    @property
    def experts(self) -> tuple[str, ...]:
        """The names under which a config may say how many experts a layer has."""
        key = self.config.get(self.experts_key or "")
        return key.names if key else ()

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
        if target not in self.targets:
            return "none of its bundles has been loaded in a reader yet"
        return self.targets[target].get("refused")

    def facts(self, target: str) -> Mapping[str, Any]:
        """What a format has to know of the family; empty if its table does not name it."""
        return self.targets.get(target, {})


@cache
def families() -> tuple[str, ...]:
    """The names of all families that have a table, sorted."""
    return tuple(sorted(path.stem for path in TABLES.glob("[!_]*.yaml")))


@cache
def model_types() -> Mapping[str, tuple[str, ...]]:
    """The `model_type` of a config -> its families, those that ask for more first."""
    found: dict[str, list[str]] = defaultdict(list)
    for family in families():
        for each in _table(family)["model_types"]:
            found[each].append(family)
    return {each: tuple(sorted(alike, key=_is_for_all)) for each, alike in found.items()}


def family_of(config: Mapping[str, Any]) -> str | None:
    """The family that a config names, None if no table is for it."""
    kind = config.get("model_type")
    found = model_types().get(kind, ()) if isinstance(kind, str) else ()
    return next((family for family in found if _is_meant(architecture(family), config)), None)


def _is_meant(table: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether a config of its model_type has what the table asks for besides."""
    # What is absent is in no list.
    given = (config.get(key, table) in values for key, values in table.only_where.items())
    return names_one_of(config, table.architectures, table.text_model_types) and all(given)


def names_one_of(
    config: Mapping[str, Any], architectures: Sequence[str], text_model_types: Sequence[str]
) -> bool:
    """Whether a config names one of these classes and of these text models; empty: any."""
    classes, text = config.get("architectures"), config.get("text_config")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    # A stranger's config may hold anything there.
    held = classes if isinstance(classes, list) else (), (inner,)
    pairs = zip((architectures, text_model_types), held, strict=True)
    return all(not some or any(one in some for one in has) for some, has in pairs)


def _is_for_all(family: str) -> bool:
    return not {"architectures", "text_model_types", "only_where"} & _table(family).keys()


def facts_of(target: str, fact: str) -> Mapping[str, Any]:
    """Family -> what a format has to know of it by this name, of those that have it."""
    facts = {family: architecture(family).facts(target) for family in families()}
    return {family: known[fact] for family, known in facts.items() if fact in known}


@cache
def architecture(family: str) -> Architecture:
    """The table of a family. Raises: KeyError; ValueError or TypeError if it says what none can."""
    # Not by trying to open the file: a family's name comes from a policy.
    if family not in families():
        raise KeyError(family)
    table = _merged(family)
    names = _name_rules(table)
    roles = {role.name for rule in names.values() for role in rule.roles}
    arranged = (rule.arranged for rule in names.values() if rule.arranged)
    roles |= {role_of(role).name for role in part_roles(arranged)}
    modules = {key: word for key, word in table.get("mlx", {}).items() if key not in _RULES}
    return Architecture(
        family=family,
        roles=tuple(sorted(roles)),
        names=names,
        mlx=Modules(**modules),
        needs={need.slot: need for rule in names.values() for need in rule.needs if need},
        config=config_keys(table["config"]),
        aliases={alias: tuple(meant) for alias, meant in table["aliases"].items()},
        # A misspelt key would silently be a table without its entries: these must be fields.
        **{key: value for key, value in table.items() if key not in _READ},
    )


def architecture_of(inventory: Inventory) -> Architecture:
    """The table of the family that the config names. Raises: PolicyError if none is known."""
    kind, model = inventory.config.get("model_type"), inventory.id
    if not isinstance(kind, str):
        why = ", which names the architecture"
        raise fail("missing-config-key", model=model, key="model_type", why=why)
    if (family := family_of(inventory.config)) is not None:
        return architecture(family)
    notes = [f"known families: {', '.join(families())}"]
    if kind in (others := _table("_others")):
        # No other family is meant.
        notes, fix = [others[kind], *notes], None
    else:
        fix = did_you_mean(kind, model_types())
    raise fail("unknown-architecture", suggestion=fix, notes=notes, model=model, model_type=kind)


def _table(name: str) -> dict[str, Any]:
    return packaged_table(TABLES / f"{name}.yaml")


def _merged(family: str) -> dict[str, Any]:
    """A family's table with the parts it includes; what the family itself says, wins."""
    own, merged = _table(family), dict[str, Any]()
    for part in [*(_table("_parts")[name] for name in own["include"]), own]:
        for key, given in part.items():
            before, value = merged.get(key, {}), given
            if key == "config":
                # Fields that the family does not give stay as in its parts.
                value = {name: {**before.get(name, {}), **fields_of(given[name])} for name in given}
            if key == "mlx":
                value = {name: _joined(before.get(name), given[name]) for name in given}
            if key == "targets":
                value = {name: _known(before.get(name, {}), given[name]) for name in given}
            merged[key] = {**before, **value} if isinstance(value, Mapping) else value
    # Parts know facts for formats that take the family: whether one does, the family says.
    taken, named = merged["targets"], own.get("targets", {})
    merged["targets"] = {
        name: taken[name] for name in taken if name in named or "refused" in taken[name]
    }
    return merged


def _known(before: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a format knows of a family, and what another entry adds; it may end a refusal."""
    kept = {key: value for key, value in before.items() if key != "refused"}
    return {**kept, **{key: _joined(kept.get(key), facts[key]) for key in facts}}


def _joined(before: Any, value: Any) -> Any:
    if isinstance(value, Mapping) and isinstance(before, Mapping):
        return {**before, **value}
    return [*before, *value] if isinstance(value, list) and isinstance(before, list) else value


def role_of(text: str) -> Role:
    """The role of this name. Raises: ValueError if the closed vocabulary lacks it."""
    component, _, last = text.rpartition(".")
    single = last in SINGLE_ROLES
    if not last or (not single and component not in COMPONENTS):
        raise ValueError(f"{text} is not a role: neither a single role nor in a component")
    is_matrix = not single or last in _MATRIX_ROLES
    return Role(text, component or None, None if single else last, is_matrix)


def _name_rules(table: Mapping[str, Any]) -> dict[str, NameRule]:
    """Every name of a table, with `#` for each number, and its rule."""
    rules: dict[str, NameRule] = {}
    for pattern, rule in _patterns(table):
        numbers = [part for part in pattern.split(".") if part in _NUMBERS]
        at = {part: numbers.index(part) for part in numbers}
        for model in table["models"] if _MODEL in pattern else [""]:
            name = pattern.replace(_MODEL, model)
            key = name.replace("{layer}", "#").replace("{expert}", "#").replace("{n}", "#")
            # A literal number would be taken out of the names that are looked up.
            if "{" in key or any(part.isdecimal() for part in key.split(".")):
                raise ValueError(f"a name may hold only the numbers {_NUMBERS}: {name}")
            # The later entry would win in a mapping, and a tensor would quietly change its role.
            if key in rules:
                raise ValueError(f"two entries for {key}")
            arranged = placed(rule.arranged, pattern, model) if rule.arranged else None
            found = replace(rule, layer_at=at.get("{layer}"), expert_at=at.get("{expert}"))
            rules[key] = replace(found, arranged=arranged)
    for saved, published in table.get("renamed", {}).items():
        alike = [key for key in rules if key.startswith(published)]
        rules |= {saved + key.removeprefix(published): rules[key] for key in alike}
    return rules


def _patterns(table: Mapping[str, Any]) -> Iterator[tuple[str, NameRule]]:
    """The names that have roles, and those that are ignored; models and numbers in braces."""
    rules = [
        (prefix, below, _rule(meaning, met))
        for place, prefix in (("top", ""), ("block", table.get("block_of", _BLOCK)))
        for pattern, meaning in table[place].items()
        for below, met in _spelled(pattern)
    ]
    slots = {below: bool(prefix) for prefix, below, _ in rules}
    slots |= {role.name: bool(prefix) for prefix, _, rule in rules for role in rule.roles}
    needs = {}
    for pattern, entry in table.get("needs", {}).items():
        given = entry if isinstance(entry, Mapping) else {"shape": entry}
        fields = {**given, "shape": tuple(map(str, given["shape"]))}
        clauses(given.get("when", ""))
        for one in map(choices, fields["shape"]):
            for _, condition in one:
                clauses(condition)
        for slot, _ in _spelled(pattern):
            if slot not in slots:
                raise ValueError(f"needs: {slot} is neither a role nor a name")
            needs[slot] = Need(slot, slots[slot], **fields)
    arranged = _arrangements(table, {prefix + below: rule for prefix, below, rule in rules})
    for prefix, below, rule in rules:
        own = tuple(needs.get(role.name, needs.get(below)) for role in rule.roles)
        yield prefix + below, replace(rule, needs=own, arranged=arranged.pop(prefix + below))
    if arranged:
        raise ValueError(f"mlx: no tensor is called {next(iter(arranged))}")
    for pattern, reason in table.get("ignored", {}).items():
        for name, _ in _spelled(pattern):
            yield name, NameRule((), reason=reason, needs=())


def _arrangements(
    table: Mapping[str, Any], rules: Mapping[str, NameRule]
) -> dict[str, Arrangement]:
    """What mlx-lm makes of the tensors of these names; those without a rule stay as they are."""
    block = table.get("block_of", _BLOCK)
    # The reader's blocks are in its model, also where those of the source are in none.
    called = {name: name.replace(block, _BLOCK, 1) for name in rules}
    found = {name: Arrangement(_unchanged(called[name], rule)) for name, rule in rules.items()}
    for place, before, prefix in (("names", "", ""), ("block", block, _BLOCK)):
        for pattern, meaning in table.get("mlx", {}).get(place, {}).items():
            for at, (below, met) in enumerate(_spelled(pattern)):
                name = before + below
                roles = [role.name for role in rules[name].roles] if name in rules else [""]
                found[name] = arrangement(Spelled(prefix, below, met, at), meaning, roles)
    return found


def _unchanged(name: str, rule: NameRule) -> tuple[Part, ...]:
    if len(rule.roles) == 1:
        return (Part(name),)
    return tuple(Part(f"{name}.{role.projection}", role.name) for role in rule.roles)


def _rule(meaning: str | Mapping[str, Any], met: str) -> NameRule:
    if isinstance(meaning, str):
        return NameRule((role_of(meaning.replace("*", met)),))
    options = dict(meaning)
    roles = tuple(role_of(f"experts.{word}") for word in options.pop("experts"))
    return NameRule(roles, fusion=Fusion(**options))


def _spelled(pattern: str) -> Iterator[tuple[str, str]]:
    """Every name that a pattern with `{a,b}` means, and the last choice met."""
    # Every second part is a choice.
    parts = enumerate(_CHOICE.split(pattern))
    for words in product(*(part.split(",") if at % 2 else [part] for at, part in parts)):
        yield "".join(words), words[-2] if len(words) > 1 else ""


@cache
def choices(size: str) -> tuple[tuple[str, str], ...]:
    """A size of a need and the condition of each of its words, in order; the last has none."""
    parted = (choice.partition(" if ") for choice in size.split(" else "))
    return tuple((word, condition) for word, _, condition in parted)


@cache
def clauses(text: str) -> tuple[Clause, ...]:
    """The clauses of a condition, joined by `and`.

    `key`: true, or a number other than 0. `key is word`; of a list: its entry for the layer.
    `key has word`: a list does. `key below other`: both are numbers from 1, the first smaller.
    `several key`: a number above 1. `layer in key`, `layer from key`: it is listed, or not before
    it. `layer last key`: it is one of so many last ones. `layer listed key`: in a text of numbers;
    all but the first without one. `layer every key`, `layer at key`: each key-th one, counted from
    1 or from 0. Raises: ValueError.
    """
    parsed = []
    for part in filter(None, text.split(" and ")):
        matched = _CLAUSE.fullmatch(part.strip())
        if matched is None:
            raise ValueError(f"not a condition: {part}")
        negated, of_layer, key, is_word, word = matched.groups("")
        parsed.append(Clause(bool(negated), of_layer or is_word, key, word))
    return tuple(parsed)
