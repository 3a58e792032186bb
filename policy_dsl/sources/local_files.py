"""A model on this machine: a checkpoint folder, one safetensors file, or one HFQ file.

A folder that a stranger packed may hold a link to any file of this machine, and what is copied
from it is published. Links inside of the folder are followed, and those of the hub's cache,
whose snapshots are made of links to the blobs of the same repository.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from policy_dsl.diagnostics import PolicyError, Span, fail
from policy_dsl.escaping import decoded
from policy_dsl.inventory import Inventory
from policy_dsl.regular_files import read_range, refuse_special, unreadable
from policy_dsl.sources.checkpoint import (
    CONFIG,
    HFQ_MAGIC,
    SUFFIX,
    find_index,
    hfq_model_name,
    indexed,
    is_called_hfq,
    joined,
    listed,
    read_checkpoint,
)
from policy_dsl.sources.foreign_files import ensure_checkpoint, ensure_no_outer_folder
from policy_dsl.sources.side_files import SUBFOLDERS, is_looked_at, is_wanted, unread

_COPY = "put a copy of the file in place of the link"


@dataclass(frozen=True)
class LocalFiles:
    """The regular files at the top level of `folder`, and the known ones in its subfolders.

    Links to files in the folder are followed, those of the hub's cache too, and those of
    weights; links to folders are not. links: name -> where it leads, of the weights that are
    elsewhere. targets: name -> the file itself, of everything that is a link. mtimes,
    parts_read: as an inventory has them.
    """

    folder: Path
    sizes: Mapping[str, int]
    unread: tuple[str, ...] = ()
    mtimes: Mapping[str, int] = field(default_factory=dict)
    parts_read: dict[tuple[str, int, int], bytes] = field(default_factory=dict, compare=False)
    links: Mapping[str, Path] = field(default_factory=dict)
    targets: Mapping[str, Path] | None = None

    @property
    def place(self) -> str:
        """The folder's path."""
        return str(self.folder)

    def read(self, file: str, start: int, stop: int) -> bytes:
        """The bytes `start` to `stop` of a file. Raises: PolicyError if they cannot be had."""
        if self.targets is None:
            content = read_range(self.folder / file, start, stop)
        else:
            # Where it led when it was listed, and not where it may lead by now.
            path = self.targets.get(file, self.folder / file)
            content = read_range(path, start, stop, follow=False)
        self.parts_read[file, start, stop] = hashlib.sha256(content).digest()
        return content


def located(path: str, span: Span | None) -> Path:
    """Where a file is that a policy names at `span`: beside the policy, if it is there."""
    if span is not None:
        beside = Path(span.source.name).parent / path
        if beside.exists():
            return beside
    return Path(path)


def open_folder(folder: Path, *, name: str | None = None, links: bool = True) -> Inventory:
    """The inventory of a checkpoint folder, called `name`, by default as the folder is.

    A folder without safetensors may hold one HFQ file instead. links: whether weights may be
    links that lead out of the folder.
    Raises: PolicyError with the defects of all its files.
    """
    name = name or decoded(Path(os.path.abspath(folder)).name)
    files = local_files(folder, links=links)
    container = _find_hfq(files)
    if container is not None:
        return _read_hfq(files, container, name)
    ensure_no_outer_folder(folder, files)
    ensure_checkpoint(files)
    return _dated(read_checkpoint(files, name=name, root=folder), files)


def open_file(path: Path, *, links: bool = True) -> Inventory:
    """The inventory of a model whose weights are one safetensors file, its config beside it.

    links: as of `open_folder`.
    Raises: PolicyError; also if an index beside it says that the file is one of several.
    """
    files = local_files(path.parent, links=links, weights=path.name)
    index = find_index(files.sizes)
    if index is not None:
        shards = set(indexed(files, index).values())
        if path.name in shards and len(shards) > 1:
            cure = f"give the folder, {path.parent}"
            raise fail("one-shard", file=path.name, shards=len(shards), suggestion=cure)
    alone = {
        file: size
        for file, size in files.sizes.items()
        if file in (path.name, CONFIG) or not file.endswith((SUFFIX, index or SUFFIX))
    }
    files = replace(files, sizes=alone)
    ensure_checkpoint(files)
    # Links are not followed for the name: in the hub's cache they lead to a hash.
    called = Path(os.path.abspath(path))
    name = decoded(called.parent.name if path.name == "model.safetensors" else called.stem)
    return _dated(read_checkpoint(files, name=name, root=path.parent), files)


