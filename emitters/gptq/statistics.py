"""What weighs in the search for scales: mean squares of each column's inputs, if given."""

from __future__ import annotations

from functools import partial

from emitters.gptq.encode import encode
from emitters.gptq.schemes import SEARCHES
from emitters.numerics.gptq_weights import search_weights
from policy_dsl.formats import Context, Statistics
from policy_dsl.plan import Module, Plan
from policy_dsl.treatments import coded


def context(plan: Plan, module: Module, source: int, statistics: Statistics) -> Context:
    """The encoder of a matrix whose scales are searched with the importance of its columns.

    Raises: PolicyError if the importance matrix is not one of this model, or the search cannot
    take it.
    """
    treatment = coded(module.treatment)
    (importance,) = statistics.of_matrix(module, source).importance()
    try:
        weights = search_weights(
            importance,
            bits=treatment.bits,
            group_size=treatment.group_size,
            grid=SEARCHES[treatment.method],
        )
    except ValueError as error:
        cure = "take opt-rtn, or give an importance matrix of more text"
        raise statistics.unusable(module, str(error), cure) from None
    return Context(partial(encode, weights=weights))
