"""A model of the hub to its Inventory, from headers over HTTP.

The listing, the config, the index and the shards' headers are read, nothing else, and nothing
is stored. Honours HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT as huggingface_hub does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlsplit

from huggingface_hub import constants, hf_hub_url

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import fail
from policy_dsl.inventory import Inventory
from policy_dsl.sources.checkpoint import read_checkpoint
from policy_dsl.sources.foreign_files import ensure_checkpoint
from policy_dsl.sources.hub_http import Address, fetch, fetch_range
from policy_dsl.sources.side_files import is_looked_at, unread

MAX_LISTING_NBYTES = 64_000_000
WORKERS = 8

_COMMIT = re.compile(r"[0-9a-f]{40,64}")


@dataclass(frozen=True)
class HubFiles:
    """The files of a repository at one commit; of those in folders, the known side files."""

    repository: str
    commit: str
    sizes: Mapping[str, int]
    unread: tuple[str, ...]

    @property
    def place(self) -> str:
        """The repository."""
        return self.repository

    def read(self, file: str, start: int, stop: int) -> bytes:
        """The bytes `start` to `stop` of a file. Raises: PolicyError if they cannot be had."""
        url = hf_hub_url(self.repository, file, revision=self.commit)
        address = Address(url, f"{self.repository}/{file}", _page(self.repository))
        return fetch_range(address, start, stop, size=self.sizes[file])


def open_hub(repository: str, revision: str | None) -> Inventory:
    """The model's inventory from the hub; its root is None, for the weights stay there.

    Raises: PolicyError if the hub cannot be asked, refuses, or the checkpoint has defects.
    """
    what = repository if revision is None else f"{repository}@{revision}"
    if constants.HF_HUB_OFFLINE:
        raise fail("hub-offline", what=what)
    files = _files(repository, revision, what)
    # Many shards at once: over a network, waiting is what takes the time.
    pool = ThreadPoolExecutor(WORKERS)
    try:
        ensure_checkpoint(files)
        found = read_checkpoint(files, name=repository, root=None, apply=pool.map)
    finally:
        # After a refusal or an interrupt the shards still to come are not asked for.
        pool.shutdown(cancel_futures=True)
    note = f"headers read from {constants.ENDPOINT}, commit {files.commit}"
    return replace(found, notes=(note,))


def _files(repository: str, revision: str | None, what: str) -> HubFiles:
    _check_endpoint()
    url = f"{constants.ENDPOINT}/api/models/{repository}"
    # Sizes come only when asked for by `blobs`.
    url += f"/revision/{quote(revision, safe='')}?blobs=true" if revision else "?blobs=true"
    text = fetch(Address(url, what, _page(repository)), limit=MAX_LISTING_NBYTES)
    try:
        listing = parse_json(text)
        commit = listing["sha"]
        sizes = dict(_size(entry) for entry in listing["siblings"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"its listing of files cannot be understood ({type(error).__name__}: {error})"
        raise fail("hub-failed", what=what, reason=reason) from error
    # Every file is read at this commit, so that a push in between mixes nothing.
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise fail("hub-failed", what=what, reason="its listing of files names no commit")
    listed = {file: size for file, size in sorted(sizes.items()) if is_looked_at(file)}
    return HubFiles(repository, commit, listed, unread(sizes))


def _size(entry: Mapping[str, Any]) -> tuple[str, int]:
    file, size = entry["rfilename"], entry["size"]
    if type(file) is not str or not file.isprintable():
        raise ValueError("a file has no name that can be printed")
    if type(size) is not int or size < 0:
        raise ValueError(f"{file} has no size")
    return file, size


def _check_endpoint() -> None:
    try:
        parts = urlsplit(constants.ENDPOINT)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise fail("hub-failed", what="HF_ENDPOINT", reason=f'"{constants.ENDPOINT}" is not a URL')


def _page(repository: str) -> str:
    return f"{constants.ENDPOINT}/{repository}"
