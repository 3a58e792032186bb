"""Links in a checkpoint's folder: which of them lead out of it, and where.

A folder that a stranger packed may hold a link to any file of this machine, and what is copied
from it is published. Links inside of the folder are followed, and those of the hub's cache,
whose snapshots are made of links to the blobs of the same repository.
"""

from __future__ import annotations

import os
from pathlib import Path

from policy_dsl.diagnostics import Diagnostic, diagnostic

_CACHED = "models--"
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
_COPY = "put a copy of the file in place of the link"


def link_target(path: Path) -> Path | None:
    """Where a link leads in the end; None of anything else.

    Raises: OSError if it leads nowhere.
    """
    return Path(os.path.realpath(path, strict=True)) if path.is_symlink() else None


def is_outside(target: Path, folder: Path) -> bool:
    """Whether a link in `folder` to `target` leads out of it.

    Both without links themselves, as `os.path.realpath` gives them.
    """
    return not (target.is_relative_to(folder) or target.parent == _blobs(folder))


def link_defect(file: str, target: Path, *, of_weights: bool) -> Diagnostic:
    """The error of a file that is a link out of the folder."""
    cure = f"{_COPY}, or leave out --no-links" if of_weights else _COPY
    return diagnostic("link-outside", file=file, target=str(target), suggestion=cure)


def _blobs(folder: Path) -> Path | None:
    """Where the hub's cache keeps the files of a snapshot that `folder` is, or is in."""
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == _SNAPSHOTS and repository.name.startswith(_CACHED):
            return repository / _BLOBS
    return None
