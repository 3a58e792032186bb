"""A hipfire HFQ file, from its first bytes to checked tensors and roles; no weight is read.

32 bytes (magic, version, arch_id, number of tensors, two offsets), one JSON object that nothing
ends but its own last brace, the index, zeros up to the first tensor; then the tensors in the
order of the index without a hole, up to the file's end. All numbers are little-endian.

Stricter than hipfire's reader in this: names that appear twice, a version other than 1, sizes
that do not fit code and shape, and a file that goes on behind its tensors are refused.
Source: Kaden-Schutt/hipfire, crates/hipfire-runtime/src/hfq.rs @ 9d90364, read as facts.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from policy_dsl.bounded_json import parse_json_at
from policy_dsl.diagnostics import Diagnostic, PolicyError, fail
from policy_dsl.escaping import shown
from policy_dsl.inventory import Inventory, ModelFile, TensorInfo
from policy_dsl.regular_files import LOOKED_AT_NBYTES, refuse_placeholder
from policy_dsl.roles.classify import classify
from policy_dsl.roles.model import Model
from policy_dsl.sources.checkpoint import CONFIG, HFQ_MAGIC, CheckpointFiles
from policy_dsl.sources.hfq_codes import ARCH_FAMILIES, code_name, stored_nbytes
from policy_dsl.sources.safetensors_header import DAMAGED, MAX_DIMENSIONS, entry_defect

VERSION = 1
HEADER_NBYTES = 32
FORM = "hipfire HFQ"
# Metadata and index of the largest models have 25 MB, most of it the tokenizer.
MAX_HEADER_NBYTES = 200_000_000
MAX_TENSORS = 1_000_000

_HEADER = struct.Struct("<4sIIIQQ")
_COUNT = struct.Struct("<I")
_NAME_NBYTES = struct.Struct("<H")
_CODE_AND_DIMENSIONS = struct.Struct("<BB")
_GROUP_AND_NBYTES = struct.Struct("<IQ")
_SMALLEST_ENTRY = 16
# What hipfire's quantizer adds to a model, and what it is.
_ADDED = (
    (re.compile(r"\.awq_scale\w*\.weight$"), "AWQ scales that activations are divided by"),
    (re.compile(r"\.lr_[uv]\.weight$"), "low-rank correction of a matrix"),
)


class HfqTensor(NamedTuple):
    """A tensor of the index; group_size is what the index says, which no reader uses."""

    info: TensorInfo
    code: int
    group_size: int


@dataclass(frozen=True)
class HfqContainer:
    """What an HFQ file holds; `tensors` in the order of the index.

    index_start, index_stop, payload_start: bytes from the file's start; the metadata end where
    the index begins, and zeros fill what is between its end and the first tensor.
    """

    arch_id: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, HfqTensor]
    index_start: int
    index_stop: int
    payload_start: int


class _Entry(NamedTuple):
    name: bytes
    code: int
    shape: tuple[int, ...]
    group_size: int
    nbytes: int


def read_hfq(files: CheckpointFiles, file: str, *, name: str, root: Path | None) -> Inventory:
    """The inventory of a model, called `name`, that is one HFQ file; its config is in it.

    Raises: PolicyError with the file's defects.
    """
    container = read_container(files, file)
    tokenizer = container.metadata.get("tokenizer")
    settings = container.metadata.get("tokenizer_config")
    template = settings.get("chat_template") if isinstance(settings, dict) else None
    return Inventory(
        id=name,
        config=container.metadata["config"],
        tensors={key: tensor.info for key, tensor in container.tensors.items()},
        side_files={
            other: size for other, size in files.sizes.items() if other not in (file, CONFIG)
        },
        unread=files.unread,
        root=root,
        file_nbytes={file: files.sizes[file]},
        container=ModelFile(
            form=FORM,
            arch_id=container.arch_id,
            family=ARCH_FAMILIES.get(container.arch_id),
            # Its text, or that of an empty object: loaders read no nested object.
            tokenizer=isinstance(tokenizer, str) and tokenizer.strip() not in ("", "{}"),
            chat_template=template is not None,
        ),
    )


def read_container(files: CheckpointFiles, file: str) -> HfqContainer:
    """The container that is one of these files. Raises: PolicyError with its defects."""
    size = files.sizes[file]
    prefix = files.read(file, 0, min(size, max(HEADER_NBYTES, LOOKED_AT_NBYTES)))
    refuse_placeholder(file, prefix, size)
    prefix = prefix[:HEADER_NBYTES]
    header = files.read(file, 0, header_nbytes(prefix, file=file, file_nbytes=size))
    return parse_container(header, file=file, file_nbytes=size)


def header_nbytes(prefix: bytes, *, file: str, file_nbytes: int) -> int:
    """Bytes before the first tensor, read from the file's first 32 bytes.

    Raises: PolicyError if it is not an HFQ file, or its numbers cannot be true.
    """
    if not prefix.startswith(HFQ_MAGIC):
        raise _not_hfq(file, f"it does not begin with {HFQ_MAGIC.decode()}")
    if file_nbytes < HEADER_NBYTES or len(prefix) < HEADER_NBYTES:
        raise _not_hfq(file, f"it has only {file_nbytes} bytes, no whole header")
    _, version, _, count, metadata_start, payload_start = _HEADER.unpack_from(prefix)
    if version != VERSION:
        raise _not_hfq(file, f"its version is {version}; only {VERSION} is known")
    if metadata_start != HEADER_NBYTES:
        place = f"byte {metadata_start} and not at {HEADER_NBYTES}"
        raise _not_hfq(file, f"its metadata would begin at {place}")
    if not HEADER_NBYTES <= payload_start <= file_nbytes:
        place = f"{payload_start}, outside of its {file_nbytes} bytes"
        raise _not_hfq(file, f"its tensors would begin at byte {place}")
    if payload_start > MAX_HEADER_NBYTES:
        size = f"{payload_start} bytes, over the limit of {MAX_HEADER_NBYTES}"
        raise _not_hfq(file, f"its metadata and index would have {size}")
    if count > MAX_TENSORS:
        raise _not_hfq(file, f"it would have {count} tensors, over the limit of {MAX_TENSORS}")
    return int(payload_start)


def parse_container(header: bytes, *, file: str, file_nbytes: int) -> HfqContainer:
    """The container whose bytes before the first tensor are `header`.

    file: what to call it, also in its tensors; file_nbytes: bytes of the whole file.
    Raises: PolicyError with every defect.
    """
    payload_start = header_nbytes(header, file=file, file_nbytes=file_nbytes)
    arch_id, count = _HEADER.unpack_from(header)[2:4]
    metadata, index_start = _metadata(header, file)
    _check_count(header, file, index_start, count)
    defects: list[Diagnostic] = []
    tensors: dict[str, HfqTensor] = {}
    at, place = index_start + _COUNT.size, payload_start
    for number in range(count):
        entry, at = _entry(header, at, file, number)
        stop = place + entry.nbytes
        try:
            name = _name(entry, tensors)
            dtype = code_name(entry.code)
            info = TensorInfo(name, dtype, entry.shape, entry.nbytes, file, place, stop)
            tensors[name] = HfqTensor(info, entry.code, entry.group_size)
            _check_size(entry)
        except ValueError as error:
            quoted = entry.name.decode("utf-8", "backslashreplace")
            defects.append(entry_defect(file, quoted, str(error)))
        place = stop
    # Places mean something only when every entry is right.
    defects = defects or list(_end_defects(tensors, file, place, file_nbytes))
    if defects:
        raise PolicyError(defects)
    return HfqContainer(arch_id, metadata, tensors, index_start, at, payload_start)


def _metadata(header: bytes, file: str) -> tuple[dict[str, Any], int]:
    """The JSON object before the index, and the byte where it ends."""
    if not header.startswith(b"{", HEADER_NBYTES):
        raise _not_hfq(file, "its metadata do not begin with a brace")
    try:
        metadata, stop = parse_json_at(header, HEADER_NBYTES, what="its metadata object")
    except ValueError as error:
        raise _not_hfq(file, str(error)) from None
    if not isinstance(metadata.get("config"), dict):
        raise _not_hfq(file, "its metadata hold no config")
    return metadata, stop


def _check_count(header: bytes, file: str, at: int, count: int) -> None:
    room = len(header) - at - _COUNT.size
    if room < 0:
        raise _not_hfq(file, "it has no index between its metadata and its tensors")
    (again,) = _COUNT.unpack_from(header, at)
    if again != count:
        raise _not_hfq(file, f"its header counts {count} tensors, its index {again}")
    # Before anything is made for them.
    if count * _SMALLEST_ENTRY > room:
        raise _not_hfq(file, f"an index of {count} tensors does not fit into {room} bytes")


def _entry(header: bytes, at: int, file: str, number: int) -> tuple[_Entry, int]:
    """The entry of the index at a byte, and where it ends."""
    try:
        (length,) = _NAME_NBYTES.unpack_from(header, at)
        at += _NAME_NBYTES.size
        name = header[at : at + length]
        at += length
        code, dimensions = _CODE_AND_DIMENSIONS.unpack_from(header, at)
        at += _CODE_AND_DIMENSIONS.size
        shape = struct.unpack_from(f"<{dimensions}I", header, at)
        at += 4 * dimensions
        group_size, nbytes = _GROUP_AND_NBYTES.unpack_from(header, at)
    except struct.error:
        end = f"byte {len(header)}, where its tensors begin"
        raise _not_hfq(file, f"entry {number} of its index goes past {end}") from None
    return _Entry(name, code, shape, group_size, nbytes), at + _GROUP_AND_NBYTES.size


def _name(entry: _Entry, taken: Mapping[str, HfqTensor]) -> str:
    try:
        name = entry.name.decode()
    except UnicodeDecodeError:
        raise ValueError("its name is not UTF-8") from None
    # Such a name could drive the terminal it is shown on.
    if not name.isprintable():
        raise ValueError("its name holds characters that cannot be printed")
    # hipfire would silently read the later one.
    if name in taken:
        raise ValueError("it is named twice")
    return name


def _check_size(entry: _Entry) -> None:
    if len(entry.shape) > MAX_DIMENSIONS:
        raise ValueError(f"it has {len(entry.shape)} dimensions, more than {MAX_DIMENSIONS}")
    expected = stored_nbytes(entry.code, entry.shape)
    if expected is not None and expected != entry.nbytes:
        form = f"{code_name(entry.code)} {list(entry.shape)}"
        # A hostile shape has hundreds of digits.
        size = f"{expected} bytes" if expected < 1 << 64 else "more bytes than any file has"
        raise ValueError(f"it has {entry.nbytes} bytes, but {form} is {size}")


def _end_defects(
    tensors: Mapping[str, HfqTensor], file: str, end: int, file_nbytes: int
) -> Iterator[Diagnostic]:
    if end < file_nbytes:
        reason = f"its tensors end at byte {end}, but the file goes on to {file_nbytes} bytes"
        yield from _not_hfq(file, reason).diagnostics
    for tensor in tensors.values():
        if tensor.info.stop > file_nbytes:
            reason = f"it ends at byte {tensor.info.stop}, the file at {file_nbytes} bytes"
            yield entry_defect(file, tensor.info.name, reason)
            # All that follow do too.
            return


def _not_hfq(file: str, reason: str) -> PolicyError:
    return fail("not-hfq", file=shown(file), reason=reason, suggestion=DAMAGED)


def classify_hfq(inventory: Inventory) -> Model:
    """The model of an HFQ file, for people to see: roles by names and logical shapes.

    Raises: PolicyError as `classify` does, but never for a dtype.
    """
    tensors = inventory.tensors
    added = {name: reason for name in tensors for pattern, reason in _ADDED if pattern.search(name)}
    # Names and shapes are the original checkpoint's; only its dtypes are gone.
    values = {
        name: tensor._replace(dtype="F16") for name, tensor in tensors.items() if name not in added
    }
    model = classify(replace(inventory, tensors=values))
    ignored = [(tensors[tensor.name], reason) for tensor, reason in model.ignored]
    return replace(
        model,
        tensors=tuple(replace(known, source=tensors[known.source.name]) for known in model.tensors),
        ignored=(*ignored, *((tensors[name], reason) for name, reason in added.items())),
    )
