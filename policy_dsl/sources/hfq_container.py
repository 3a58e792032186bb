"""A hipfire HFQ file, from its first bytes to checked tensors; no weight is read.

32 bytes (magic, version, arch_id, number of tensors, two offsets), one JSON object that nothing
ends but its own last brace, the index, zeros up to the first tensor; then the tensors in the
order of the index without a hole, up to the file's end. All numbers are little-endian.

Stricter than hipfire's reader in this: names that appear twice, a version other than 1, sizes
that do not fit code and shape, and a file that goes on behind its tensors are refused.
Source: Kaden-Schutt/hipfire, read as facts: crates/hipfire-runtime/src/hfq.rs @ 9d90364; codes and
families (hfq_numbers.yaml): crates/hipfire-quantize/src/hfq.rs @ 2b62be6.
"""

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from policy_dsl import packaged_table
from policy_dsl.bounded_json import parse_json_at
from policy_dsl.diagnostics import Diagnostic, PolicyError, fail
from policy_dsl.escaping import shown
from policy_dsl.inventory import Inventory, ModelFile, TensorInfo
from policy_dsl.regular_files import LOOKED_AT_NBYTES, refuse_placeholder
from policy_dsl.sources.checkpoint import CONFIG, HFQ_MAGIC, CheckpointFiles
from policy_dsl.sources.safetensors_header import DAMAGED, MAX_DIMENSIONS, entry_defect

VERSION = 1
# Metadata and index of the largest models have 25 MB, most of it the tokenizer.
MAX_HEADER_NBYTES = 200_000_000
MAX_TENSORS = 1_000_000

_HEADER = struct.Struct("<4sIIIQQ")
_SMALLEST_ENTRY = 16
_NUMBERS = packaged_table(Path(__file__).with_name("hfq_numbers.yaml"))


class QuantCode(NamedTuple):
    """How a tensor is stored: `nbytes` for every `group` elements, the last group padded.

    Both are 0 where rows are laid out whole, or the size is not known. bits: of a code; 0 if not
    known. header: what a block begins with: a scale and the lowest value in float32, or a scale
    or 2**bits levels in float16. rotated: whether a group is rotated before it is coded.
    """

    name: str
    group: int = 0
    nbytes: int = 0
    bits: int = 0
    header: Literal["", "line", "scale", "levels"] = ""
    rotated: bool = False


QUANT_CODES: Mapping[int, QuantCode] = {
    code: QuantCode(*fields) for code, fields in _NUMBERS["codes"].items()
}
# arch_id -> the family of models, or the kind of sidecar, that a loader takes the file for.
ARCH_FAMILIES: Mapping[int, str] = _NUMBERS["arch_ids"]
# Of the index: name, code, shape, size of groups, bytes.
_Entry = tuple[bytes, int, tuple[int, ...], int, int]


def code_name(code: int) -> str:
    """The name of a quant code; `code31` for one that has no settled meaning."""
    return QUANT_CODES.get(code, QuantCode(f"code{code}")).name


