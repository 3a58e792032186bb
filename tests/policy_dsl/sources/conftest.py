"""HFQ files made by hand, field by field."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import pytest

Entry = tuple[Any, ...]
CONFIG = {"model_type": "llama"}


def _entry(
    name: str | bytes = "w",
    code: int = 1,
    shape: tuple[int, ...] = (4,),
    nbytes: int = 8,
    group_size: int = 0,
) -> bytes:
    raw = name if isinstance(name, bytes) else name.encode()
    sizes = struct.pack(f"<BB{len(shape)}IIQ", code, len(shape), *shape, group_size, nbytes)
    return struct.pack("<H", len(raw)) + raw + sizes


def _hfq(
    *entries: bytes,
    metadata: bytes | None = None,
    payload: int = 8,
    counts: tuple[int, int] | None = None,
    **header: int,
) -> bytes:
    """A file of these entries, right unless told otherwise.

    metadata: the JSON text. payload: how many bytes of tensors. counts: of tensors, in header
    and index. header: its other fields, by name.
    """
    text = json.dumps({"config": CONFIG}).encode() if metadata is None else metadata
    first, again = counts or (len(entries), len(entries))
    body = text + struct.pack("<I", again) + b"".join(entries)
    begin = header.get("payload_start", -(-(32 + len(body)) // 4096) * 4096)
    return (
        struct.pack(
            "<4sIIIQQ",
            b"HFQM",
            header.get("version", 1),
            header.get("arch_id", 0),
            first,
            header.get("metadata_start", 32),
            begin,
        )
        + body
    ).ljust(min(begin, 1 << 20), b"\0") + bytes(payload)


@pytest.fixture
def entry() -> Callable[..., bytes]:
    """(name, code, shape, nbytes, group_size) -> an entry of an index."""
    return _entry


@pytest.fixture
def hfq() -> Callable[..., bytes]:
    """(*entries, metadata=, payload=, counts=, ...) -> the bytes of a file."""
    return _hfq
