"""The codec of the format: rows of one matrix to blocks of a quant code, and back.

With AWQ, an importance matrix scales columns: one scale for gate and up of a layer's experts.
Source: Kaden-Schutt/hipfire, `calibration` module and MiniMax branch at 02786be.
"""

from __future__ import annotations

from emitters.hipfire_hfq.spec import AWQ, CODES, EXACT, GATE_UP, alpha_of, column_scale, scales_of
from emitters.numerics import awq
from emitters.numerics.hfq import (
    block_header,
    decode_blocks,
    encode_blocks,
    first_bad_header,
    hfq_beyond,
)
from emitters.numerics.value_types import Array
from policy_dsl.diagnostics import PolicyError
from policy_dsl.formats import Context, Parts, Slack, Statistics, UnstorableError
from policy_dsl.plan import Module, Plan, coded_modules
from policy_dsl.sources.hfq_container import QUANT_CODES
from policy_dsl.treatments import Coded


def encode(values: Array, dtype: str, treatment: Coded) -> dict[str, Array]:
    """The blocks of these rows: weight, uint8 [blocks, bytes of a block].

    values: [rows, in], float32; not changed. treatment: a scheme of this format.
    Raises: UnstorableError with the row of a block whose scale or levels overflow; ValueError
    for another scheme.
    """
    code = _code(treatment)
    blocks = encode_blocks(values.reshape(-1), code)
    at = first_bad_header(block_header(blocks, code), code)
    if at >= 0:
        raise UnstorableError(at * QUANT_CODES[code].group // values.shape[-1])
    return {"weight": blocks}


def decode(parts: Parts, dtype: str, treatment: Coded, columns: int) -> Array:
    """float32 [rows, columns]: the weights that hipfire computes with, rotated back.

    parts: as `encode` gives them, whole rows. Rows that only fill up the last block are at the
    end.
    Raises: ValueError for another scheme, or blocks that are not whole rows.
    """
    blocks, code = _blocks(parts, treatment)
    count = len(blocks) * QUANT_CODES[code].group // columns * columns
    return decode_blocks(blocks, code, count).reshape(-1, columns)


def beyond(values: Array, parts: Parts, dtype: str, treatment: Coded, slack: Slack) -> Array:
    """The values [rows, in] that rounding to nearest would not have given these codes."""
    return hfq_beyond(values.reshape(-1), *_blocks(parts, treatment), slack).reshape(values.shape)


def _blocks(parts: Parts, treatment: Coded) -> tuple[Array, int]:
    """The blocks, uint8 [blocks, bytes of a block], and their quant code."""
    code = _code(treatment)
    return parts["weight"].reshape(-1, QUANT_CODES[code].nbytes), code


def _code(treatment: Coded) -> int:
    key = treatment.scheme, treatment.group_size
    if key not in CODES:
        raise ValueError(f"this format has no scheme {treatment}")
    return CODES[key]


def contents(plan: Plan, statistics: Statistics) -> dict[str, bytes]:
    """The stored scales of every layer that is coded with AWQ.

    Raises: PolicyError if the importance matrix is not one of this model.
    """
    scaled = {
        name: module
        for module, coded in coded_modules(plan.modules)
        if coded.method == AWQ and (name := column_scale(module.name)) is not None
    }
    return {
        f"{name}.weight": _scale(plan, module, statistics).stored.tobytes()
        for name, module in scaled.items()
    }


def context(plan: Plan, module: Module, source: int, statistics: Statistics) -> Context:
    """What an expert's columns are multiplied by before they are coded."""
    return Context(encode, _scale(plan, module, statistics).applied)


def _scale(plan: Plan, module: Module, statistics: Statistics) -> awq.ColumnScale:
    """The scale that gate and up of all experts of a module's layer share."""

    def computed() -> Array:
        gate = statistics.of_layer(GATE_UP[0], module).sums
        try:
            up = statistics.of_layer(GATE_UP[1], module).sums
        except PolicyError as error:
            # Both have the same inputs: without up's, gate's count for both.
            if error.diagnostics[0].code != "missing-imatrix-entry":
                raise
            up = None
        return awq.awq_scale(awq.gate_up_sums(gate, up), alpha_of(plan.policy))

    scale = statistics.once((AWQ, module.layer), computed)
    return awq.column_scale(scale, exact=scales_of(plan.policy) == EXACT)
