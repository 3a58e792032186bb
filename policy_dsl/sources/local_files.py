"""A model on this machine: a checkpoint folder, one safetensors file, or one HFQ file.

A folder that a stranger packed may hold a link to any file of this machine, and what is copied
from it is published. Links inside of the folder are followed, and those of the hub's cache,
whose snapshots are made of links to the blobs of the same repository.
"""

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from policy_dsl.diagnostics import PolicyError, Span, fail
from policy_dsl.escaping import decoded
from policy_dsl.inventory import Inventory
from policy_dsl.regular_files import read_range, read_whole, refuse_special, unreadable
from policy_dsl.sources import checkpoint
from policy_dsl.sources.checkpoint import CONFIG, HFQ_EXTENSION, HFQ_MAGIC, SUFFIX, Headers
from policy_dsl.sources.side_files import SUBFOLDERS, WANTED, is_looked_at, is_one_of, unread

_COPY = "put a copy of the file in place of the link"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = "models--"
_MOST_SHOWN = 3


@dataclass(frozen=True)
class LocalFiles:
    """The regular files at the top level of `folder`, and the known ones in its subfolders.

    links, mtimes, parts_read: as an inventory has them. targets: name -> the file itself, of
    everything that is a link; None: what is read may be a link.
    """

    folder: Path
    sizes: Mapping[str, int]
    unread: tuple[str, ...] = ()
    mtimes: Mapping[str, int] = field(default_factory=dict)
    parts_read: dict[tuple[str, int, int], bytes] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    targets: Mapping[str, Path] | None = None

    @property
    def place(self) -> str:
        """The folder's path."""
        return str(self.folder)

    def read(self, file: str, start: int, stop: int) -> bytes:
        """The bytes `start` to `stop` of a file. Raises: PolicyError if they cannot be had."""
        # Where it led when it was listed, and not where it may lead by now.
        path = (self.targets or {}).get(file, self.folder / file)
        content = read_range(path, start, stop, follow=self.targets is None)
        self.parts_read[file, start, stop] = hashlib.sha256(content).digest()
        return content

    def only(self, is_kept: Callable[[str], bool]) -> "LocalFiles":
        """Those of these names alone."""
        return replace(self, sizes={file: n for file, n in self.sizes.items() if is_kept(file)})

    def dated(self, inventory: Inventory) -> Inventory:
        """The inventory with the folder, and what was seen of these files before they were read."""
        links = {name: to for name, to in self.links.items() if name in inventory.file_nbytes}
        inventory = replace(inventory, root=self.folder, links=links)
        return replace(inventory, mtimes=self.mtimes, parts_read=self.parts_read)


def located(path: str, span: Span | None) -> Path:
    """Where a file is that a policy names at `span`: beside the policy, if it is there."""
    beside = Path(span.source.name).parent / path if span is not None else None
    return beside if beside is not None and beside.exists() else Path(path)


def open_folder(
    folder: Path, *, name: str | None = None, links: bool = True, headers: Headers | None = None
) -> Inventory:
    """The inventory of a checkpoint folder, called `name`, by default as the folder is.

    Without safetensors it may hold one HFQ file. links: as of `local_files`. headers: those that
    are known and not read. Raises: PolicyError with the defects of all its files.
    """
    name = name or decoded(Path(os.path.abspath(folder)).name)
    files = local_files(folder, links=links)
    # Safetensors come first, and their folders need no look into every file.
    if not checkpoint.weights_of(files):
        # The magic decides, not the extension: published files end in `.hfq`, `.mq4`, ….
        n, sizes = len(HFQ_MAGIC), sorted(files.sizes.items())
        models = [file for file, size in sizes if size >= n and files.read(file, 0, n) == HFQ_MAGIC]
        if len(models) > 1:
            cure, shown = "give one of the files", checkpoint.listed(models)
            raise fail("several-hfq", place=files.place, files=shown, suggestion=cure)
        if models:
            return _read_hfq(files, models[0], name)
        if CONFIG not in files.sizes:
            _refuse_outer(folder)
    return files.dated(checkpoint.read_checkpoint(files, name=name, headers=headers))


def open_file(path: Path, *, links: bool = True) -> Inventory:
    """The inventory of a model whose weights are one safetensors file, its config beside it.

    Raises: PolicyError; also if an index beside it says that the file is one of several.
    """
    file, folder = path.name, path.parent
    files = local_files(folder, links=links, weights=file)
    index = checkpoint.find_index(files.sizes)
    shards = set(checkpoint.indexed(files, index).values()) if index else set[str]()
    if file in shards and len(shards) > 1:
        cure = f"give the folder, {folder}"
        raise fail("one-shard", file=file, shards=len(shards), suggestion=cure)
    others = (SUFFIX, index or SUFFIX)
    files = files.only(lambda name: name in (file, CONFIG) or not name.endswith(others))
    # Links are not followed for the name: in the hub's cache they lead to a hash.
    called = Path(os.path.abspath(path))
    model = decoded(called.parent.name if file == "model.safetensors" else called.stem)
    return files.dated(checkpoint.read_checkpoint(files, name=model))


