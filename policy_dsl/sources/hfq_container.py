"""A hipfire HFQ file, from its first bytes to checked tensors; no weight is read.

32 bytes (magic, version, arch_id, number of tensors, two offsets), one JSON object that nothing
ends but its own last brace, the index, zeros up to the first tensor; then the tensors in the
order of the index without a hole, up to the file's end. All numbers are little-endian.

Stricter than hipfire's reader in this: names that appear twice, a version other than 1, sizes
that do not fit code and shape, and a file that goes on behind its tensors are refused.
Source: Kaden-Schutt/hipfire, read as facts: crates/hipfire-runtime/src/hfq.rs @ 9d90364; codes and
families: crates/hipfire-quantize/src/hfq.rs @ 2b62be6.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from policy_dsl.bounded_json import parse_json_at
from policy_dsl.diagnostics import Diagnostic, PolicyError, fail
from policy_dsl.escaping import shown
from policy_dsl.inventory import Inventory, ModelFile, TensorInfo
from policy_dsl.regular_files import LOOKED_AT_NBYTES, refuse_placeholder
from policy_dsl.sources.checkpoint import CONFIG, HFQ_MAGIC, CheckpointFiles
from policy_dsl.sources.safetensors_header import DAMAGED, MAX_DIMENSIONS, entry_defect

VERSION = 1
HEADER_NBYTES = 32
FORM = "hipfire HFQ"
# Metadata and index of the largest models have 25 MB, most of it the tokenizer.
MAX_HEADER_NBYTES = 200_000_000
MAX_TENSORS = 1_000_000

_HEADER = struct.Struct("<4sIIIQQ")
_SMALLEST_ENTRY = 16


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


def _line(name: str, group: int, bits: int, *, rotated: bool = False) -> QuantCode:
    return QuantCode(name, group, 8 + group * bits // 8, bits, "line", rotated)


def _levels(name: str, bits: int) -> QuantCode:
    return QuantCode(name, 256, 2 * 2**bits + 32 * bits, bits, "levels", rotated=True)


# Codes from 31 on mean different things to different versions of hipfire: none is known here.
QUANT_CODES: Mapping[int, QuantCode] = {
    0: QuantCode("Q4F16G64", 64, 36),
    1: QuantCode("F16", 1, 2),
    2: QuantCode("F32", 1, 4),
    3: QuantCode("Q8F16", 32, 34, 8, "scale"),
    4: QuantCode("Q4K", 256, 144),
    5: QuantCode("Q8HFQ"),
    6: _line("HFQ4G256", 256, 4),
    7: _line("HFQ4G128", 128, 4),
    8: _line("HFQ6G256", 256, 6),
    9: _line("HFQ2G256", 256, 2),
    10: _line("HFQ2G128", 128, 2),
    11: _line("HFQ3G256", 256, 3),
    12: _line("HFQ3G128", 128, 3),
    13: _line("MQ4G256", 256, 4, rotated=True),
    14: QuantCode("MQ8G256", 256, 258, 8, "scale", rotated=True),
    15: _line("MQ6G256", 256, 6, rotated=True),
    16: QuantCode("BF16", 1, 2),
    17: _line("MQ3G256", 256, 3, rotated=True),
    18: _line("MQ2G256", 256, 2, rotated=True),
    19: _levels("MQ2G256Lloyd", 2),
    20: _levels("MQ3G256Lloyd", 3),
    21: QuantCode("HFP4G32"),
    # DeepSeek's table from token to expert, plain integers.
    22: QuantCode("U32", 1, 4),
    24: QuantCode("MFP4G32"),
    28: QuantCode("ParoQuantG128"),
    29: QuantCode("ParoQuantG128Tiled"),
    30: _levels("MQ4G256Lloyd", 4),
}

# arch_id -> the family of models, or the kind of sidecar, that a loader takes the file for.
ARCH_FAMILIES: Mapping[int, str] = {
    0: "LLaMA, Mistral",
    1: "Qwen3",
    5: "Qwen3.5 dense",
    6: "Qwen3.5 MoE",
    7: "Qwen2 dense",
    8: "dots.ocr",
    9: "DeepSeek V4 Flash",
    10: "MiniMax-M2",
    11: "LFM2.5",
    12: "Cohere2-MoE",
    13: "Gemma 4 text",
    14: "Muse Glimmer",
    20: "DFlash draft",
    21: "Qwen3.5 MTP head",
    22: "Gemma 4 EAGLE draft",
    23: "Muse Glimmer draft",
    45: "FLUX.2",
    46: "FLUX.2 text encoder",
    47: "Stable Diffusion UNet",
    255: "toy",
}


def code_name(code: int) -> str:
    """The name of a quant code; `code31` for one that has no settled meaning."""
    known = QUANT_CODES.get(code)
    return known.name if known else f"code{code}"


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
    form = ModelFile(
        form=FORM,
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
        root=root,
        file_nbytes={file: files.sizes[file]},
        container=form,
    )


def read_container(files: CheckpointFiles, file: str) -> HfqContainer:
    """The container that is one of these files. Raises: PolicyError with its defects."""
    size = files.sizes[file]
    first = files.read(file, 0, min(size, LOOKED_AT_NBYTES))
    refuse_placeholder(file, first, size)
    header = files.read(file, 0, _header_nbytes(first, file=file, file_nbytes=size))
    return parse_container(header, file=file, file_nbytes=size)


def _header_nbytes(prefix: bytes, *, file: str, file_nbytes: int) -> int:
    """Bytes before the first tensor, read from the file's first 32 bytes."""
    if not prefix.startswith(HFQ_MAGIC):
        raise _not_hfq(file, f"it does not begin with {HFQ_MAGIC.decode()}")
    if min(file_nbytes, len(prefix)) < HEADER_NBYTES:
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
    payload_start = _header_nbytes(header, file=file, file_nbytes=file_nbytes)
    arch_id, count = _HEADER.unpack_from(header)[2:4]
    metadata, index_start = _metadata(header, file)
    at, place = _first_entry(header, file, index_start, count), payload_start
    defects: list[Diagnostic] = []
    tensors: dict[str, HfqTensor] = {}
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


