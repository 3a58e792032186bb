"""A model on this machine: a checkpoint folder, one safetensors file, or one HFQ file."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from policy_dsl.diagnostics import Diagnostic, PolicyError, Span, fail
from policy_dsl.escaping import decoded
from policy_dsl.inventory import Inventory
from policy_dsl.regular_files import read_range, unreadable
from policy_dsl.sources.checkpoint import indexed, read_checkpoint
from policy_dsl.sources.foreign_files import ensure_checkpoint, ensure_no_outer_folder
from policy_dsl.sources.hfq_files import find_hfq, is_called_hfq, model_name, read_hfq
from policy_dsl.sources.shard_map import SUFFIX, find_index
from policy_dsl.sources.side_files import SUBFOLDERS, is_looked_at, unread


@dataclass(frozen=True)
class LocalFiles:
    """The regular files at the top level of `folder`, and the known ones in its subfolders.

    Links to files are followed (the hub's cache), links to folders are not. mtimes,
    parts_read: as an inventory has them.
    """

    folder: Path
    sizes: Mapping[str, int]
    unread: tuple[str, ...] = ()
    mtimes: Mapping[str, int] = field(default_factory=dict)
    parts_read: dict[tuple[str, int, int], bytes] = field(default_factory=dict, compare=False)

    @property
    def place(self) -> str:
        """The folder's path."""
        return str(self.folder)

    def read(self, file: str, start: int, stop: int) -> bytes:
        """The bytes `start` to `stop` of a file. Raises: PolicyError if they cannot be had."""
        content = read_range(self.folder / file, start, stop)
        self.parts_read[file, start, stop] = hashlib.sha256(content).digest()
        return content


def located(path: str, span: Span | None) -> Path:
    """Where a file is that a policy names at `span`: beside the policy, if it is there."""
    if span is not None:
        beside = Path(span.source.name).parent / path
        if beside.exists():
            return beside
    return Path(path)


def open_folder(folder: Path, *, name: str | None = None) -> Inventory:
    """The inventory of a checkpoint folder, called `name`, by default as the folder is.

    A folder without safetensors may hold one HFQ file instead.
    Raises: PolicyError with the defects of all its files.
    """
    name = name or decoded(Path(os.path.abspath(folder)).name)
    files = local_files(folder)
    container = find_hfq(files)
    if container is not None:
        return _dated(read_hfq(files, container, name=name, root=folder), files)
    ensure_no_outer_folder(folder, files)
    ensure_checkpoint(files)
    return _dated(read_checkpoint(files, name=name, root=folder), files)


def open_file(path: Path) -> Inventory:
    """The inventory of a model whose weights are one safetensors file, its config beside it.

    Raises: PolicyError; also if an index beside it says that the file is one of several.
    """
    files = local_files(path.parent)
    index = find_index(files.sizes)
    if index is not None:
        shards = set(indexed(files, index).values())
        if path.name in shards and len(shards) > 1:
            cure = f"give the folder, {path.parent}"
            raise fail("one-shard", file=path.name, shards=len(shards), suggestion=cure)
    alone = {
        file: size
        for file, size in files.sizes.items()
        if file in (path.name, "config.json") or not file.endswith((SUFFIX, index or SUFFIX))
    }
    files = replace(files, sizes=alone)
    ensure_checkpoint(files)
    # Links are not followed for the name: in the hub's cache they lead to a hash.
    called = Path(os.path.abspath(path))
    name = decoded(called.parent.name if path.name == "model.safetensors" else called.stem)
    return _dated(read_checkpoint(files, name=name, root=path.parent), files)


def open_hfq_file(path: Path) -> Inventory:
    """The inventory of a model that is one HFQ file, whatever lies beside it.

    Raises: PolicyError if it is none, or damaged.
    """
    files = local_files(path.parent)
    # Other models and quantizations in the folder are no part of this one.
    alone = {
        file: size
        for file, size in files.sizes.items()
        if file == path.name or not (file.endswith(SUFFIX) or is_called_hfq(file))
    }
    called = Path(os.path.abspath(path))
    name = decoded(model_name(called.name))
    files = replace(files, sizes=alone)
    return _dated(read_hfq(files, path.name, name=name, root=path.parent), files)


def _dated(inventory: Inventory, files: LocalFiles) -> Inventory:
    # Listed before anything was read: what changes from then on is noticed.
    return replace(inventory, mtimes=files.mtimes, parts_read=files.parts_read)


def local_files(folder: Path) -> LocalFiles:
    """The files of a folder with their sizes, sorted by name.

    Raises: PolicyError if the folder cannot be read, or a link in it leads nowhere.
    """
    found: list[Diagnostic] = []
    sizes: dict[str, int] = {}
    mtimes: dict[str, int] = {}
    others: list[str] = []
    for name in _paths(folder):
        try:
            facts = _facts(folder, name)
        except PolicyError as error:
            found += error.diagnostics
            continue
        # Opening a pipe would wait for ever.
        if stat.S_ISDIR(facts.st_mode):
            others.append(f"{name}/")
        elif stat.S_ISREG(facts.st_mode):
            sizes[name], mtimes[name] = facts.st_size, facts.st_mtime_ns
    if found:
        raise PolicyError(found)
    kept = {name: size for name, size in sizes.items() if is_looked_at(name)}
    return LocalFiles(folder, kept, unread([*sizes, *others]), mtimes)


def _facts(folder: Path, name: str) -> os.stat_result:
    if not name.isprintable():
        raise fail("unreadable-file", path=name, reason="its name cannot be printed")
    try:
        return (folder / name).stat()
    except OSError as error:
        raise unreadable(folder / name, error) from error


def _paths(folder: Path) -> Iterator[str]:
    """What is in a folder and in the subfolders that tokenizers write, sorted."""
    for name in _names(folder):
        inner = folder / name
        if name in SUBFOLDERS and inner.is_dir() and not inner.is_symlink():
            yield from (f"{name}/{file}" for file in _names(inner))
        else:
            yield name


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error
