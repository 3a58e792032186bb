"""The header of one safetensors file, from bytes to checked tensors.

Stricter than the reference reader: a name that appears twice, or cannot be printed, is refused.
Source: huggingface/safetensors 0.8, safetensors/src/tensor.rs, `SafeTensors::read_metadata`
and `Metadata::validate` (u64 little-endian length, JSON, then the tensors without a hole).
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import filterfalse
from math import prod
from operator import attrgetter
from typing import Any

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, fail, grouped
from policy_dsl.escaping import quoted, shown
from policy_dsl.inventory import DTYPE_BITS, TensorInfo

LENGTH_NBYTES = 8
MAX_HEADER_NBYTES = 100_000_000  # the reference reader's own limit
MAX_DIMENSIONS = 64
DAMAGED = "the file is damaged or incomplete: fetch it again, or write it again"
# A letter or two, the bits, perhaps how they are used.
_DTYPE = re.compile(r"[A-Z]{1,2}[0-9]{1,3}(_[A-Z0-9]{1,16})?")


class _NewerError(ValueError):
    """A tensor has a dtype that looks like one, and that this version does not know."""


class _Doubled(dict[str, Any]):
    """A JSON object in which the keys of `repeated` appear more than once."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        counts = Counter(key for key, _ in pairs)
        self.repeated = [key for key, count in counts.items() if count > 1]


def header_nbytes(prefix: bytes, *, file: str, file_nbytes: int) -> int:
    """Bytes of the JSON header after the length, by the file's first 8. Raises: PolicyError."""
    length, reason = int.from_bytes(prefix[:LENGTH_NBYTES], "little"), ""
    if file_nbytes < LENGTH_NBYTES:
        reason = f"it has only {file_nbytes} bytes" if file_nbytes else "it is empty"
    elif length > MAX_HEADER_NBYTES:
        reason = f"its header would have {length} bytes, over the limit of {MAX_HEADER_NBYTES}"
    elif length > file_nbytes - LENGTH_NBYTES:
        reason = f"its header of {length} bytes goes past its end at {file_nbytes} bytes"
    if reason:
        raise _not_safetensors(file, reason)
    return length


def parse_header(header: bytes, *, file: str, file_nbytes: int) -> dict[str, TensorInfo]:
    """Name -> tensor of one file; offsets are from the file's first byte.

    header: the JSON, without the length before it; file_nbytes: bytes of the whole file.
    Raises: PolicyError with every defect.
    """
    # As the reference reader has it: no byte order mark, no space before the brace.
    if not header.startswith(b"{"):
        raise _not_safetensors(file, "its header is not a JSON object")
    try:
        entries: dict[str, Any] = parse_json(header, hook=_object, what="its header")
    except ValueError as error:
        raise _not_safetensors(file, str(error)) from None
    begin = LENGTH_NBYTES + len(header)
    tensors: dict[str, TensorInfo] = {}
    # As they come: a header of strangers may have millions. And places mean something only when
    # every entry could be read.
    defects = grouped(_entry_defects(entries, tensors, file, begin))
    if defects := defects or grouped(_layout_defects(tensors, file, begin, file_nbytes)):
        raise PolicyError(defects)
    return tensors


def entry_defect(file: str, name: str, reason: str) -> Diagnostic:
    """The diagnostic of one tensor of a file's list."""
    name, cure = shown(name), DAMAGED
    return diagnostic("bad-tensor-entry", file=file, tensor=name, reason=reason, suggestion=cure)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    return entries if len(entries) == len(pairs) else _Doubled(pairs)


def _entry_defects(
    entries: dict[str, Any], tensors: dict[str, TensorInfo], file: str, begin: int
) -> Iterator[Diagnostic]:
    """What is wrong with entries; those that can be read become `tensors`."""
    for name in entries.repeated if isinstance(entries, _Doubled) else ():
        yield entry_defect(file, name, "it is named twice")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        yield entry_defect(file, "__metadata__", "it is not a JSON object")
    elif wrong := [key for key, value in metadata.items() if not isinstance(value, str)]:
        reason = f'the value of "{shown(wrong[0])}" is not a string'
        yield entry_defect(file, "__metadata__", reason)
    for name, entry in entries.items():
        try:
            tensors[name] = _tensor(name, entry, file, begin)
        except _NewerError as error:
            cure = "give a checkpoint in BF16, F16 or F32, or take a newer policyc"
            facts: dict[str, Any] = {"tensor": shown(name), "dtype": str(error)}
            yield diagnostic("unknown-dtype", file=file, suggestion=cure, **facts)
        except ValueError as error:
            yield entry_defect(file, name, str(error))


def _tensor(name: str, entry: Any, file: str, begin: int) -> TensorInfo:
    # Such a name could drive the terminal it is shown on, or not be encoded at all.
    if not name.isprintable():
        raise ValueError("its name holds characters that cannot be printed")
    if isinstance(entry, _Doubled):
        raise ValueError(f'its "{shown(entry.repeated[0])}" appears twice')
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError("it needs a dtype, a shape and two data_offsets") from None
    _check_fields(dtype, shape, start, stop)
    # Exact integers: a product beyond 64 bits cannot equal a length inside the file.
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != (stop - start) * 8:
        # A hostile shape has hundreds of digits.
        exact = f"{bits // 8} bytes" + (f" and {bits % 8} bits" if bits % 8 else "")
        size = exact if len(exact) < 60 else "more bytes than any file has"
        held = f"its offsets {start} to {stop} hold {stop - start} bytes"
        raise ValueError(f"{held}, but {dtype} {shape} is {size}")
    return TensorInfo(name, dtype, tuple(shape), stop - start, file, begin + start, begin + stop)


def _check_fields(dtype: Any, shape: Any, start: Any, stop: Any) -> None:
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        if type(dtype) is str and _DTYPE.fullmatch(dtype):
            raise _NewerError(dtype)
        raise ValueError(f"its dtype {quoted(dtype)} is not known")
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"its shape is not a list of at most {MAX_DIMENSIONS} numbers")
    if wrong := [*filterfalse(_is_length, shape)]:
        raise ValueError(f"its shape holds {quoted(wrong[0])}, which is not a length")
    if not all(map(_is_length, (start, stop))) or start > stop:
        offsets = f"{quoted(start)} to {quoted(stop)}"
        raise ValueError(f"its data_offsets {offsets} are not a range of bytes")


def _is_length(value: Any) -> bool:
    # `type is` and not isinstance, because a bool is an int there.
    return type(value) is int and 0 <= value < 1 << 63


def _layout_defects(
    tensors: Mapping[str, TensorInfo], file: str, begin: int, file_nbytes: int
) -> Iterator[Diagnostic]:
    end, before = begin, None
    for tensor in sorted(tensors.values(), key=attrgetter("start", "stop")):
        if tensor.start != end:
            kind = "overlaps" if tensor.start < end else "leaves a hole after"
            other = f'tensor "{shown(before.name)}"' if before else "the header"
            reason = f"it starts at byte {tensor.start} and {kind} {other}, ending at {end}"
            yield entry_defect(file, tensor.name, reason)
        # A tensor inside another one must not move the end back.
        if tensor.stop >= end:
            end, before = tensor.stop, tensor
    if end != file_nbytes:
        kind = "ends" if end > file_nbytes else "goes on"
        reason = f"its tensors end at byte {end}, but the file {kind} at {file_nbytes} bytes"
        yield diagnostic("not-safetensors", file=file, reason=reason, suggestion=DAMAGED)


def _not_safetensors(file: str, reason: str) -> PolicyError:
    return fail("not-safetensors", file=file, reason=reason, suggestion=DAMAGED)
