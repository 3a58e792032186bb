"""A model of the hub as it lies in huggingface_hub's cache on this machine, if it is whole.

Honours HF_HOME, HF_HUB_CACHE and the rest of what huggingface_hub reads from the environment.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from huggingface_hub import constants

from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.inventory import Inventory
from policy_dsl.sources.local_files import open_folder

# What a snapshot that was fetched in part shows; other defects are the model's own.
_PARTIAL = {"missing-config", "missing-shard", "no-weights", "unreadable-file"}


def open_cached(repository: str, revision: str | None, *, links: bool = True) -> Inventory | None:
    """The model as it lies in the hub's cache; None if it is not there or not whole.

    links: as of `open_folder`.
    Raises: PolicyError if what is cached is damaged.
    """
    folder = _snapshot(repository, revision)
    if folder is None:
        return None
    # A snapshot that was fetched in part has the same form, and no mark of it.
    try:
        found = open_folder(folder, name=repository, links=links)
    except PolicyError as error:
        if {defect.code for defect in error.diagnostics} <= _PARTIAL:
            return None
        raise
    return replace(found, notes=(f"from the hub's cache, commit {folder.name}",))


def _snapshot(repository: str, revision: str | None) -> Path | None:
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    place = cache / f"models--{repository.replace('/', '--')}"
    if not place.is_dir():
        return None
    # Not at the top: this takes a fifth of a second, and mostly the cache lacks the model.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    wanted = revision or _only_commit(place, repository)
    try:
        return Path(snapshot_download(repository, revision=wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
        raise fail("unreadable-file", path=str(cache), reason=reason) from error


def _only_commit(place: Path, repository: str) -> str | None:
    """The commit that was fetched by its own name, if no branch or tag was; None if several.

    Raises: PolicyError (hub-offline) if there are several, and the hub may not be asked.
    """
    if any(path.is_file() for path in (place / "refs").rglob("*")):
        return None
    found = sorted(path.name for path in (place / "snapshots").glob("*") if path.is_dir())
    if len(found) > 1 and constants.HF_HUB_OFFLINE:
        cure = f"say which: {', '.join(f'{repository}@{commit}' for commit in found)}"
        raise fail("hub-offline", what=repository, suggestion=cure)
    return found[0] if len(found) == 1 else None
