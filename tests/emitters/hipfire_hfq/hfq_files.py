"""HFQ files taken apart and put together again, with something else in them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy_dsl.sources.hfq_container import read_container
from policy_dsl.sources.local_files import local_files


@dataclass
class Held:
    """One tensor of a file."""

    code: int
    shape: tuple[int, ...]
    group_size: int
    content: bytes

    def put(self, at: int, form: str, *numbers: float) -> None:
        """Writes numbers over the bytes from `at` on."""
        written = struct.pack(f"<{form}", *numbers)
        self.content = self.content[:at] + written + self.content[at + len(written) :]


@dataclass
class Parts:
    """What a file holds."""

    arch_id: int
    metadata: dict[str, Any]
    tensors: dict[str, Held]


def rewrite(path: Path, change: Callable[[Parts], object]) -> Path:
    """The file, changed and consistent in itself."""
    parts = taken_apart(path)
    change(parts)
    path.write_bytes(put_together(parts))
    return path


def taken_apart(path: Path) -> Parts:
    """What a whole file holds."""
    found, content = read_container(local_files(path.parent), path.name), path.read_bytes()
    tensors = {
        name: Held(
            one.code, one.info.shape, one.group_size, content[one.info.start : one.info.stop]
        )
        for name, one in found.tensors.items()
    }
    return Parts(found.arch_id, dict(found.metadata), tensors)


def put_together(parts: Parts) -> bytes:
    """The bytes of a file."""
    text = json.dumps(parts.metadata).encode()
    index = struct.pack("<I", len(parts.tensors))
    for name, held in parts.tensors.items():
        shape = struct.pack(f"<BB{len(held.shape)}I", held.code, len(held.shape), *held.shape)
        index += struct.pack("<H", len(name)) + name.encode() + shape
        index += struct.pack("<IQ", held.group_size, len(held.content))
    size = 32 + len(text) + len(index)
    start = size + -size % 4096
    count = len(parts.tensors)
    header = struct.pack("<4sIIIQQ", b"HFQM", 1, parts.arch_id, count, 32, start)
    payload = b"".join(held.content for held in parts.tensors.values())
    return (header + text + index).ljust(start, b"\0") + payload
