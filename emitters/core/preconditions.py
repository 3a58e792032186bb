"""Whether a plan can be built here and now: system, disk, and a source that is still as planned.

A head that a tied model has of its own must be equal to the embedding that readers use instead.
"""

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from hashlib import sha256
from importlib.util import find_spec
from itertools import chain
from math import prod
from pathlib import Path
from typing import cast

import numpy as np

from emitters.core.bundle_reading import Bundle
from emitters.core.decoding import source_reader
from emitters.core.matching import tensors_in_stretches
from emitters.numerics import VALUE_TYPES
from emitters.tensor_io.files import CHANGED, FileFacts, Source, columns, file_facts, writing
from emitters.tensor_io.view_rows import Cast, ViewReader
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, fail
from policy_dsl.formats import Format
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Plan
from policy_dsl.planning.plan_warnings import untied
from policy_dsl.quantities import both_units
from policy_dsl.regular_files import read_range
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.quantization import FP8_DTYPES
from policy_dsl.sources.checkpoint import CONFIG, find_index

# For the journal, and for what the file system itself takes.
_MARGIN_NBYTES = 16 * 2**20
_BLOCK_VALUES = 2**20


def ensure_supported_system() -> None:
    """Raises: PolicyError where the system has no locks or writes as a build needs them."""
    if find_spec("fcntl") is None or not hasattr(os, "pwrite"):
        reason = "it has no locks of files, or no writes at an offset, as a build needs them"
        cure = "build on Linux or macOS; on Windows in WSL, which `wsl --install` sets up"
        system = platform.system() or "this system"
        raise fail("unsupported-system", system=system, reason=reason, suggestion=cure)


def ensure_buildable(plan: Plan, inventory: Inventory) -> None:
    """Raises: PolicyError with all that keeps this plan from being built from this source here."""
    ensure_supported_system()
    defects = []
    sources = list(chain.from_iterable(module.sources for module in plan.modules))
    if None in (inventory.root, *(rows.tensor.file for rows in sources)):
        cure = "download the model, for example with `hf download`, and give the folder"
        defects.append(diagnostic("source-without-files", model=inventory.id, suggestion=cure))
    if plan.pending:
        defects.append(diagnostic("pending-statistics", pending=", ".join(plan.pending)))
    for rows in sources:
        name, dtype = rows.tensor.name, rows.tensor.dtype
        if dtype not in (VALUE_TYPES if rows.scale is None else FP8_DTYPES):
            defects.append(diagnostic("unreadable-values", tensor=name, dtype=dtype))
    heads = {omission.tensor.name for omission in plan.omitted if omission.equals}
    defects = defects or list(differing_heads(inventory, plan.model, heads))
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
    """The source of a plan that is buildable, with the state of all files that a build reads.

    Raises: PolicyError if files are not what they were when it was planned. Config, index and
    the headers of all shards are read again.
    """
    root = cast("Path", inventory.root)
    views = chain.from_iterable(module.sources for module in plan.modules)
    files = {tensor.file or "" for view in views for tensor in (view.tensor, view.scale) if tensor}
    # Side files too: a tokenizer that changes half-way belongs to another state of the source.
    files |= {file.name for file in plan.files if file.kind in ("copied", "edited")}
    files |= {*format.spec.embedded_files} & {*(inventory.side_files or {})}
    facts = file_facts(root, files)
    if inventory.container is not None:
        return Source(root, facts)
    names = inventory.mtimes.keys() & {CONFIG, find_index(inventory.mtimes)}
    names |= inventory.file_nbytes.keys()
    reasons = _changes(inventory, root, {**file_facts(root, names - facts.keys()), **facts})
    if reasons:
        raise PolicyError(
            diagnostic("source-changed", suggestion=CHANGED, file=name, reason=reason)
            for name, reason in sorted(reasons.items())
        )
    return Source(root, facts)


def _changes(inventory: Inventory, root: Path, now: Mapping[str, FileFacts]) -> dict[str, str]:
    """What is different in each of these files now; parts are read if sizes and times are equal."""
    sizes, reasons = {**(inventory.side_files or {}), **inventory.file_nbytes}, {}
    for name, (nbytes, mtime_ns) in now.items():
        if nbytes != sizes.get(name, nbytes):
            reasons[name] = f"it has {nbytes} bytes now, and had {sizes[name]}"
        elif mtime_ns != inventory.mtimes.get(name, mtime_ns):
            reasons[name] = "it was written again"
    for (name, start, stop), digest in () if reasons else inventory.parts_read.items():
        if name in now and sha256(read_range(root / name, start, stop)).digest() != digest:
            part = "header" if name in inventory.file_nbytes else "content"
            reasons[name] = f"its {part} is different now"
    return reasons


def differing_heads(source: Inventory, model: Model, names: set[str]) -> Iterator[Diagnostic]:
    """A finding for each of these heads that is not the embedding, value for value.

    Both are read from the source block by block: FP8 codes times scales, all in float32.
    """
    embedding, cure = model.embedding, 'write "lm_head: keep" to store it, or "lm_head: drop"'
    if embedding is None or not names:
        return
    reader, like = source_reader(source, model), embedding.source.name
    for head in model.tensors:
        name = head.source.name
        if name in names and (at := _difference(reader, head, embedding)):
            yield diagnostic("head-differs", suggestion=cure, name=name, embedding=like, place=at)


def as_in_bundle(model: Model, bundle: Bundle) -> tuple[Model, set[str]]:
    """The model of a bundle's source, untied if a head is stored, and the equal heads left out."""
    heads = [tensor for tensor in model.tensors if tensor.role == "lm_head" and model.tied]
    path, stored = bundle.format.spec.module_path, {module.name for module in bundle.modules}
    if any(path(head, model) in stored for head in heads):
        return untied(model), set()
    names = {head.source.name for head in heads}
    omitted = bundle.record.omitted if bundle.record else {}
    return model, {name for name in names if omitted.get(name, "equal")}


def _difference(reader: ViewReader, head: ModelTensor, embedding: ModelTensor) -> str | None:
    """Where the two differ, None if they do not."""
    if head.shape != embedding.shape:
        return f"shapes {list(head.shape)} and {list(embedding.shape)}"
    both = tensors_in_stretches(head, embedding)
    rows, width = prod(both[0].shape[:-1]), columns(both[0].shape)
    step = max(1, _BLOCK_VALUES // width)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        one, other = (reader.rows(each.view, first, count, Cast("F32")) for each in both)
        unequal = (one != other) & ~(np.isnan(one) & np.isnan(other))
        if unequal.any():
            at = int(unequal.argmax())
            place = list(divmod(first * width + at, columns(head.shape)))
            return f"{one.flat[at]:.6g} and {other.flat[at]:.6g} at {place}"
    return None