def open_hfq_file(path: Path, *, links: bool = True) -> Inventory:
    """The inventory of a model that is one HFQ file, whatever is beside it.

    Raises: PolicyError if it is not an HFQ file, or damaged.
    """
    file, files = path.name, local_files(path.parent, links=links, weights=path.name)
    # Other models and quantizations in the folder do not belong to this one.
    others = {name for name in files.sizes if name.endswith(SUFFIX) or HFQ_EXTENSION.search(name)}
    files = files.only(lambda name: name == file or name not in others)
    name = decoded(HFQ_EXTENSION.sub("", Path(os.path.abspath(path)).name))
    return _read_hfq(files, file, name)


def _read_hfq(files: LocalFiles, file: str, name: str) -> Inventory:
    # Not at the top: few models are such files.
    from policy_dsl.sources.hfq_container import read_hfq  # noqa: PLC0415

    return files.dated(read_hfq(files, file, name=name))


def _refuse_outer(folder: Path) -> None:
    """Raises: PolicyError if a checkpoint is further inside of a folder, naming where."""
    inner, snapshots = _folders(folder), folder / "snapshots"
    ids = [name for name in inner if name.startswith(_CACHED)]
    if snapshots.is_dir():
        what, verb = "the folder of a model in the hub's cache", "its snapshot is"
        places = [f"{snapshots}/{commit}" for commit in _commits(folder)]
    elif ids:
        what, verb = "the hub's cache", "give the name of a model in it,"
        places = [name.removeprefix(_CACHED).replace("--", "/", 1) for name in ids]
    else:
        what, verb = "a folder of checkpoints", "give"
        places = [f"{folder}/{name}" for name in inner if (folder / name / CONFIG).is_file()]
        if not places:
            return
    # Whole, so that they can be given as they are.
    more = f" or {len(places) - _MOST_SHOWN} more" if len(places) > _MOST_SHOWN else ""
    cure = f"{verb} {' or '.join(places[:_MOST_SHOWN])}{more}" if places else None
    raise fail("not-a-checkpoint", place=str(folder), what=what, suggestion=cure)


def _commits(folder: Path) -> list[str]:
    """The snapshots of a model in the hub's cache, that of the main branch alone if known."""
    commits = [name for name in _folders(folder / "snapshots") if _COMMIT.fullmatch(name)]
    main = ""
    with suppress(PolicyError, ValueError):
        main = read_whole(folder / "refs" / "main", most=1000).decode("ascii").strip()
    return [main] if main in commits else commits


def _folders(folder: Path) -> list[str]:
    with suppress(OSError):
        inner = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        return [name for name in inner if name.isprintable()]
    return []


def local_files(folder: Path, *, links: bool = True, weights: str = "") -> LocalFiles:
    """The files of a folder with their sizes, sorted by name.

    links: whether weights may be links that lead out of the folder. weights: the name of the
    file that was asked for. What no reader wants and is not a file, is only named, as unread.
    Raises: PolicyError if the folder cannot be read, or something else is where a file of a
    checkpoint should be: a pipe, a link that leads nowhere or out of the folder.
    """
    real, errors = Path(os.path.realpath(folder)), list[PolicyError]()
    sizes, mtimes = dict[str, int](), dict[str, int]()
    outside, targets = dict[str, str](), dict[str, Path]()
    folders, special = [], []
    for name in _paths(folder):
        is_weights = name == weights or HFQ_EXTENSION.search(name) is not None
        is_weights = is_weights or ("/" not in name and name.endswith(SUFFIX))
        try:
            if not name.isprintable():
                raise unreadable(Path(name), "its name cannot be printed")
            facts, target = _facts(folder / name)
            if stat.S_ISDIR(facts.st_mode):
                folders.append(f"{name}/")
                continue
            refuse_special(folder / name, facts)
            if target and not (target.is_relative_to(real) or target.parent == _blobs(real)):
                if not (is_weights and links):
                    cure = f"{_COPY}, or leave out --no-links" if is_weights else _COPY
                    raise fail("link-outside", file=name, target=str(target), suggestion=cure)
                outside[name] = str(target)
        except PolicyError as error:
            # A note, a log or a pipe of somebody else does not matter.
            if is_one_of(name, WANTED) or is_weights or not name.isprintable():
                errors.append(error)
            else:
                special.append(name)
            continue
        if target:
            targets[name] = target
        sizes[name], mtimes[name] = facts.st_size, facts.st_mtime_ns
    if errors:
        raise checkpoint.joined(errors)
    rest = unread([*sizes, *folders], special)
    files = LocalFiles(folder, sizes, rest, mtimes, links=outside, targets=targets)
    return files.only(is_looked_at)


def _facts(path: Path) -> tuple[os.stat_result, Path | None]:
    """The facts of what is there, links followed, and where it leads if it is a link."""
    try:
        # Followed once: what is looked at, judged and read later is the same file.
        target = Path(os.path.realpath(path, strict=True)) if path.is_symlink() else None
        return (target or path).stat(), target
    except OSError as error:
        raise unreadable(path, error) from error


def _blobs(folder: Path) -> Path | None:
    """Where the hub's cache keeps the files of a snapshot that `folder` is, or is in."""
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith(_CACHED):
            return repository / "blobs"
    return None


def _paths(folder: Path, below: str = "") -> Iterator[str]:
    """What is in a folder and in the subfolders that tokenizers write, sorted."""
    try:
        names = sorted(os.listdir(folder / below))
    except OSError as error:
        raise unreadable(folder / below, error) from error
    for name in names:
        inner = folder / name
        if not below and name in SUBFOLDERS and inner.is_dir() and not inner.is_symlink():
            yield from _paths(folder, f"{name}/")
        else:
            yield below + name
