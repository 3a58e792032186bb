"""The codec of the format: rows of one matrix to columns of codes, and back."""

from __future__ import annotations

from functools import partial

import numpy as np

from emitters.gptq.spec import READ, RTN, SEARCHES, STORAGE
from emitters.numerics.gptq import (
    GptqParts,
    first_unstorable_zero,
    gptq_beyond,
    gptq_decode,
    gptq_rtn,
    group_order,
    pack_columns,
    pack_zeros,
    unpack_columns,
    unpack_zeros,
)
from emitters.numerics.gptq_search import gptq_search
from emitters.numerics.gptq_weights import SearchWeights, search_weights
from emitters.numerics.value_types import Array
from policy_dsl.formats import Context, Parts, Slack, Statistics, UnstorableError
from policy_dsl.plan import Module, Plan
from policy_dsl.treatments import Coded, coded

# What rounds to an infinity in float16.
_OVERFLOW = np.float32(65520)


def encode(
    values: Array, dtype: str, treatment: Coded, weights: SearchWeights | None = None
) -> dict[str, Array]:
    """The stored parts of these rows: qweight, qzeros int32, scales float16.

    values: [rows, in] of value type `dtype`, not changed, rows % 32 == 0; weights: of the
    columns in a search for scales. Shapes as in `GptqParts`, zero points packed.
    Raises: UnstorableError with the row of values that float16 does not hold, or of a zero
    point that cannot be stored; ValueError for another scheme.
    """
    bits, size = _width(treatment), treatment.group_size
    if treatment.method == RTN:
        # AutoRound's flow without a model computes in float32, whatever the weights are.
        symmetric = treatment.symmetric
        parts = gptq_rtn(
            values, dtype, bits=bits, group_size=size, symmetric=symmetric, arithmetic="F32"
        )
    else:
        grid = SEARCHES[treatment.method]
        parts = gptq_search(values, dtype, bits=bits, group_size=size, weights=weights, grid=grid)
    version = STORAGE[treatment.scheme].version
    # First: where a scale is infinite, the zero point means nothing.
    row = _first_too_large(parts, treatment)
    if row >= 0:
        raise UnstorableError(row)
    at = first_unstorable_zero(parts.zeros, bits=bits, version=version)
    if at >= 0:
        zero, row = parts.zeros.reshape(-1)[at], at % len(values)
        raise UnstorableError(row, f"it has the zero point {zero}; {_cure(zero, treatment)}")
    qzeros = pack_zeros(parts.zeros, bits=bits, version=version)
    return {"qweight": parts.qweight, "qzeros": qzeros, "scales": parts.scales}


def context(plan: Plan, module: Module, source: int, statistics: Statistics) -> Context:
    """The encoder of a matrix whose scales are searched with the importance of its columns.

    Raises: PolicyError if the importance matrix is not one of this model, or the search cannot
    take it.
    """
    treatment = coded(module.treatment)
    bits, size, grid = treatment.bits, treatment.group_size, SEARCHES[treatment.method]
    (importance,) = statistics.of_matrix(module, source).importance()
    try:
        weights = search_weights(importance, bits=bits, group_size=size, grid=grid)
    except ValueError as error:
        cure = "take opt-rtn, or give an importance matrix of more text"
        raise statistics.unusable(module, str(error), cure) from None
    return Context(partial(encode, weights=weights))


def decode(parts: Parts, dtype: str, treatment: Coded, columns: int) -> Array:
    """float32 [rows, columns]: what readers on a CPU compute with, products in float16.

    parts: as `encode` gives them.
    Raises: ValueError for another scheme, or if the parts' shapes disagree.
    """
    order = _order(parts, treatment)
    stored, size = _stored(parts, treatment, order), treatment.group_size
    values = gptq_decode(stored, bits=_width(treatment), group_size=size)
    return values if order is None else values[:, np.argsort(order)]


def beyond(values: Array, parts: Parts, dtype: str, treatment: Coded, slack: Slack) -> Array:
    """The values [rows, in] that rounding to nearest would not have given these codes."""
    width = _width(treatment), treatment.group_size
    order = _order(parts, treatment)
    stored, symmetric = _stored(parts, treatment, order), treatment.symmetric
    if order is None:
        return gptq_beyond(values, stored, width, slack, symmetric=symmetric)
    own = np.ascontiguousarray(values[:, order])
    return gptq_beyond(own, stored, width, slack, symmetric=symmetric)[:, np.argsort(order)]


def _order(parts: Parts, treatment: Coded) -> Array | None:
    """The columns group by group, as the parts number them; None if they are neighbours."""
    return group_order(parts["g_idx"]) if READ[treatment.scheme].act_order else None


def _stored(parts: Parts, treatment: Coded, order: Array | None) -> GptqParts:
    """The parts with zero points unpacked, and with columns in this order."""
    bits, version = _width(treatment), READ[treatment.scheme].version
    zeros, words = unpack_zeros(parts["qzeros"], bits=bits, version=version), parts["qweight"]
    if order is not None:
        codes = np.ascontiguousarray(unpack_columns(words, bits=bits)[:, order])
        words = pack_columns(codes, bits=bits)
    return GptqParts(words, zeros, parts["scales"])


def _first_too_large(parts: GptqParts, treatment: Coded) -> int:
    """The first row in which readers, who round products to float16, see infinities, or -1."""
    bits, zeros = _width(treatment), parts.zeros.astype(np.float32)
    longest = np.maximum(zeros, np.float32((1 << bits) - 1) - zeros)
    far = np.abs(parts.scales.astype(np.float32)) * longest >= _OVERFLOW
    if not far.any():
        return -1
    # The code that is so far from the zero point may be one that no value has.
    seen = gptq_decode(parts, bits=bits, group_size=treatment.group_size)
    rows = np.flatnonzero(~np.isfinite(seen).all(axis=1))
    return int(rows[0]) if len(rows) else -1


def _cure(zero: int, treatment: Coded) -> str:
    """What to do about a zero point: 0 is one that version 2 has."""
    if zero:
        return "quantize it sym"
    scheme = treatment.scheme.replace("int", "int-v2", 1)
    return f"quantize it sym, or as {scheme} for readers that take version 2"


def _width(treatment: Coded) -> int:
    """The bits of a treatment. Raises: ValueError unless the format has its scheme."""
    if treatment.scheme not in READ:
        raise ValueError(f"this format has no scheme {treatment}")
    return treatment.bits
