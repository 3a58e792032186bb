"""What a source checkpoint holds, as values, read from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint; `start` and `stop` are byte offsets in its file.

    dtype is safetensors' name (BF16, F16, F32, F8_E4M3, U32 …). Without a file (recorded
    headers whose shard map is unknown) `file` is None and the offsets are 0.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str | None = None
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Inventory:
    """Every tensor of a source, its config, and the files beside the tensors.

    side_files: name -> bytes of every other file of the folder (tokenizer, template, licence,
    modeling code); None if not known. root: where the files can be read; None if they cannot
    (catalog, recorded headers, hub headers). quantization: the config's own description of an
    already quantized source, FP8 block scales apart; None if there is none.
    """

    id: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    side_files: Mapping[str, int] | None = None
    root: Path | None = None
    file_nbytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
