"""Sizes that readers take from a model's config: lengths of expert rows, counts of experts.

Source: jang 2.5.50, `load_jangtq` and `verify_jangtq_prestacked`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emitters.jangtq_prestack.names import MXTQ, projection_of
from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.plan import Plan
from policy_dsl.treatments import scheme_of

# Of these keys readers go by the first that is there and no 0.
_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "n_routed")
_INNER = ("moe_intermediate_size", "intermediate_size")
_TEXT = "text_config"


def flat(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries of a config, those of its text part included where it has none itself.

    Raises: ValueError if the text part is none.
    """
    text = config.get(_TEXT) or {}
    if not isinstance(text, Mapping):
        raise ValueError(f"{_TEXT} is {text!r}, and no part of a config")
    return {**text, **config}


def row_length(known: Mapping[str, Any], path: str) -> tuple[str, Any]:
    """The entry that tells the length of a module's rows, and its value. known: as `flat`.

    Readers take it from the model: in the last word of a row may be room.
    """
    inner = projection_of(path) == "down_proj"
    return _first(known, _INNER) if inner else ("hidden_size", known.get("hidden_size"))


def told_count(known: Mapping[str, Any]) -> tuple[str, Any]:
    """The entry by which readers count experts, and its value, None if there is none."""
    return _first(known, _COUNTS)


def counted(config: Mapping[str, Any], before: int, now: int) -> dict[str, Any]:
    """The config with another count of experts, wherever it tells it."""
    found = {
        key: now if key in _COUNTS and type(value) is int and value == before else value
        for key, value in config.items()
    }
    text = config.get(_TEXT)
    return found | ({_TEXT: counted(text, before, now)} if isinstance(text, Mapping) else {})


def ensure_told(config: Mapping[str, Any], plan: Plan, n_experts: int) -> None:
    """Raises: PolicyError unless the bundle's config tells readers the sizes of its experts."""
    try:
        known = flat(config)
    except ValueError as error:
        raise _wrong(plan, _TEXT, config[_TEXT], str(error)) from None
    key, value = told_count(known)
    if value is not None and value != n_experts:
        raise _wrong(plan, key, value, f"readers go by it, and there are {n_experts} experts")
    # One of each kind: there are tens of thousands of them where experts lie apart.
    lengths = {
        (projection_of(module.name), module.shape[-1]): module
        for module in plan.modules
        if scheme_of(module.treatment) == MXTQ
    }
    for module in lengths.values():
        key, value = row_length(known, module.name)
        if type(value) is not int or value != module.shape[-1]:
            length = f"rows of {module.shape[-1]} values"
            reason = f"readers go by it, and {module.name} has {length}"
            raise _wrong(plan, key, value, reason)


def _wrong(plan: Plan, key: str, value: Any, reason: str) -> PolicyError:
    shown = repr(value)[:60]
    return fail("bad-config-value", model=plan.model.id, key=key, value=shown, notes=[reason])


def _first(known: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    key = next((key for key in keys if known.get(key)), keys[-1])
    return key, known.get(key)
