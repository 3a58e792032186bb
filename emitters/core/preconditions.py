"""Whether a plan can be built here and now: system, disk, and a source that is still as planned."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

from emitters.numerics.value_types import VALUE_TYPES
from emitters.tensor_io.files import CHANGED, FileFacts, Source, file_facts, writing
from policy_dsl.diagnostics import PolicyError, diagnostic, fail
from policy_dsl.formats import Format
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Plan
from policy_dsl.quantities import both_units
from policy_dsl.regular_files import read_range
from policy_dsl.roles.quantization import FP8_DTYPES
from policy_dsl.sources.checkpoint import CONFIG, find_index

# For the journal, and for what the file system itself takes.
_MARGIN_NBYTES = 16 * 2**20


def ensure_supported_system() -> None:
    """Raises: PolicyError where the system has no locks or writes as a build needs them."""
    if find_spec("fcntl") is None or not hasattr(os, "pwrite"):
        reason = "it has no locks of files, or no writes at an offset, as a build needs them"
        cure = "build on Linux or macOS; on Windows in WSL, which `wsl --install` sets up"
        system = platform.system() or "this system"
        raise fail("unsupported-system", system=system, reason=reason, suggestion=cure)


def ensure_buildable(plan: Plan, inventory: Inventory) -> None:
    """Raises: PolicyError with all that keeps this plan from being built from this source."""
    defects = []
    sources = [rows for module in plan.modules for rows in module.sources]
    if inventory.root is None or any(rows.tensor.file is None for rows in sources):
        cure = "download the model, for example with `hf download`, and give the folder"
        defects.append(diagnostic("source-without-files", model=inventory.id, suggestion=cure))
    if plan.pending:
        defects.append(diagnostic("pending-statistics", pending=", ".join(plan.pending)))
    for rows in sources:
        name, dtype = rows.tensor.name, rows.tensor.dtype
        if dtype not in (FP8_DTYPES if rows.scale is not None else VALUE_TYPES):
            defects.append(diagnostic("unreadable-values", tensor=name, dtype=dtype))
    if defects:
        raise PolicyError(defects)


def ensure_room(plan: Plan, folder: Path) -> None:
    """Raises: PolicyError if the disk cannot hold what is yet to be written in `folder`."""
    planned = sum(file.nbytes or 0 for file in plan.files)
    with writing(folder):
        # Shards have holes at first; what is allocated counts, not how long they are.
        begun = sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder))
        free = shutil.disk_usage(folder).free
    needed = planned - begun + _MARGIN_NBYTES
    if needed > free:
        reason = f"{both_units(needed)} are needed and {both_units(free)} are free"
        cure = "free some space or give another disk with -o"
        raise fail("disk-full", path=str(folder), reason=reason, suggestion=cure)


def open_as_planned(plan: Plan, inventory: Inventory, format: Format) -> Source:
    """The source with the state of all files that a build reads; every read compares with it.

    Raises: PolicyError if files are not what they were when it was planned. Config, index and
    the headers of all shards are read again.
    """
    root = inventory.root or Path()
    facts = file_facts(root, _files_read(plan, inventory, format))
    if inventory.root is None or inventory.container is not None:
        return Source(root, facts)
    names = {CONFIG, find_index(inventory.mtimes) or CONFIG} & inventory.mtimes.keys()
    names |= inventory.file_nbytes.keys()
    now = {**file_facts(root, names - facts.keys()), **facts}
    reasons = dict(_moved(inventory, now)) or dict(_reread(inventory, root, now))
    if reasons:
        raise PolicyError(
            diagnostic("source-changed", suggestion=CHANGED, file=name, reason=reason)
            for name, reason in sorted(reasons.items())
        )
    return Source(root, facts)


def _files_read(plan: Plan, inventory: Inventory, format: Format) -> set[str]:
    views = [view for module in plan.modules for view in module.sources]
    files = {tensor.file or "" for view in views for tensor in (view.tensor, view.scale) if tensor}
    # Side files too: a tokenizer that changes half-way belongs to another state of the source.
    files |= {file.name for file in plan.files if file.kind in ("copied", "edited")}
    return files | ({*format.spec.embedded_files} & {*(inventory.side_files or {})})


def _moved(inventory: Inventory, now: Mapping[str, FileFacts]) -> Iterator[tuple[str, str]]:
    """Name and reason of each file whose size or time is another one."""
    sizes = {**(inventory.side_files or {}), **inventory.file_nbytes}
    for name, (nbytes, mtime_ns) in now.items():
        if nbytes != sizes.get(name, nbytes):
            yield name, f"it has {nbytes} bytes now, and had {sizes[name]}"
        elif mtime_ns != inventory.mtimes.get(name, mtime_ns):
            yield name, "it was written again"


def _reread(
    inventory: Inventory, root: Path, now: Mapping[str, FileFacts]
) -> Iterator[tuple[str, str]]:
    """Name and reason of each file of these whose parts are not what was read of them."""
    for (name, start, stop), digest in inventory.parts_read.items():
        if name in now and sha256(read_range(root / name, start, stop)).digest() != digest:
            part = "header" if name in inventory.file_nbytes else "content"
            yield name, f"its {part} is different now"