def stored_nbytes(code: int, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor of this logical shape under a quant code; None if they do not follow."""
    known = QUANT_CODES.get(code, QuantCode(""))
    if known.name == "Q8HFQ" and len(shape) == 2 and shape[1] % 32 == 0:
        # Each row: a half for every 32 values, the values, then zeros up to 128 bytes.
        rows, columns = shape
        return rows * -(-(columns // 16 + columns) // 128) * 128
    # Groups run over the flattened tensor; a short last one is stored whole.
    return -(-prod(shape) // known.group) * known.nbytes if known.group else None


class HfqTensor(NamedTuple):
    """A tensor of the index; group_size is what the index says, which no reader uses."""

    info: TensorInfo
    code: int
    group_size: int


@dataclass(frozen=True)
class HfqContainer:
    """What an HFQ file holds: metadata, index (its tensors in order), zeros, the tensors' bytes.

    index_start, index_stop, payload_start: bytes from the file's start.
    """

    arch_id: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, HfqTensor]
    index_start: int
    index_stop: int
    payload_start: int


def read_hfq(files: CheckpointFiles, file: str, *, name: str) -> Inventory:
    """The inventory of a model, called `name`, that is one HFQ file. Raises: PolicyError."""
    container = read_container(files, file)
    tokenizer = container.metadata.get("tokenizer")
    settings = container.metadata.get("tokenizer_config")
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    form = ModelFile(
        form="hipfire HFQ",
        arch_id=container.arch_id,
        family=ARCH_FAMILIES.get(container.arch_id),
        # Its text, or that of an empty object: loaders read no nested object.
        tokenizer=isinstance(tokenizer, str) and tokenizer.strip() not in ("", "{}"),
        chat_template=template is not None,
    )
    return Inventory(
        id=name,
        config=container.metadata["config"],
        tensors={key: tensor.info for key, tensor in container.tensors.items()},
        side_files={key: n for key, n in files.sizes.items() if key not in (file, CONFIG)},
        unread=files.unread,
        file_nbytes={file: files.sizes[file]},
        container=form,
    )


def read_container(files: CheckpointFiles, file: str) -> HfqContainer:
    """The container that is one of these files. Raises: PolicyError with its defects."""
    size = files.sizes[file]
    first = files.read(file, 0, min(size, LOOKED_AT_NBYTES))
    refuse_placeholder(file, first, size)
    arch_id, count, payload_start = _counts(first, file, size)
    header = files.read(file, 0, payload_start)
    metadata, index_start = _metadata(header, file, count)
    at, place = index_start + 4, payload_start
    tensors, defects = dict[str, HfqTensor](), list[Diagnostic]()
    for number in range(count):
        (raw, code, shape, group_size, nbytes), at = _entry(header, at, file, number)
        name = raw.decode("utf-8", "backslashreplace")
        info = TensorInfo(name, code_name(code), shape, nbytes, file, place, place + nbytes)
        if reason := _reason(raw, info, code, tensors):
            defects.append(entry_defect(file, name, reason))
        tensors[name] = HfqTensor(info, code, group_size)
        place += nbytes
    # Places mean something only when every entry is right.
    if not defects and place < size:
        reason = f"its tensors end at byte {place}, but the file goes on to {size} bytes"
        raise _not_hfq(file, reason)
    # All that follow the first go past the end, too.
    cut = next((one.info for one in tensors.values() if one.info.stop > size), None)
    if not defects and cut:
        reason = f"it ends at byte {cut.stop}, the file at {size} bytes"
        defects.append(entry_defect(file, cut.name, reason))
    if defects:
        raise PolicyError(defects)
    return HfqContainer(arch_id, metadata, tensors, index_start, at, payload_start)


def _counts(first: bytes, file: str, file_nbytes: int) -> tuple[int, int, int]:
    """The arch_id, the number of tensors and where the first is, by the file's first bytes."""
    if not first.startswith(HFQ_MAGIC):
        raise _not_hfq(file, f"it does not begin with {HFQ_MAGIC.decode()}")
    begin = _HEADER.size
    if len(first) < begin:
        raise _not_hfq(file, f"it has only {file_nbytes} bytes, no whole header")
    _, version, arch_id, count, metadata_start, payload_start = _HEADER.unpack_from(first)
    reason = ""
    if version != VERSION:
        reason = f"its version is {version}; only {VERSION} is known"
    elif metadata_start != begin:
        reason = f"its metadata would begin at byte {metadata_start} and not at {begin}"
    elif not begin <= payload_start <= file_nbytes:
        place = f"{payload_start}, outside of its {file_nbytes} bytes"
        reason = f"its tensors would begin at byte {place}"
    elif payload_start > MAX_HEADER_NBYTES:
        size = f"{payload_start} bytes, over the limit of {MAX_HEADER_NBYTES}"
        reason = f"its metadata and index would have {size}"
    elif count > MAX_TENSORS:
        reason = f"it would have {count} tensors, over the limit of {MAX_TENSORS}"
    if reason:
        raise _not_hfq(file, reason)
    return arch_id, count, payload_start


def _metadata(header: bytes, file: str, count: int) -> tuple[dict[str, Any], int]:
    """The JSON object before the index of so many entries, and the byte where it ends."""
    if not header.startswith(b"{", _HEADER.size):
        raise _not_hfq(file, "its metadata do not begin with a brace")
    try:
        metadata, stop = parse_json_at(header, _HEADER.size, what="its metadata object")
    except ValueError as error:
        raise _not_hfq(file, str(error)) from None
    if not isinstance(metadata.get("config"), dict):
        raise _not_hfq(file, "its metadata hold no config")
    room = len(header) - stop - 4
    if room < 0:
        raise _not_hfq(file, "it has no index between its metadata and its tensors")
    again = int.from_bytes(header[stop : stop + 4], "little")
    if again != count:
        raise _not_hfq(file, f"its header counts {count} tensors, its index {again}")
    # Before anything is made for them.
    if count * _SMALLEST_ENTRY > room:
        raise _not_hfq(file, f"an index of {count} tensors does not fit into {room} bytes")
    return metadata, stop


def _entry(header: bytes, at: int, file: str, number: int) -> tuple[_Entry, int]:
    """The entry of the index at a byte, and where it ends."""
    try:
        begin = at + 2 + int.from_bytes(header[at : at + 2], "little")
        name, form = header[at + 2 : begin], f"<BB{header[begin + 1]}IIQ"
        code, _, *shape, group_size, nbytes = struct.unpack_from(form, header, begin)
    except (struct.error, IndexError):
        end = f"byte {len(header)}, where its tensors begin"
        raise _not_hfq(file, f"entry {number} of its index goes past {end}") from None
    return (name, code, tuple(shape), group_size, nbytes), begin + struct.calcsize(form)


def _reason(raw: bytes, tensor: TensorInfo, code: int, taken: Collection[str]) -> str:
    """Why an entry with a name of these bytes cannot be true; empty if it can."""
    if tensor.name.encode() != raw:
        return "its name is not UTF-8"
    # Such a name could drive the terminal it is shown on.
    if not tensor.name.isprintable():
        return "its name holds characters that cannot be printed"
    # hipfire would silently read the later one.
    if tensor.name in taken:
        return "it is named twice"
    shape, nbytes = tensor.shape, tensor.nbytes
    if len(shape) > MAX_DIMENSIONS:
        return f"it has {len(shape)} dimensions, more than {MAX_DIMENSIONS}"
    expected = stored_nbytes(code, shape)
    if expected is None or expected == nbytes:
        return ""
    # A hostile shape has hundreds of digits.
    size = f"{expected} bytes" if expected < 1 << 64 else "more bytes than any file has"
    return f"it has {nbytes} bytes, but {tensor.dtype} {list(shape)} is {size}"


def _not_hfq(file: str, reason: str) -> PolicyError:
    return fail("not-hfq", file=shown(file), reason=reason, suggestion=DAMAGED)
