"""The codec of the format: rows of one matrix to columns of codes and back, and stored values.

Source: vLLM 0.33.0, whose Marlin kernels have the zero point of symmetric groups built in.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from emitters.checkpoints import wrong_tensor
from emitters.gptq.spec import READ, RTN, SEARCHES, Storage, group_length
from emitters.numerics import Array, gptq
from emitters.numerics.column_weights import SearchWeights, search_weights
from emitters.numerics.gptq import GptqParts
from emitters.numerics.gptq_search import gptq_search
from emitters.tensor_io.files import Source, file_facts
from policy_dsl import formats
from policy_dsl.diagnostics import Diagnostic
from policy_dsl.formats import Claim, Claims, Context, Parts, Slack, Statistics, Tensors
from policy_dsl.plan import Module, Plan
from policy_dsl.treatments import Coded, coded

# What rounds to an infinity in float16.
_OVERFLOW = np.float32(65520)
_Columns = Array | slice


def encode(
    values: Array, dtype: str, treatment: Coded, weights: SearchWeights | None = None
) -> dict[str, Array]:
    """The stored parts of rows, values [rows, in] of value type `dtype`, rows % 32 == 0.

    Shapes as in `GptqParts`, zero points packed; weights: of the columns in a search for scales.
    Raises: UnstorableError with the row of values that float16 does not hold, or of a zero
    point that cannot be stored; ValueError for another scheme.
    """
    storage, bits, size = _storage(treatment), treatment.bits, treatment.group_size
    if treatment.method == RTN:
        # AutoRound's flow without a model computes in float32, whatever the weights are.
        symmetric = treatment.symmetric
        parts = gptq.gptq_rtn(values, dtype, bits=bits, group_size=size, symmetric=symmetric)
    else:
        grid = SEARCHES[treatment.method]
        parts = gptq_search(values, dtype, bits=bits, group_size=size, weights=weights, grid=grid)
    # First: where a scale is infinite, the zero point means nothing.
    _ensure_small(parts, treatment)
    version = storage.version
    if (at := gptq.first_unstorable_zero(parts.zeros, bits=bits, version=version)) >= 0:
        zero, cure = parts.zeros.reshape(-1)[at], "quantize it sym"
        # Version 2 has a zero point 0.
        if not zero:
            scheme = treatment.scheme.replace("int", "int-v2", 1)
            cure += f", or as {scheme} for readers that take version 2"
        raise formats.UnstorableError(at % len(values), f"it has the zero point {zero}; {cure}")
    qzeros = gptq.pack_zeros(parts.zeros, bits=bits, version=version)
    qweight = gptq.pack_columns(parts.codes, bits=bits)
    return {"qweight": qweight, "qzeros": qzeros, "scales": parts.scales}


def context(plan: Plan, module: Module, source: int, statistics: Statistics) -> Context:
    """The encoder of a matrix whose scales are searched with the importance of its columns.

    Raises: PolicyError if the importance matrix is another model's, or the search cannot take it.
    """
    how = coded(module.treatment)
    importance = statistics.of_matrix(module, source)
    try:
        weights = search_weights(
            importance, bits=how.bits, group_size=how.group_size, grid=SEARCHES[how.method]
        )
    except ValueError as error:
        cure = "take opt-rtn, or give an importance matrix of more text"
        raise statistics.unusable(module, str(error), cure) from None
    return Context(partial(encode, weights=weights))


def decode(parts: Parts, dtype: str, treatment: Coded, columns: int) -> Array:
    """float32 [rows, columns]: what readers on a CPU compute with, products in float16.

    Raises: ValueError for another scheme, or if the parts' shapes disagree.
    """
    stored, _, back = _stored(parts, treatment)
    return gptq.gptq_decode(stored, group_size=treatment.group_size)[:, back]


def beyond(values: Array, parts: Parts, dtype: str, treatment: Coded, slack: Slack) -> Array:
    """The values [rows, in] that rounding to nearest would not have given these codes."""
    stored, order, back = _stored(parts, treatment)
    width, own = (treatment.bits, treatment.group_size), np.ascontiguousarray(values[:, order])
    wrong = gptq.gptq_beyond(own, stored, width, slack, symmetric=treatment.symmetric)
    return wrong[:, back]


def _stored(parts: Parts, treatment: Coded) -> tuple[GptqParts, _Columns, _Columns]:
    """The parts, unpacked, columns group by group; these columns, and the way back to theirs."""
    order: _Columns = slice(None)
    zeros, back = _zeros(parts["qzeros"], treatment), order
    if READ[treatment.scheme].act_order:
        order = gptq.group_order(parts["g_idx"])
        back = np.argsort(order)
    codes = gptq.unpack_columns(parts["qweight"], bits=treatment.bits)
    return GptqParts(codes[:, order], zeros, parts["scales"]), order, back


def value_defects(folder: Path, tensors: Tensors, claims: Claims) -> Iterator[Diagnostic]:
    """Scales and zero points that no kernel computes with as they are described; all are read.

    Raises: PolicyError if a file cannot be read any more.
    """
    source = Source(folder, file_facts(folder, {tensor.file or "" for tensor in tensors.values()}))
    for name, claim in claims.items():
        for part, reason in _wrong_parts(source, tensors, name, claim):
            tensor = tensors[f"{name}.{part}"]
            yield wrong_tensor(tensor.file or "", tensor.name, reason)


def _wrong_parts(
    source: Source, tensors: Tensors, name: str, claim: Claim
) -> Iterator[tuple[str, str]]:
    def read(part: str, dtype: type[np.generic]) -> Array:
        tensor = tensors[f"{name}.{part}"]
        stored = source.read(tensor.file or "", tensor.start, tensor.nbytes)
        return stored.view(dtype).reshape(tensor.shape)

    coded = claim.treatment
    if not np.isfinite(read("scales", np.float16)).all():
        yield "scales", "a scale is not finite"
    if isinstance(coded, Coded) and coded.symmetric:
        zeros = _zeros(read("qzeros", np.int32), coded)
        if (zeros != 1 << (coded.bits - 1)).any():
            yield "qzeros", "it holds other zero points than those of symmetric groups"
    if isinstance(coded, Coded) and READ[coded.scheme].act_order:
        size = group_length(coded, claim.shape[-1])
        if not gptq.is_grouping(read("g_idx", np.int32), size):
            yield "g_idx", f"it does not number groups of {size} columns each"


def _zeros(qzeros: Array, treatment: Coded) -> Array:
    version = _storage(treatment).version
    return gptq.unpack_zeros(qzeros, bits=treatment.bits, version=version)


def _ensure_small(parts: GptqParts, treatment: Coded) -> None:
    """Raises: UnstorableError if readers, who round products to float16, see infinities."""
    zeros = parts.zeros.astype(np.float32)
    longest = np.maximum(zeros, np.float32((1 << treatment.bits) - 1) - zeros)
    if (np.abs(parts.scales.astype(np.float32)) * longest >= _OVERFLOW).any():
        # The code that is so far from the zero point may be one that no value has.
        seen = gptq.gptq_decode(parts, group_size=treatment.group_size)
        rows = np.flatnonzero(~np.isfinite(seen).all(axis=1))
        if rows.size:
            raise formats.UnstorableError(int(rows[0]))


def _storage(treatment: Coded) -> Storage:
    if treatment.scheme not in READ:
        raise ValueError(f"this format has no scheme {treatment}")
    return READ[treatment.scheme]


CODEC = formats.Codec(encode, decode, beyond, value_defects)
SOLVER = formats.Solver(context)
