"""Whether a plan can be built here and now, as far as that is known before the first byte."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from emitters.numerics.value_types import VALUE_TYPES
from emitters.tensor_io.shards import writing
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, fail
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Plan
from policy_dsl.quantities import both_units
from policy_dsl.roles.scales import FP8_DTYPES

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
    found = list(_defects(plan, inventory))
    if found:
        raise PolicyError(found)


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


def _defects(plan: Plan, inventory: Inventory) -> Iterator[Diagnostic]:
    tensors = [rows.tensor for module in plan.modules for rows in module.sources]
    if inventory.root is None or any(tensor.file is None for tensor in tensors):
        cure = "download the model, for example with `hf download`, and give the folder"
        yield diagnostic("source-without-files", model=inventory.id, suggestion=cure)
    if plan.pending:
        yield diagnostic("pending-statistics", pending=", ".join(plan.pending))
    for module in plan.modules:
        for rows in module.sources:
            known = FP8_DTYPES if rows.scale is not None else VALUE_TYPES.keys()
            if rows.tensor.dtype not in known:
                name, dtype = rows.tensor.name, rows.tensor.dtype
                yield diagnostic("unreadable-values", tensor=name, dtype=dtype)
