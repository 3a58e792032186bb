"""The numbers before the codes of each block, looked at without decoding."""

from __future__ import annotations

from emitters.numerics.hfq import block_header, first_bad_header
from emitters.numerics.rounding import first_nonfinite
from emitters.numerics.value_types import VALUE_TYPES, Array
from emitters.tensor_io.read import Source
from policy_dsl.sources.hfq_codes import QUANT_CODES
from policy_dsl.sources.hfq_container import HfqTensor

# Read at once: large enough for the disk, small enough for any machine.
_MOST_NBYTES = 8 * 2**20
_WANTED = {
    "line": "a finite scale above 0 and a finite smallest value",
    "scale": "a finite scale that is not negative",
    "levels": "{n} finite levels in ascending order",
}


def first_bad_block(blocks: Array, code: int) -> int:
    """The first block that no reader can compute with, or -1.

    blocks: uint8 [blocks, bytes], of a code that has a header.
    """
    return first_bad_header(block_header(blocks, code), code)


def first_defect(source: Source, tensor: HfqTensor, *, positive: bool) -> str | None:
    """What is wrong with a tensor's first bad block or value; None if nothing is.

    positive: whether its values divide others, so that they must be above 0.
    Raises: PolicyError if the file cannot be read any more.
    """
    info, known = tensor.info, QUANT_CODES.get(tensor.code)
    if known is None or not known.nbytes:
        return None
    step = _MOST_NBYTES // known.nbytes * known.nbytes
    for start in range(0, info.nbytes, step):
        count, first = min(step, info.nbytes - start), start // known.nbytes
        stored = source.read(info.file or "", info.start + start, count)
        if info.dtype in VALUE_TYPES:
            defect = _value_defect(stored, info.dtype, first, positive=positive)
        elif known.header:
            defect = _block_defect(stored.reshape(-1, known.nbytes), tensor.code, first)
        else:
            defect = None
        if defect is not None:
            return defect
    return None


def _value_defect(stored: Array, dtype: str, first: int, *, positive: bool) -> str | None:
    values = stored.view(VALUE_TYPES[dtype].storage)
    at = first_nonfinite(values, dtype)
    if at >= 0:
        return f"value {first + at} is not a finite number"
    if positive and not (values > 0).all():
        return f"value {first + int((values > 0).argmin())} is not above 0"
    return None


def _block_defect(blocks: Array, code: int, first: int) -> str | None:
    numbers = block_header(blocks, code)
    at = first_bad_header(numbers, code)
    if at < 0:
        return None
    held = ", ".join(f"{number:g}" for number in numbers[at].tolist())
    wanted = _WANTED[QUANT_CODES[code].header].format(n=numbers.shape[1])
    return f"block {first + at} begins with {held}, and readers need {wanted}"
