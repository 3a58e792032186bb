"""The codec of the format: rows of one matrix to blocks of a quant code, and back."""

from __future__ import annotations

from collections.abc import Mapping

from emitters.hipfire_hfq.headers import first_bad_block
from emitters.hipfire_hfq.spec import CODES
from emitters.numerics.hfq import decode_blocks, encode_blocks, hfq_beyond
from emitters.numerics.value_types import Array
from policy_dsl.formats import Slack, UnstorableError
from policy_dsl.sources.hfq_codes import QUANT_CODES
from policy_dsl.treatments import Coded


def encode(values: Array, dtype: str, treatment: Coded) -> dict[str, Array]:
    """The blocks of these rows: weight, uint8 [blocks, bytes of a block].

    values: [rows, in], float32; not changed. treatment: a scheme of this format.
    Raises: UnstorableError with the row of a block whose scale or levels overflow; ValueError
    for another scheme.
    """
    code = _code(treatment)
    blocks = encode_blocks(values.reshape(-1), code)
    at = first_bad_block(blocks, code)
    if at >= 0:
        group = QUANT_CODES[code].group or 1
        raise UnstorableError(at * group // values.shape[-1])
    return {"weight": blocks}


def decode(parts: Mapping[str, Array], dtype: str, treatment: Coded, columns: int) -> Array:
    """float32 [rows, columns]: the weights that hipfire computes with, rotated back.

    parts: as `encode` gives them, whole rows. Rows that only fill up the last block are at the
    end.
    Raises: ValueError for another scheme, or blocks that are no whole rows.
    """
    code = _code(treatment)
    block = QUANT_CODES[code]
    blocks = parts["weight"].reshape(-1, block.nbytes or 1)
    count = len(blocks) * (block.group or 1) // columns * columns
    return decode_blocks(blocks, code, count).reshape(-1, columns)


def beyond(
    values: Array, parts: Mapping[str, Array], dtype: str, treatment: Coded, slack: Slack
) -> Array:
    """The values [rows, in] that rounding to nearest would not have given these codes.

    values: float32; parts: as `encode` gives them; slack: what was rounded before.
    Raises: ValueError as `decode` does.
    """
    code = _code(treatment)
    blocks = parts["weight"].reshape(-1, QUANT_CODES[code].nbytes or 1)
    return hfq_beyond(values.reshape(-1), blocks, code, slack).reshape(values.shape)


def _code(treatment: Coded) -> int:
    key = treatment.scheme, treatment.group_size
    if key not in CODES:
        raise ValueError(f"{treatment} is no scheme of this format")
    return CODES[key]
