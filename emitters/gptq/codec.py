"""The codec of the format: rows of one matrix to columns of codes and back, and stored values.

Source: vLLM 0.33.0, whose Marlin kernels have the zero point of symmetric groups built in.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from emitters.checkpoints import wrong_tensor
from emitters.gptq.spec import READ, RTN, SEARCHES, STORAGE, group_length
from emitters.numerics import Array, gptq
from emitters.numerics.column_weights import SearchWeights, search_weights
from emitters.numerics.gptq import GptqParts
from emitters.numerics.gptq_search import gptq_search
from emitters.tensor_io.files import Source, file_facts
from policy_dsl.diagnostics import Diagnostic
from policy_dsl.formats import Claim, Context, Parts, Slack, Statistics, Tensors, UnstorableError
from policy_dsl.inventory import TensorInfo
from policy_dsl.plan import Module, Plan
from policy_dsl.treatments import Coded, coded

# What rounds to an infinity in float16.
_OVERFLOW = np.float32(65520)


def encode(
    values: Array, dtype: str, treatment: Coded, weights: SearchWeights | None = None
) -> dict[str, Array]:
    """The stored parts of rows, values [rows, in] of value type `dtype`, rows % 32 == 0.

    Shapes as in `GptqParts`, zero points packed; weights: of the columns in a search for scales.
    Raises: UnstorableError with the row of values that float16 does not hold, or of a zero
    point that cannot be stored; ValueError for another scheme.
    """
    bits, size = _width(treatment), treatment.group_size
    if treatment.method == RTN:
        # AutoRound's flow without a model computes in float32, whatever the weights are.
        symmetric = treatment.symmetric
        parts = gptq.gptq_rtn(
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
    at = gptq.first_unstorable_zero(parts.zeros, bits=bits, version=version)
    if at >= 0:
        zero, cure = parts.zeros.reshape(-1)[at], "quantize it sym"
        # Version 2 has a zero point 0.
        if not zero:
            scheme = treatment.scheme.replace("int", "int-v2", 1)
            cure += f", or as {scheme} for readers that take version 2"
        raise UnstorableError(at % len(values), f"it has the zero point {zero}; {cure}")
    qzeros = gptq.pack_zeros(parts.zeros, bits=bits, version=version)
    qweight = gptq.pack_columns(parts.codes, bits=bits)
    return {"qweight": qweight, "qzeros": qzeros, "scales": parts.scales}


def context(plan: Plan, module: Module, source: int, statistics: Statistics) -> Context:
    """The encoder of a matrix whose scales are searched with the importance of its columns.

    Raises: PolicyError if the importance matrix is another model's, or the search cannot take it.
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

    Raises: ValueError for another scheme, or if the parts' shapes disagree.
    """
    stored, order = _stored(parts, treatment)
    values = gptq.gptq_decode(stored, group_size=treatment.group_size)
    return values if order is None else values[:, np.argsort(order)]


def beyond(values: Array, parts: Parts, dtype: str, treatment: Coded, slack: Slack) -> Array:
    """The values [rows, in] that rounding to nearest would not have given these codes."""
    stored, order = _stored(parts, treatment)
    width, symmetric = (treatment.bits, treatment.group_size), treatment.symmetric
    if order is None:
        return gptq.gptq_beyond(values, stored, width, slack, symmetric=symmetric)
    own = np.ascontiguousarray(values[:, order])
    return gptq.gptq_beyond(own, stored, width, slack, symmetric=symmetric)[:, np.argsort(order)]


def _stored(parts: Parts, treatment: Coded) -> tuple[GptqParts, Array | None]:
    """The parts, unpacked, columns group by group, and these columns' order.

    The order is None if the columns of a group are neighbours.
    """
    zeros = _zeros(parts["qzeros"], treatment)
    codes = gptq.unpack_columns(parts["qweight"], bits=treatment.bits)
    order = gptq.group_order(parts["g_idx"]) if READ[treatment.scheme].act_order else None
    return GptqParts(codes if order is None else codes[:, order], zeros, parts["scales"]), order


def value_defects(
    folder: Path, tensors: Tensors, claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """Scales and zero points that no kernel computes with as they are described; all are read.

    Raises: PolicyError if a file cannot be read any more.
    """
    source = Source(folder, file_facts(folder, {tensor.file or "" for tensor in tensors.values()}))
    for name, claim in claims.items():
        scales, zeros = tensors[f"{name}.scales"], tensors[f"{name}.qzeros"]
        if not np.isfinite(_read(source, scales, np.float16)).all():
            yield _wrong(scales, "a scale is not finite")
        coded = claim.treatment
        if not isinstance(coded, Coded):
            continue
        if coded.symmetric:
            held = _zeros(_read(source, zeros, np.int32), coded)
            if (held != 1 << (coded.bits - 1)).any():
                yield _wrong(zeros, "it holds other zero points than those of symmetric groups")
        if READ[coded.scheme].act_order:
            g_idx, size = tensors[f"{name}.g_idx"], group_length(coded, claim.shape[-1])
            if not gptq.is_grouping(_read(source, g_idx, np.int32), size):
                yield _wrong(g_idx, f"it does not number groups of {size} columns each")


def _read(source: Source, tensor: TensorInfo, dtype: type[np.generic]) -> Array:
    stored = source.read(tensor.file or "", tensor.start, tensor.nbytes)
    return stored.view(dtype).reshape(tensor.shape)


def _wrong(tensor: TensorInfo, reason: str) -> Diagnostic:
    return wrong_tensor(tensor.file or "", tensor.name, reason)


def _zeros(qzeros: Array, treatment: Coded) -> Array:
    """The zero points, unpacked. Raises: ValueError for another scheme."""
    bits = _width(treatment)
    return gptq.unpack_zeros(qzeros, bits=bits, version=READ[treatment.scheme].version)


def _first_too_large(parts: GptqParts, treatment: Coded) -> int:
    """The first row in which readers, who round products to float16, see infinities, or -1."""
    bits, zeros = _width(treatment), parts.zeros.astype(np.float32)
    longest = np.maximum(zeros, np.float32((1 << bits) - 1) - zeros)
    far = np.abs(parts.scales.astype(np.float32)) * longest >= _OVERFLOW
    if not far.any():
        return -1
    # The code that is so far from the zero point may be one that no value has.
    seen = gptq.gptq_decode(parts, group_size=treatment.group_size)
    rows = np.flatnonzero(~np.isfinite(seen).all(axis=1))
    return int(rows[0]) if len(rows) else -1


def _width(treatment: Coded) -> int:
    """The bits of a treatment. Raises: ValueError unless the format has its scheme."""
    if treatment.scheme not in READ:
        raise ValueError(f"this format has no scheme {treatment}")
    return treatment.bits