def _first_entry(header: bytes, file: str, at: int, count: int) -> int:
    """Where the first entry begins of an index at a byte, which counts them once more."""
    room = len(header) - at - 4
    if room < 0:
        raise _not_hfq(file, "it has no index between its metadata and its tensors")
    again = int.from_bytes(header[at : at + 4], "little")
    if again != count:
        raise _not_hfq(file, f"its header counts {count} tensors, its index {again}")
    # Before anything is made for them.
    if count * _SMALLEST_ENTRY > room:
        raise _not_hfq(file, f"an index of {count} tensors does not fit into {room} bytes")
    return at + 4


def _entry(header: bytes, at: int, file: str, number: int) -> tuple[_Entry, int]:
    """The entry of the index at a byte, and where it ends."""
    try:
        begin = at + 2 + int.from_bytes(header[at : at + 2], "little")
        name, form = header[at + 2 : begin], f"<BB{header[begin + 1]}IIQ"
        code, _, *shape, group_size, nbytes = struct.unpack_from(form, header, begin)
    except (struct.error, IndexError):
        end = f"byte {len(header)}, where its tensors begin"
        raise _not_hfq(file, f"entry {number} of its index goes past {end}") from None
    stop = begin + struct.calcsize(form)
    return _Entry(name, code, tuple(shape), group_size, nbytes), stop


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
    # All that follow the first go past the end, too.
    cut = next((one.info for one in tensors.values() if one.info.stop > file_nbytes), None)
    if cut is not None:
        reason = f"it ends at byte {cut.stop}, the file at {file_nbytes} bytes"
        yield entry_defect(file, cut.name, reason)


def _not_hfq(file: str, reason: str) -> PolicyError:
    return fail("not-hfq", file=shown(file), reason=reason, suggestion=DAMAGED)
