"""The numbers that stand before the codes of each block, looked at without decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from emitters.numerics.hfq import (
    first_bad_levels,
    first_bad_minmax,
    first_bad_scale,
    half_header,
    minmax_header,
)
from emitters.numerics.rounding import first_nonfinite
from emitters.numerics.value_types import VALUE_TYPES, Array
from emitters.tensor_io.read import Source
from policy_dsl.inventory import TensorInfo
from policy_dsl.sources.hfq_codes import QUANT_CODES
from policy_dsl.sources.hfq_container import HfqTensor

# Read at once: large enough for the disk, small enough for any machine.
_MOST_NBYTES = 8 * 2**20


class _Header(NamedTuple):
    """How blocks begin: `read` gives their numbers, `first_bad` the first wrong block."""

    read: Callable[[Array], Array]
    first_bad: Callable[[Array], int]
    wanted: str


_MINMAX = _Header(
    minmax_header, first_bad_minmax, "a finite scale above 0 and a finite smallest value"
)
_SCALE = _Header(
    partial(half_header, count=1), first_bad_scale, "a finite scale that is not negative"
)


def _levels(count: int) -> _Header:
    wanted = f"{count} finite levels in ascending order"
    return _Header(partial(half_header, count=count), first_bad_levels, wanted)


_HEADERS = {
    **dict.fromkeys((6, 7, 8, 9, 10, 11, 12, 13, 15, 17, 18), _MINMAX),
    **dict.fromkeys((3, 14), _SCALE),
    19: _levels(4),
    20: _levels(8),
    30: _levels(16),
}


def first_bad_block(blocks: Array, code: int) -> int:
    """The first block that no reader can compute with, or -1.

    blocks: uint8 [blocks, bytes], of a code that has a header.
    """
    header = _HEADERS[code]
    return header.first_bad(header.read(blocks))


def first_defect(source: Source, tensor: HfqTensor, *, positive: bool) -> str | None:
    """What is wrong with a tensor's first bad block or value; None if nothing is.

    positive: whether its values divide others, so that they must be above 0.
    Raises: PolicyError if the file cannot be read any more.
    """
    info, known = tensor.info, QUANT_CODES.get(tensor.code)
    if known is None or known.nbytes is None:
        return None
    step = _MOST_NBYTES // known.nbytes * known.nbytes
    for start in range(0, info.nbytes, step):
        stored = _stretch(source, info, start, min(step, info.nbytes - start))
        first = start // known.nbytes
        if info.dtype in VALUE_TYPES:
            found = _value_defect(stored, info.dtype, first, positive=positive)
        else:
            found = _block_defect(stored.reshape(-1, known.nbytes), tensor.code, first)
        if found is not None:
            return found
    return None


def _stretch(source: Source, info: TensorInfo, start: int, count: int) -> Array:
    return source.read(info.file or "", info.start + start, count)


def _value_defect(stored: Array, dtype: str, first: int, *, positive: bool) -> str | None:
    values = stored.view(VALUE_TYPES[dtype].storage)
    at = first_nonfinite(values, dtype)
    if at >= 0:
        return f"value {first + at} is no finite number"
    if positive and not (values > 0).all():
        return f"value {first + int((values > 0).argmin())} is not above 0"
    return None


def _block_defect(blocks: Array, code: int, first: int) -> str | None:
    header = _HEADERS.get(code)
    if header is None:
        return None
    numbers = header.read(blocks)
    at = header.first_bad(numbers)
    if at < 0:
        return None
    held = ", ".join(f"{number:g}" for number in numbers[at].tolist())
    return f"block {first + at} begins with {held}, and readers need {header.wanted}"
