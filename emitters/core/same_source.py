"""Whether a source is still what its plan was made of: sizes, times, headers, config, index."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from emitters.tensor_io.read import CHANGED, FileFacts, file_facts
from policy_dsl.diagnostics import PolicyError, diagnostic
from policy_dsl.inventory import Inventory
from policy_dsl.regular_files import read_range
from policy_dsl.sources.checkpoint import CONFIG, find_index


def ensure_as_planned(inventory: Inventory, facts: Mapping[str, FileFacts]) -> None:
    """Raises: PolicyError if files of a source are not what they were when it was opened.

    facts: of the files that a build reads, as they are now. Config, index and the headers of
    all shards are read again.
    """
    if inventory.root is None or inventory.container is not None:
        return
    names = {CONFIG, find_index(inventory.mtimes) or CONFIG} & inventory.mtimes.keys()
    names |= inventory.file_nbytes.keys()
    now = {**file_facts(inventory.root, names - facts.keys()), **facts}
    reasons = dict(_moved(inventory, now)) or dict(_reread(inventory, now))
    if reasons:
        raise PolicyError(
            diagnostic("source-changed", suggestion=CHANGED, file=name, reason=reason)
            for name, reason in sorted(reasons.items())
        )


def _moved(inventory: Inventory, now: Mapping[str, FileFacts]) -> Iterator[tuple[str, str]]:
    """Name and reason of each file whose size or time is another one."""
    sizes = {**(inventory.side_files or {}), **inventory.file_nbytes}
    for name, (nbytes, mtime_ns) in now.items():
        if nbytes != sizes.get(name, nbytes):
            yield name, f"it has {nbytes} bytes now, and had {sizes[name]}"
        elif mtime_ns != inventory.mtimes.get(name, mtime_ns):
            yield name, "it was written again"


def _reread(inventory: Inventory, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Name and reason of each file of these whose parts are not what was read of them."""
    root = inventory.root or Path()
    for (name, start, stop), digest in inventory.parts_read.items():
        if name in names:
            content = read_range(root / name, start, stop)
            if hashlib.sha256(content).digest() != digest:
                part = "header" if name in inventory.file_nbytes else "content"
                yield name, f"its {part} is different now"
