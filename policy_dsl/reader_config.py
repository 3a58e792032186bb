"""config.json for its reader: what a source's config means, in the keys the reader looks for."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, reduce
from math import isclose, log
from operator import getitem
from pathlib import Path
from typing import Any

from policy_dsl import packaged_table
from policy_dsl.plan import Draft, Refusal
from policy_dsl.quantities import counted
from policy_dsl.roles.architecture import names_one_of
from policy_dsl.roles.config_facts import TIED, rewritten
from policy_dsl.roles.table_entries import ConfigKey, config_keys

TABLES = Path(__file__).parent / "readers"
_ROPE, _POSITIONS = "rope_scaling", "rope_parameters"
# How configs call the number of blocks that predict tokens, where no table has a key for it.
_MTP_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
# What is left of a block that predicts tokens when its matrices are gone.
_SPARE = frozenset({"norm", "bias", "router", "router_bias"})
_ROPE_TYPES = ("rope_type", "type")
# What transformers takes for a parameter of scaled positions that is absent.
_ROPE_DEFAULTS = {"original_max_position_embeddings": "max_position_embeddings"}
_LONGEST_VALUE = 60
_KEY = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Level:
    """The keys that a reader looks for in one mapping of a config.

    required: what it does not start without. assumes: the others, with what it takes where they
    are absent. nullable: keys whose null it takes for absence.
    """

    required: Sequence[str]
    assumes: Mapping[str, ConfigKey]
    nullable: Sequence[str] = ()

    def takes_null(self, key: str) -> bool:
        """Whether a reader takes null for absence: then null is assumed, or keys decide."""
        if key in self.nullable or key not in self.assumes:
            return key in self.nullable
        defaults = self.assumes[key].defaults
        return not defaults or not isinstance(defaults[0], int | float | str | list)


@dataclass(frozen=True, kw_only=True)
class ReaderKind:
    """What a reader's code for some model types takes from a config, and what it does anyway.

    text_model_types, architectures: those of a config, where they decide; empty: any other.
    required, assumes, nullable: as of `Level`, keys of the config itself. inside: a mapping in
    it, with keys of its own. also: key -> where else the reader looks for it. only: key -> the
    values that it computes with, whatever the config says, or a default that other keys decide.
    near: the same of keys that change the results a little.
    flat: whether the keys inside may be at the top. rope_parameters: the keys that it looks for
    in this mapping alone, with those of scaled positions. called: model_type, or class -> how it
    must be called. reworded: keys that it takes only in the words of the family's table.
    ropes: ways to scale positions that it knows; None: all. ropes_only: parameters that it does
    not read -> values that change nothing. biases: the last word of a linear -> the key that
    announces its bias, or True; None: not looked at. cannot, differs: condition on the config ->
    why no model of it runs, or in what its answers differ. unused: what it reads and no config
    here sets.
    """

    model_types: Sequence[str]
    text_model_types: Sequence[str] = ()
    architectures: Sequence[str] = ()
    required: Sequence[str] = ()
    assumes: Mapping[str, Any] = field(default_factory=dict)
    nullable: Sequence[str] = ()
    inside: str | None = None
    flat: bool = False
    called: Mapping[str, str] = field(default_factory=dict)
    reworded: Sequence[str] = ()
    inside_required: Sequence[str] = ()
    inside_assumes: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    near: Mapping[str, Any] = field(default_factory=dict)
    rope_parameters: Sequence[str] = ()
    ropes: Sequence[str] | None = None
    all_ropes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ropes_only: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    biases: Mapping[str, str | bool] | None = None
    cannot: Mapping[str, str] = field(default_factory=dict)
    differs: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def top(self) -> Level:
        """The keys of the config itself."""
        return Level(self.required, config_keys(self.assumes), self.nullable)

    @cached_property
    def nested(self) -> Level:
        """The keys of the mapping `inside`."""
        return Level(self.inside_required, config_keys(self.inside_assumes), self.nullable)

    def rope(self, name: str) -> Level:
        """The parameters of a way to scale positions that it knows."""
        parameters = self.all_ropes[name] if name in (self.ropes or ()) else {}
        required = [key for key, value in parameters.items() if value == "required"]
        others = {key: value for key, value in parameters.items() if key not in required}
        return Level(required, config_keys(others))


@cache
def reader_kinds(reader: str) -> Mapping[str, ReaderKind]:
    """The kinds of a reader's table, by their names; TypeError for a key that means nothing."""
    table = packaged_table(TABLES / f"{reader}.yaml")
    ropes, ropes_only = table.get("ropes", {}), table.get("ropes_only", {})
    return {
        name: ReaderKind(**{"ropes_only": ropes_only, **kind}, all_ropes=ropes)
        for name, kind in table["kinds"].items()
    }


def reader_kind(reader: str, config: Mapping[str, Any]) -> ReaderKind | None:
    """What a reader has for models of such a config; None if its table does not say."""
    kinds = reader_kinds(reader).values()
    alike = [kind for kind in kinds if config.get("model_type") in kind.model_types]
    # Those that ask for more first.
    alike.sort(key=lambda kind: not (kind.architectures or kind.text_model_types))
    fitting = (
        kind for kind in alike if names_one_of(config, kind.architectures, kind.text_model_types)
    )
    return next(fitting, None)


