"""A checkpoint's files, wherever they lie, to an Inventory: config, index, shard headers.

The index is trusted for which shard holds a tensor, and checked against the shards' headers.
Only names and sizes, the config, the index and the headers are read, never a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import Diagnostic, PolicyError, fail
from policy_dsl.inventory import Inventory
from policy_dsl.sources.placeholders import refuse_placeholder
from policy_dsl.sources.safetensors_header import LENGTH_NBYTES, header_nbytes, parse_header
from policy_dsl.sources.shard_map import (
    SUFFIX,
    Header,
    find_index,
    placement_defects,
    read_weight_map,
    shard_names,
    strays,
)

CONFIG = "config.json"
# Larger than any config, entries for single modules included.
MAX_CONFIG_NBYTES = 32 * 2**20
# Twice the size of the largest tokenizers.
MAX_JSON_NBYTES = 64 * 2**20
# Large enough for the index of a trillion-parameter model, small enough to read whole.
MAX_INDEX_NBYTES = 128 * 2**20
# The first read of a shard: mostly it holds the whole header, which saves a round trip.
FIRST_NBYTES = 1 << 16

T = TypeVar("T")
Apply = Callable[[Callable[[str], Any], Iterable[str]], Iterable[Any]]


class UnreachableError(PolicyError):
    """The place refuses, not one of its files: nothing more is asked of it."""


class CheckpointFiles(Protocol):
    """Where a checkpoint's files are: what to call the place, their sizes, their bytes."""

    @property
    def place(self) -> str:
        """What to call it in messages."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Name -> bytes of every file at the top level, and of side files in subfolders."""

    @property
    def unread(self) -> tuple[str, ...]:
        """What else is there, folders as `name/`."""

    def read(self, file: str, start: int, stop: int) -> bytes:
        """Exactly the bytes `start` to `stop`. Raises: PolicyError if they cannot be had."""


def read_checkpoint(
    files: CheckpointFiles, *, name: str, root: Path | None, apply: Apply = map
) -> Inventory:
    """The inventory of a checkpoint, called `name`, whose files can be read at `root`.

    apply: like `map`; runs the reading of headers, so an executor's map reads several at once.
    Raises: PolicyError with the defects of all its files.
    """
    found: list[Diagnostic] = []
    # Both are tried before anything is raised: one run shows every defect.
    config = _collect(found, lambda: _config(files))
    headers = _collect(found, lambda: _headers(files, apply))
    if config is None or headers is None:
        raise PolicyError(found)
    index = find_index(files.sizes)
    return Inventory(
        id=name,
        config=config,
        tensors={key: tensor for held in headers.values() for key, tensor in held.items()},
        side_files={
            file: size
            for file, size in files.sizes.items()
            if file not in (CONFIG, index) and not file.endswith(SUFFIX)
        },
        unread=files.unread,
        root=root,
        file_nbytes={file: files.sizes[file] for file in headers},
        findings=strays(files.place, files.sizes, headers),
    )


def read_json(files: CheckpointFiles, file: str, *, most: int = MAX_JSON_NBYTES) -> dict[str, Any]:
    """The JSON object that a file of the checkpoint holds; NaN and repeated keys pass.

    Raises: PolicyError if it has more than `most` bytes, is not UTF-8, not JSON, or no object.
    """
    # Its size is known before it is read, so a huge one is never in memory.
    size = files.sizes[file]
    if size > most:
        raise _bad_json(file, f"it has {size} bytes, more than {most}")
    content = files.read(file, 0, size)
    refuse_placeholder(file, content, size)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise _bad_json(file, str(error)) from error
    if not isinstance(value, dict):
        raise _bad_json(file, "it is not a JSON object")
    return value


def indexed(files: CheckpointFiles, index: str) -> dict[str, str]:
    """Tensor -> shard, as the index says.

    Raises: PolicyError if it is not an index.
    """
    return read_weight_map(read_json(files, index, most=MAX_INDEX_NBYTES), index)


def _collect(found: list[Diagnostic], read: Callable[[], T]) -> T | None:
    try:
        return read()
    except UnreachableError:
        raise
    except PolicyError as error:
        found += error.diagnostics
        return None


def _config(files: CheckpointFiles) -> dict[str, Any]:
    if CONFIG not in files.sizes:
        cure = "put the model's config.json beside its weights"
        raise fail("missing-config", place=files.place, suggestion=cure)
    return read_json(files, CONFIG, most=MAX_CONFIG_NBYTES)


def _headers(files: CheckpointFiles, apply: Apply) -> dict[str, Header]:
    index = find_index(files.sizes)
    weight_map = indexed(files, index) if index else None
    names, found = shard_names(files.place, files.sizes, weight_map)
    headers: dict[str, Header] = {}
    for name, read in zip(names, apply(partial(_header, files), names), strict=True):
        if isinstance(read, PolicyError):
            found += read.diagnostics
        else:
            headers[name] = read
    found += placement_defects(headers, weight_map)
    if found:
        raise PolicyError(found)
    return headers


def _header(files: CheckpointFiles, file: str) -> Header | PolicyError:
    # Returned, not raised: every shard is read, so that all defects come at once.
    size = files.sizes[file]
    try:
        first = files.read(file, 0, min(size, FIRST_NBYTES))
        refuse_placeholder(file, first, size)
        stop = LENGTH_NBYTES + header_nbytes(first, file=file, file_nbytes=size)
        if stop > len(first):
            first += files.read(file, len(first), stop)
        return parse_header(first[LENGTH_NBYTES:stop], file=file, file_nbytes=size)
    except UnreachableError:
        raise
    except PolicyError as error:
        return error


def _bad_json(file: str, reason: str) -> PolicyError:
    return fail("bad-source-json", file=file, reason=reason)
