"""Tensors of other shapes than the config means: which of the two is wrong, and where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.roles.config_values import bad_value
from policy_dsl.roles.expected import Expectation
from policy_dsl.roles.needs import Need

_MOST_EXAMPLES = 3


class Misfit(NamedTuple):
    """A tensor of another shape than its need has."""

    need: Need
    layer: int | None
    name: str
    shape: tuple[int, ...]


def misfit_findings(
    model_id: str, misfits: Iterable[Misfit], fitting: Collection[Need], expected: Expectation
) -> Iterator[Diagnostic]:
    """One finding for each size that differs.

    fitting: needs of which some tensor has the right shape, so that the config is right.
    """
    groups: dict[str, list[Misfit]] = defaultdict(list)
    for misfit in misfits:
        groups[_differing(misfit, expected)].append(misfit)
    right = {size for need in fitting for size in need.shape}
    for size, alike in groups.items():
        by_config = None if size in right else _config_finding(model_id, size, alike, expected)
        yield by_config or _shape_finding(alike, expected)


def _differing(misfit: Misfit, expected: Expectation) -> str:
    """The first size that is another one or unknown; of other axes altogether, the slot."""
    if len(misfit.shape) != len(misfit.need.shape):
        return misfit.need.slot
    axes = zip(misfit.need.shape, misfit.shape, strict=True)
    return next(size for size, held in axes if expected.meaning.computed(size) != held)


def _config_finding(
    model_id: str, size: str, alike: list[Misfit], expected: Expectation
) -> Diagnostic | None:
    """That the config is wrong: all tensors with this size have the same other one."""
    held = {_held(misfit, size) for misfit in alike}
    if len(held) != 1 or None in held:
        return None
    first, meaning = alike[0], expected.meaning
    absent, value = expected.absent_keys(size), meaning.computed(size)
    if absent:
        without = "" if value is None else f"; without it, {size} is {value}"
        why = f", on which the shape of {first.need.shown} depends{without}"
        key = " or ".join(absent)
        return diagnostic("missing-config-key", model=model_id, key=key, why=why)
    is_null = meaning.is_given(size) and meaning.given(size) is None
    # The embedding is what readers start from, and experts are counted by themselves.
    is_sure = size == expected.table.experts_key or _embed(alike) is not None
    if is_sure and not is_null:
        return None
    more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
    reason = f"it is {held.pop()} in {first.name}{more}"
    return bad_value(model_id, size, None if is_null else value, reason)


def _shape_finding(alike: list[Misfit], expected: Expectation) -> Diagnostic:
    first = _embed(alike) or alike[0]
    sizes = ((size, expected.meaning.computed(size)) for size in first.need.shape)
    wanted = ", ".join(size if size.isdecimal() else f"{size} = {n}" for size, n in sizes)
    found = diagnostic(
        "wrong-shape",
        name=first.name,
        shape=list(first.shape),
        wanted=f"[{wanted}] as the config says",
    )
    names = dict.fromkeys([first.name, *(misfit.name for misfit in alike)])
    return replace(found, count=len(names), examples=tuple(names)[:_MOST_EXAMPLES])


def _embed(alike: list[Misfit]) -> Misfit | None:
    return next((misfit for misfit in alike if misfit.need.slot == "embed"), None)


def _held(misfit: Misfit, size: str) -> int | None:
    """What a tensor has where its need has a size; None if it has other axes."""
    same_axes = len(misfit.shape) == len(misfit.need.shape)
    return misfit.shape[misfit.need.shape.index(size)] if same_axes else None