def written_config(plan: Draft, *readers: str) -> dict[str, Any]:
    """The source's config with the keys that these readers need and that it lacks.

    Added is what a reader requires, or would assume otherwise than the source means, and does
    not find where it looks. Keys that are there stay, in their order, with their values; but a
    null that the reader cannot take is filled in, the count of MTP blocks is 0 if the bundle
    has none, and a head that the bundle has is not tied.
    """
    config = _following(plan)
    for reader in readers:
        if kind := reader_kind(reader, config):
            config = _Reading(plan, kind).completed(config)
    return config


def refused(plan: Draft, reader: str, runtime: str) -> Iterator[Refusal]:
    """Why a runtime that reads configs as `reader` does cannot compute what this one means."""
    kind = reader_kind(reader, plan.model.config)
    if kind is None:
        return
    reading = _Reading(plan, kind)
    reading.completed(_following(plan))
    reasons = [*reading.unmet, *reading.ropes(), *reading.limits(kind.only), *reading.biases()]
    reasons += reading.said(kind.cannot)
    # The same key may be looked for in several places.
    for reason in dict.fromkeys(reasons):
        yield Refusal("", runtime, reason, "fatal")
    for near in (*reading.said(kind.differs), *reading.limits(kind.near)):
        yield Refusal("", runtime, near, "inexact")


def _following(plan: Draft) -> dict[str, Any]:
    """The config with what follows from the tensors that the bundle has, in place."""
    table, roles = plan.model.architecture, {module.role for module in plan.modules}
    mtp = table.config.get(table.mtp_layers or "")
    changed: dict[str, Any] = {}
    # Norms and routers alone are not a block.
    if all(role[4:] in _SPARE for role in roles if role.startswith("mtp.")):
        changed |= dict.fromkeys((*_MTP_COUNTS, *(mtp.names if mtp else ())), 0)
    # A text model inside may say otherwise than the whole one.
    changed[TIED] = plan.model.tied and "lm_head" not in roles
    config = plan.model.config
    return rewritten(config, lambda key, value: value if value is None else changed.get(key, value))


