"""config.json for its reader: what a source's config means, in the keys the reader looks for.

plan, reader ── written_config ──> the config with what it lacks, refused ──> what it cannot say
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from policy_dsl.plan import Plan, Refusal
from policy_dsl.quantities import counted
from policy_dsl.roles.config_facts import is_whole
from policy_dsl.roles.config_keys import ConfigKey
from policy_dsl.roles.reader_tables import Level, ReaderKind, reader_kind

_TIED, _ROPE = "tie_word_embeddings", "rope_scaling"
_TEXT = "text_config"
# What is left of a block that predicts tokens when its matrices are gone.
_SPARE = frozenset({"norm", "bias", "router", "router_bias"})
_ROPE_TYPES = ("rope_type", "type")
# What transformers takes for a parameter of scaled positions that is absent.
_ROPE_DEFAULTS = {"original_max_position_embeddings": "max_position_embeddings"}


def written_config(plan: Plan, *readers: str) -> dict[str, Any]:
    """The source's config with the keys that these readers need and that it lacks.

    A key is added only if a reader requires it, or would assume something else than the source
    means, and only if the source does not have it where the reader looks. Keys that are there
    stay, in their order, with their values; but a null that the reader cannot take is filled
    in, the count of MTP blocks is 0 if the bundle has none, and a head that the bundle has is
    not tied.
    """
    config = _following(plan, dict(plan.model.config))
    for reader in readers:
        kind = reader_kind(reader, config.get("model_type"))
        if kind is not None:
            config = _Reading(plan, kind).completed(config)
    return config


def refused(plan: Plan, reader: str, runtime: str) -> Iterator[Refusal]:
    """Why a runtime that reads configs as `reader` does cannot compute what this one means."""
    kind = reader_kind(reader, plan.model.config.get("model_type"))
    if kind is None:
        return
    reading = _Reading(plan, kind)
    reading.completed(_following(plan, dict(plan.model.config)))
    reasons = [*reading.unmet, *reading.ropes(), *reading.limits(), *reading.biases()]
    # The same key may be looked for in several places.
    for reason in dict.fromkeys(reasons):
        yield Refusal(runtime, reason, fatal=True)
    window = reading.window()
    if window is not None:
        yield Refusal(runtime, window)


def _following(plan: Plan, config: dict[str, Any]) -> dict[str, Any]:
    """The config with what follows from the tensors that the bundle has, in place."""
    table, roles = plan.model.architecture, {one.role for one in plan.modules}
    mtp = table.config.get(table.mtp_layers or "")
    changed: dict[str, Any] = {}
    # Norms and routers alone are not a block.
    if mtp is not None and all(role.partition(".")[2] in _SPARE for role in roles if _is_mtp(role)):
        changed |= dict.fromkeys(mtp.names, 0)
    if "lm_head" in roles:
        changed[_TIED] = False
    return _replaced(config, changed)


def _is_mtp(role: str) -> bool:
    return role.startswith("mtp.")


def _replaced(config: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    found = {
        key: changed[key] if key in changed and value else value for key, value in config.items()
    }
    text = found.get(_TEXT)
    return found | ({_TEXT: _replaced(text, changed)} if isinstance(text, Mapping) else {})


@dataclass
class _Reading:
    """A plan's config, as one kind of reader sees it."""

    plan: Plan
    kind: ReaderKind
    unmet: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        model = self.plan.model
        self._facts = model.facts
        has_head = any(one.role == "lm_head" for one in self.plan.modules)
        self._decided: dict[str, Any] = {_TIED: model.tied and not has_head}

    def value(self, key: str) -> Any:
        """What the config means by a key, in this bundle."""
        return self._decided[key] if key in self._decided else self._facts.value(key)

    def completed(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config with what the reader needs; what cannot be told is in `unmet`."""
        found = self._level(config, self.kind.top, config)
        inside = self.kind.inside
        if inside is not None:
            text = found.get(inside)
            if not isinstance(text, Mapping):
                self.unmet.append(f"it needs `{inside}` in config.json")
                return found
            found[inside] = self._level(text, self.kind.nested, text)
        return found

    def _level(
        self, config: Mapping[str, Any], level: Level, place: Mapping[str, Any]
    ) -> dict[str, Any]:
        found = dict(config)
        for key in level.keys:
            if key == self.kind.inside:
                continue
            seen = _seen(place, key, self.kind.also.get(key))
            if key == _ROPE and isinstance(seen, Mapping):
                if key in found:
                    found[key] = self._completed_rope(seen)
            elif seen is not None:
                self._compare(key, seen)
            else:
                self._add(found, key, level)
        return found

    def _add(self, found: dict[str, Any], key: str, level: Level) -> None:
        """The key with what is meant, if the reader would not take that by itself."""
        value = self._completed_rope(self._rope()) if key == _ROPE else self.value(key)
        needed = level.must_have(key, is_null=key in found)
        if value is not None:
            if needed or self._assumed(level, key) != value:
                found[key] = value
        elif key in level.required and level.takes_null(key):
            found.setdefault(key, None)
        elif needed:
            self.unmet.append(f"it needs `{key}` in config.json, and nothing tells its value")

    def _compare(self, key: str, seen: Any) -> None:
        meant = self.value(key)
        if meant is not None and meant != seen:
            self.unmet.append(f"it takes `{key}` {seen!r} from config.json, which means {meant!r}")

    def _assumed(self, level: Level, key: str) -> Any:
        assumed = level.assumes.get(key)
        return None if assumed is None else self._facts.first(assumed.defaults)

    def _rope(self) -> Mapping[str, Any]:
        rope = self.value(_ROPE)
        return rope if isinstance(rope, Mapping) else {}

    def _rope_type(self) -> str:
        rope = self._rope()
        return str(next((rope[key] for key in _ROPE_TYPES if rope.get(key)), "default"))

    def _completed_rope(self, rope: Mapping[str, Any]) -> dict[str, Any] | None:
        """Scaled positions with the parameters that the reader would take for others."""
        ropes = self.kind.ropes or {}
        found, known = dict(rope), ropes.get(self._rope_type(), Level())
        for key in known.keys if rope else ():
            value = self._rope_parameter(key)
            if found.get(key) is None and value not in (None, self._assumed(known, key)):
                found[key] = value
        return found or None

    def _rope_parameter(self, key: str) -> Any:
        value = self._rope().get(key)
        # Without the sizes of training, positions are scaled from those of the config.
        return self.value(_ROPE_DEFAULTS[key]) if value is None and key in _ROPE_DEFAULTS else value

    def ropes(self) -> Iterator[str]:
        """Ways to scale positions that the reader does not know."""
        rope, called, known = self._rope(), self._rope_type(), self.kind.ropes
        if known is None:
            return
        if any(isinstance(value, Mapping) for value in rope.values()):
            yield "it has one way to scale positions for all layers"
        elif len({rope[key] for key in _ROPE_TYPES if rope.get(key)}) > 1:
            yield f"{' and '.join(_ROPE_TYPES)} of `rope_scaling` differ"
        elif called in known:
            yield from self._rope_parameters(called, known[called])
        elif called != "default":
            yield f"it does not scale positions as `{called}` does"

    def _rope_parameters(self, called: str, known: Level) -> Iterator[str]:
        for key in known.required:
            if self._rope_parameter(key) is None:
                yield f"it needs `{key}` of `{called}` positions"
        for key, values in self.kind.ropes_only.items():
            if self._rope().get(key) not in values:
                yield f"it does not read `{key}` of `{called}` positions"

    def limits(self) -> Iterator[str]:
        """Values that the reader does not compute with, whatever the config says."""
        for key, only in self.kind.only.items():
            allowed = (self._facts.first(only.defaults),) if isinstance(only, ConfigKey) else only
            meant = self.value(key)
            if meant is not None and meant not in allowed:
                wanted = " or ".join(str(value) for value in allowed)
                yield f"it computes with `{key}` {wanted}, and this model has {_short(meant)}"

    def biases(self) -> Iterator[str]:
        """Biases that the reader has no place for, or that it looks for in vain."""
        named, held = self.kind.biases, self._held_biases()
        if named is None:
            return
        wanted = {word for word, by in named.items() if by is True or self.value(str(by)) is True}
        if spare := {word: count for word, count in held.items() if word not in wanted}:
            what = f"{counted(sum(spare.values()), 'bias', 'biases')} of {', '.join(spare)}"
            keys = sorted({str(named[word]) for word in spare if word in named})
            unless = f" unless config.json says `{keys[0]}: true`" if keys else ""
            yield f"it has no place for {what}{unless}"
        if missing := sorted(wanted - set(held)):
            yield f"it needs biases of {', '.join(missing)}, and the model has none"

    def _held_biases(self) -> dict[str, int]:
        held: dict[str, int] = {}
        for module in self.plan.modules:
            if module.role == "bias" and module.layer is not None:
                word = module.name.removesuffix(".bias").rpartition(".")[2]
                held[word] = held.get(word, 0) + 1
        return held

    def window(self) -> str | None:
        """That longer texts come out differently, where windows are meant and ignored."""
        size, most = self.value("sliding_window"), self.value("max_position_embeddings")
        if self.kind.windows or self.value("use_sliding_window") is False:
            return None
        if not (is_whole(size) and is_whole(most)) or not 0 < size < most:
            return None
        longer = f"texts of more than {size} tokens come out differently"
        return f"it ignores `sliding_window`: {longer}"


def _seen(config: Mapping[str, Any], key: str, also: tuple[str, ...] | None) -> Any:
    found: Any = config.get(key)
    if found is None and also is not None:
        found = config
        for part in also:
            found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _short(value: Any) -> str:
    shown = str(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