def open_hfq_file(path: Path, *, links: bool = True) -> Inventory:
    """The inventory of a model that is one HFQ file, whatever is beside it.

    links: as of `open_folder`.
    Raises: PolicyError if it is not an HFQ file, or damaged.
    """
    files = local_files(path.parent, links=links, weights=path.name)
    # Other models and quantizations in the folder do not belong to this one.
    alone = {
        file: size
        for file, size in files.sizes.items()
        if file == path.name or not (file.endswith(SUFFIX) or is_called_hfq(file))
    }
    name = decoded(hfq_model_name(Path(os.path.abspath(path)).name))
    return _read_hfq(replace(files, sizes=alone), path.name, name)


def _find_hfq(files: LocalFiles) -> str | None:
    """The HFQ file that is the model of these files; None if they are of another kind.

    The magic decides, not the extension: published files end in `.hfq`, `.mq4`, `.mq2-lloyd` ….
    Raises: PolicyError if there are several, or a file cannot be read.
    """
    # Safetensors come first, and their folders need no look into every file.
    if any(file.endswith(SUFFIX) for file in files.sizes):
        return None
    n = len(HFQ_MAGIC)
    long_enough = sorted(file for file, size in files.sizes.items() if size >= n)
    models = [file for file in long_enough if files.read(file, 0, n) == HFQ_MAGIC]
    if len(models) > 1:
        cure = "give one of the files"
        raise fail("several-hfq", place=files.place, files=listed(models), suggestion=cure)
    return models[0] if models else None


def _read_hfq(files: LocalFiles, file: str, name: str) -> Inventory:
    # Not at the top: few models are such files.
    from policy_dsl.sources.hfq_container import read_hfq  # noqa: PLC0415

    return _dated(read_hfq(files, file, name=name, root=files.folder), files)


def _dated(inventory: Inventory, files: LocalFiles) -> Inventory:
    # Listed before anything was read: what changes from then on is noticed.
    linked = {
        name: str(target) for name, target in files.links.items() if name in inventory.file_nbytes
    }
    return replace(inventory, mtimes=files.mtimes, parts_read=files.parts_read, links=linked)


def local_files(folder: Path, *, links: bool = True, weights: str = "") -> LocalFiles:
    """The files of a folder with their sizes, sorted by name.

    links: whether weights may be links that lead out of the folder. weights: the name of the
    file that was asked for, if it is one. What is not a file, or a link elsewhere, and is not
    wanted by anything, is only named, as unread.
    Raises: PolicyError if the folder cannot be read, or something else is where a file of a
    checkpoint should be: a pipe, a link that leads nowhere or out of the folder.
    """
    listing = _Listing(folder, Path(os.path.realpath(folder)), links, weights)
    for name in _paths(folder):
        listing.add(name)
    if listing.errors:
        raise joined(listing.errors)
    return LocalFiles(
        folder=folder,
        sizes={name: size for name, size in listing.sizes.items() if is_looked_at(name)},
        unread=unread([*listing.sizes, *listing.folders], listing.special),
        mtimes=listing.mtimes,
        links=listing.links,
        targets=listing.targets,
    )


@dataclass
class _Listing:
    """What has been seen of a folder. real: its path without links."""

    folder: Path
    real: Path
    follow: bool
    weights: str
    errors: list[PolicyError] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    mtimes: dict[str, int] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    links: dict[str, Path] = field(default_factory=dict)
    targets: dict[str, Path] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Look at one more name."""
        if not name.isprintable():
            self.errors.append(unreadable(Path(name), "its name cannot be printed"))
            return
        is_weights = name == self.weights or is_called_hfq(name)
        is_weights = is_weights or ("/" not in name and name.endswith(SUFFIX))
        try:
            self._look(name, is_weights)
        except PolicyError as error:
            # A note, a log or a pipe of somebody else does not matter.
            if is_wanted(name) or is_weights:
                self.errors.append(error)
            else:
                self.special.append(name)

    def _look(self, name: str, is_weights: bool) -> None:
        path = self.folder / name
        try:
            # Followed once: what is looked at, judged and read later is the same file.
            target = Path(os.path.realpath(path, strict=True)) if path.is_symlink() else None
            facts = (target or path).stat()
        except OSError as error:
            raise unreadable(path, error) from error
        if stat.S_ISDIR(facts.st_mode):
            self.folders.append(f"{name}/")
            return
        refuse_special(path, facts)
        if target is not None:
            self.targets[name] = target
            if not (target.is_relative_to(self.real) or target.parent == _blobs(self.real)):
                if not (is_weights and self.follow):
                    cure = f"{_COPY}, or leave out --no-links" if is_weights else _COPY
                    raise fail("link-outside", file=name, target=str(target), suggestion=cure)
                self.links[name] = target
        self.sizes[name], self.mtimes[name] = facts.st_size, facts.st_mtime_ns


def _blobs(folder: Path) -> Path | None:
    """Where the hub's cache keeps the files of a snapshot that `folder` is, or is in."""
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            return repository / "blobs"
    return None


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