@dataclass
class _Reading:
    """A plan's config, as one kind of reader sees it."""

    plan: Draft
    kind: ReaderKind
    unmet: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._facts = self.plan.model.facts
        has_head = any(module.role == "lm_head" for module in self.plan.modules)
        self._tied = self.plan.model.tied and not has_head
        rope = self._facts.value(_ROPE)
        self._rope: Mapping[str, Any] = rope if isinstance(rope, Mapping) else {}
        self._rope_types = [str(self._rope[key]) for key in _ROPE_TYPES if self._rope.get(key)]
        self._scaled = self._rope_types[0] if self._rope_types else "default"

    def value(self, key: str) -> Any:
        """What the config means by a key, in this bundle."""
        return self._tied if key == TIED else self._facts.value(key)

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with what the reader needs; what cannot be known is in `unmet`."""
        written, inside = self._level(config, self.kind.top), self.kind.inside
        if (name := self.kind.called.get(str(config.get("model_type")))) is not None:
            written["model_type"] = name
        if isinstance(classes := config.get("architectures"), list):
            called = self.kind.called
            written["architectures"] = [called.get(str(one), one) for one in classes]
        if inside is None:
            return self._with_positions(written)
        if isinstance(text := written.get(inside), Mapping):
            written[inside] = self._with_positions(self._level(text, self.kind.nested))
        elif self.kind.flat:
            return self._with_positions(self._level(written, self.kind.nested))
        else:
            self.unmet.append(f"it needs `{inside}` in config.json")
        return written

    def _level(self, config: Mapping[str, Any], level: Level) -> dict[str, Any]:
        written = dict(config)
        keys: dict[Any, None] = dict.fromkeys((*level.required, *level.assumes))
        keys.pop(self.kind.inside, None)
        for key in keys:
            seen = self._seen(config, key)
            if key == _ROPE and isinstance(seen, Mapping):
                if key in written:
                    written[key] = self._completed_rope(seen)
            elif seen is None:
                self._add(written, key, level)
            elif (meant := self.value(key)) is None or meant == seen:
                continue
            elif key in self.kind.reworded:
                written[key] = meant
            else:
                what = f"`{key}` {seen!r} from config.json, which means {meant!r}"
                self.unmet.append(f"it takes {what}")
        return written

    def _seen(self, config: Mapping[str, Any], key: str) -> Any:
        """What is where the reader looks for a key."""
        seen = config.get(key)
        if seen is None and key in self.kind.also:
            # What is on the way may be anything.
            with suppress(KeyError, TypeError):
                seen = reduce(getitem, self.kind.also[key].split("."), config)
        return seen

    def _add(self, written: dict[str, Any], key: str, level: Level) -> None:
        """The key with what is meant, if the reader would not take that by itself."""
        value = self._completed_rope(self._rope) if key == _ROPE else self.value(key)
        is_required, takes_null = key in level.required, level.takes_null(key)
        # A null in the config is no absence for a reader that does not take it for one.
        is_needed = is_required or (key in written and not takes_null)
        if value is None and not takes_null:
            if is_needed:
                self.unmet.append(f"it needs `{key}` in config.json, and nothing says what it is")
        elif is_needed or self._assumed(level, key) != value:
            written[key] = value

    def _assumed(self, level: Level, key: str) -> Any:
        return self._facts.first(level.assumes[key].defaults) if key in level.assumes else None

    def _completed_rope(self, rope: Mapping[str, Any]) -> dict[str, Any] | None:
        """Scaled positions with the parameters that the reader would take for others."""
        written, known = dict(rope), self.kind.rope(self._scaled)
        for key in (*known.required, *known.assumes) if rope else ():
            value = self._rope_parameter(key)
            if written.get(key) is None and value not in (None, self._assumed(known, key)):
                written[key] = value
        return written or None

    def _with_positions(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config with all of positions in the only mapping where the reader looks."""
        if keys := self.kind.rope_parameters:
            given = config.get(_POSITIONS)
            written = dict(given) if isinstance(given, Mapping) else {}
            written |= self._completed_rope(self._rope) or {}
            meant = {key: self.value(key) for key in keys}
            written |= {key: value for key, value in meant.items() if value is not None}
            config[_POSITIONS] = written
        return config

    def _rope_parameter(self, key: str) -> Any:
        value = self._rope.get(key)
        # Without the sizes of training, positions are scaled from those of the config.
        return self.value(_ROPE_DEFAULTS[key]) if value is None and key in _ROPE_DEFAULTS else value

    def ropes(self) -> Iterator[str]:
        """Ways to scale positions that the reader does not know."""
        rope, called, known = self._rope, self._scaled, self.kind.ropes
        if known is None:
            return
        if any(isinstance(value, Mapping) for value in rope.values()):
            yield "it has one way to scale positions for all layers"
        elif len(set(self._rope_types)) > 1:
            yield f"{' and '.join(_ROPE_TYPES)} of `rope_scaling` differ"
        elif called in known:
            required, only = self.kind.rope(called).required, self.kind.ropes_only
            missing = [key for key in required if self._rope_parameter(key) is None]
            unread = [key for key in only if rope.get(key) not in (*only[key], self._usual(key))]
            yield from (f"it needs `{key}` of `{called}` positions" for key in missing)
            yield from (f"it does not read `{key}` of `{called}` positions" for key in unread)
        elif called != "default":
            yield f"it does not scale positions as `{called}` does"

    def _usual(self, key: str) -> Any:
        """The value of a parameter that says only what every reader computes by itself."""
        given, factor = self._rope.get(key), self._rope.get("factor")
        if key != "attention_factor" or "mscale" in self._rope or not given or not factor:
            return None
        return given if isclose(given, 0.1 * log(factor) + 1, rel_tol=1e-6) else None

    def limits(self, values: Mapping[str, Any]) -> Iterator[str]:
        """Values that the reader does not compute with: others than these."""
        for key, only in values.items():
            allowed, meant = only, self.value(key)
            if not isinstance(only, list):
                defaults = config_keys({key: {"default": only}})[key].defaults
                allowed = [self._facts.first(defaults)]
            if meant is not None and meant not in allowed:
                wanted, shown = " or ".join(map(str, allowed)), str(meant)
                shown = shown if len(shown) <= _LONGEST_VALUE else f"{shown[: _LONGEST_VALUE - 1]}…"
                yield f"it computes with `{key}` {wanted}, and this model has {shown}"

    def biases(self) -> Iterator[str]:
        """Biases that the reader has no place for, or that it looks for in vain."""
        named = self.kind.biases
        if named is None:
            return
        inside = [module for module in self.plan.modules if module.layer is not None]
        held = Counter(
            module.name.removesuffix(".bias").rpartition(".")[2]
            for module in inside
            if module.role == "bias"
        )
        # A model may have none of the linears that the reader wants biases of.
        there = {module.name.removesuffix(".weight").rpartition(".")[2] for module in inside}
        wanted = {word for word, by in named.items() if by is True or self.value(str(by)) is True}
        if spare := {word: count for word, count in held.items() if word not in wanted}:
            what = f"{counted(sum(spare.values()), 'bias', 'biases')} of {', '.join(spare)}"
            keys = sorted({str(named[word]) for word in spare if word in named})
            unless = f" unless config.json says `{keys[0]}: true`" if keys else ""
            yield f"it has no place for {what}{unless}"
        if missing := sorted((wanted & there) - set(held)):
            yield f"it needs biases of {', '.join(missing)}, and the model has none"

    def said(self, reasons: Mapping[str, str]) -> Iterator[str]:
        """What is said of the conditions that hold, with values for keys in braces."""
        for condition, reason in reasons.items():
            if self._facts.satisfies(condition):
                yield _KEY.sub(lambda key: str(self.value(key[1])), reason)
