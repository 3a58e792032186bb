"""What weighs in the search for scales: mean squares of each column's inputs, if given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from emitters.gptq.schemes import RTN, SEARCHES
from emitters.numerics.gptq_weights import search_weights
from emitters.numerics.value_types import Array
from emitters.tensor_io.imatrix import Imatrix
from emitters.tensor_io.prepared import Prepared, Statistics
from policy_dsl.diagnostics import fail
from policy_dsl.plan import Plan, coded_modules
from policy_dsl.roles.published_names import expert_of
from policy_dsl.treatments import Coded, describe


def prepare(plan: Plan, statistics: Statistics) -> Prepared:
    """The importance of the columns of each module whose scales are searched.

    Raises: PolicyError if the importance matrix is not one of this model, or a search cannot
    take it.
    """
    if statistics.imatrix is None:
        return Prepared.nothing()
    return Prepared({}, {}, dict(_importance(plan, statistics.imatrix)))


def _importance(plan: Plan, imatrix: Imatrix) -> Iterator[tuple[str, Array]]:
    # One entry holds all experts of a layer: read once for all of them.
    read: dict[tuple[str, int | None], Array] = {}
    for module, coded in coded_modules(plan.modules):
        if coded.method not in SEARCHES:
            continue
        expert = expert_of(module.name)
        key = module.role, module.layer
        if key not in read:
            count = 1 if expert is None else plan.source_experts
            found = imatrix.sums(
                *key, n_matrices=count, columns=module.shape[-1], instead=_without(coded)
            )
            if expert is not None:
                # The file is about the model as it was before experts were pruned.
                found = found.of(plan.old_experts(module.layer))
            read = {key: found.importance()}
        weights = read[key][expert or 0]
        _check(module.name, coded, weights, imatrix)
        yield module.name, weights


def _without(coded: Coded) -> str:
    """The treatment by a method that needs no importance."""
    return f"{describe(replace(coded, method=RTN))} by {RTN}"


def _check(name: str, coded: Coded, weights: Array, imatrix: Imatrix) -> None:
    """Raises: PolicyError if the search of a module cannot take these weights."""
    try:
        search_weights(
            weights, bits=coded.bits, group_size=coded.group_size, grid=SEARCHES[coded.method]
        )
    except ValueError as error:
        raise fail(
            "bad-imatrix-entry",
            imatrix.span,
            path=str(imatrix.path),
            entry=name,
            reason=str(error),
            suggestion="take opt-rtn, or give an importance matrix of more text",
        ) from None
