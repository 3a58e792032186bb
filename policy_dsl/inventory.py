"""What a source checkpoint holds, as values, read from headers alone."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from policy_dsl.diagnostics import Diagnostic

# The number of an expert in a name, after the path of its module and before its projection's.
EXPERT_NAME = re.compile(r"(.+)\.experts\.([0-9]{1,7})\.(\w+)")
_DTYPES = (
    "C64 F64 I64 U64 F32 I32 U32 F16 BF16 I16 U16 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ "
    "I8 U8 F6_E2M3 F6_E3M2 F4"
)
# Bits of one element of every dtype that safetensors files use: a name's first number.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    **{dtype: int(re.findall("[0-9]+", dtype)[0]) for dtype in _DTYPES.split()},
}
# A file, and where a part of it starts and stops.
Part = tuple[str, int, int]


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint; `start` and `stop` count from its file's first byte.

    dtype is safetensors' name (BF16, F16, F32, F8_E4M3, U32 …); in an HFQ file it is that of
    its quant code (MQ4G256, Q8F16 …), and the shape is that of the values. Where the shard map
    is not known (recorded headers) `file` is None and the offsets are 0.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str | None = None
    start: int = 0
    stop: int = 0


class ModelFile(NamedTuple):
    """The one file that holds a whole model, as it describes itself.

    form: for people. arch_id: by which loaders choose a model family; family: its name, None if
    not known. tokenizer, chat_template: whether it holds one that loaders read.
    """

    form: str
    arch_id: int
    family: str | None
    tokenizer: bool
    chat_template: bool


@dataclass(frozen=True)
class Inventory:
    """Every tensor of a source, its config, and the files beside the tensors.

    side_files: name -> bytes of every other file at the folder's top level, without config.json,
    the index and safetensors; of known subfolders too, as `additional_chat_templates/rag.jinja`;
    None if not known. root: the folder where the files can be read; None if they cannot.
    file_nbytes: of every shard, empty if not known. container: of a model that is one such file.
    notes: where this came from, for people. unread: what else is there, folders as `name/`.
    findings: warnings to show with it. mtimes: in ns, of the files in `root` when they were listed.
    parts_read: SHA-256 of what was read of them. links: name -> where it leads, of shards that
    are outside of `root`. commit: of the hub.
    """

    id: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    side_files: Mapping[str, int] | None = None
    root: Path | None = None
    file_nbytes: Mapping[str, int] = field(default_factory=dict)
    container: ModelFile | None = None
    # How it was found does not make it another source: from here on nothing is compared.
    notes: tuple[str, ...] = field(default=(), compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)
    findings: tuple[Diagnostic, ...] = field(default=(), compare=False)
    mtimes: Mapping[str, int] = field(default_factory=dict, compare=False)
    parts_read: Mapping[Part, bytes] = field(default_factory=dict, compare=False, repr=False)
    links: Mapping[str, str] = field(default_factory=dict, compare=False)
    commit: str | None = field(default=None, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this safetensors dtype and shape.

    Raises: ValueError if its bits (F4 has 4 an element) do not fill whole bytes.
    """
    nbytes, rest = divmod(prod(shape) * DTYPE_BITS[dtype], 8)
    if rest:
        raise ValueError(f"{dtype} {list(shape)} ends inside a byte")
    return nbytes


def source_digest(inventory: Inventory) -> str:
    """SHA-256, as hex, over config, shard sizes, and each tensor's name, dtype, shape, place.

    Neither the order of the tensors nor where the checkpoint is matters; no weight is read.
    """
    facts = {
        "config": inventory.config,
        "file_nbytes": dict(inventory.file_nbytes),
        # Sorted: a folder, the hub and a record list the same tensors in different orders.
        "tensors": [inventory.tensors[name] for name in sorted(inventory.tensors)],
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
