"""Which files hold a checkpoint's weights, and whether index and headers agree.

With an index: the shards that it names; other safetensors files (adapters, a second copy of
the weights) are not read, and a warning says so. Without: `model.safetensors`, or the only
safetensors file, or one whole set of files numbered `-I-of-N`; anything else is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, fail, grouped
from policy_dsl.escaping import is_plain_name, shown
from policy_dsl.inventory import TensorInfo

SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Header = dict[str, TensorInfo]

_NUMBERED = re.compile(r"(.+)-([0-9]{1,6})-of-([0-9]{1,6})\.safetensors")


def is_shard_name(file: str) -> bool:
    """Whether this is a plain name that ends as safetensors files do."""
    return is_plain_name(file) and file.endswith(SUFFIX)


def find_index(sizes: Mapping[str, int]) -> str | None:
    """The index among these files: the usual one, else the only `*.safetensors.index.json`."""
    if INDEX in sizes:
        return INDEX
    # Mistral and others name it after their own files.
    others = [file for file in sizes if file.endswith(SUFFIX + ".index.json")]
    return others[0] if len(others) == 1 else None


def read_weight_map(index: Mapping[str, Any], file: str) -> dict[str, str]:
    """Tensor -> shard, as the index says.

    Raises: PolicyError if it has no weight map, or names what is no plain shard name.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fail("bad-source-json", file=file, reason="it has no weight_map")
    values = weight_map.values()
    if not all(type(shard) is str for shard in values):
        raise fail("bad-source-json", file=file, reason="its weight_map holds no file names")
    wrong = sorted(shard for shard in set(values) if not is_shard_name(shard))
    if wrong:
        found = [diagnostic("shard-outside", file=shown(shard)) for shard in wrong]
        raise PolicyError(found)
    return weight_map


def shard_names(
    place: str, sizes: Mapping[str, int], weight_map: Mapping[str, str] | None
) -> tuple[list[str], list[Diagnostic]]:
    """The shards to read, sorted, and a diagnostic for each that is missing.

    Raises: PolicyError if without an index it is not clear which files are the weights.
    """
    if weight_map is None:
        return _unindexed(place, sizes)
    # What the names count up to does not matter here: publishers get it wrong.
    needed = Counter(weight_map.values())
    missing = grouped(
        diagnostic(
            "missing-shard",
            file=file,
            expected=f"the index puts {needed[file]} tensors in it",
            suggestion="fetch the file, or the whole checkpoint again",
        )
        for file in sorted(needed)
        if file not in sizes
    )
    return sorted(file for file in needed if file in sizes), missing


def strays(place: str, sizes: Mapping[str, int], used: Iterable[str]) -> tuple[Diagnostic, ...]:
    """A warning about the safetensors files beside the shards `used`, if there are any."""
    left = sorted({file for file in sizes if file.endswith(SUFFIX)} - set(used))
    if not left:
        return ()
    files = listed(left) + (" is" if len(left) == 1 else " are")
    return (diagnostic("stray-safetensors", place=place, files=files),)


def placement_defects(
    headers: Mapping[str, Header], weight_map: Mapping[str, str] | None
) -> list[Diagnostic]:
    """Where the shards' headers contradict each other or the index, grouped.

    A tensor whose shard is not among `headers` (missing, or broken) is not judged.
    """
    misplaced = _misplaced(headers, weight_map) if weight_map is not None else ()
    # As they come: an index of strangers may give millions.
    return grouped(chain(_duplicates(headers), misplaced))


def _duplicates(headers: Mapping[str, Header]) -> Iterator[Diagnostic]:
    first: dict[str, TensorInfo] = {}
    for file, held in headers.items():
        for name in first.keys() & held.keys():
            other = first[name].file
            yield diagnostic("duplicate-tensor", tensor=shown(name), file=other, other=file)
        first |= held


def _misplaced(
    headers: Mapping[str, Header], weight_map: Mapping[str, str]
) -> Iterator[Diagnostic]:
    for name, file in weight_map.items():
        if file in headers and name not in headers[file]:
            yield _mismatch(name, f"the index puts it in {file}, which does not hold it")
    for file, held in headers.items():
        # Not a difference of keys: that would walk the whole index for every shard.
        for name in held:
            if name not in weight_map:
                yield _mismatch(name, f"{file} holds it, but the index does not name it")


def _mismatch(name: str, reason: str) -> Diagnostic:
    cure = "fetch the index and the shards again, of the same revision, or repair the index"
    return diagnostic("index-mismatch", tensor=shown(name), reason=reason, suggestion=cure)


def _unindexed(place: str, sizes: Mapping[str, int]) -> tuple[list[str], list[Diagnostic]]:
    files = sorted(file for file in sizes if file.endswith(SUFFIX))
    if not files:
        raise _without_weights(place, sizes)
    # The name that loaders look for first.
    if "model.safetensors" in files:
        return ["model.safetensors"], []
    parts = [part for part in map(_NUMBERED.fullmatch, files) if part]
    if len(files) == 1 and not parts:
        return files, []
    if not _one_set(parts):
        cure = f"add {INDEX}, or give one of the files"
        raise fail("ambiguous-weights", place=place, files=listed(files), suggestion=cure)
    return [part[0] for part in parts], list(_gaps(parts))


def _one_set(parts: list[re.Match[str]]) -> bool:
    """Whether the numbered names have one stem, one total, and are not more than that."""
    kinds = {(part[1], part[3]) for part in parts}
    return len(kinds) == 1 and len(parts) <= int(parts[0][3])


def _gaps(parts: list[re.Match[str]]) -> Iterator[Diagnostic]:
    stem, total = parts[0][1], parts[0][3]
    there = {int(part[2]) for part in parts}
    # MiniMax-M2.7 counts from 0 (and to a wrong total, which only an index can set right).
    begin = 0 if 0 in there else 1
    numbers = range(begin, begin + int(total))
    missing = next((number for number in numbers if number not in there), None)
    if missing is not None:
        file = f"{stem}-{missing:0{len(total)}d}-of-{total}{SUFFIX}"
        expected = f"{len(there)} of {total} numbered files are, and no index"
        cure = f"fetch the rest; if the count in the names is wrong, add {INDEX}"
        yield diagnostic("missing-shard", file=file, expected=expected, suggestion=cure)


def _without_weights(place: str, sizes: Mapping[str, int]) -> PolicyError:
    pickles = sorted(file for file in sizes if file.endswith(PICKLES))
    cure = "use a revision or conversion of the model with safetensors files"
    if pickles:
        return fail("pickled-weights", place=place, files=listed(pickles), suggestion=cure)
    return fail("no-weights", place=place)


def listed(files: list[str], limit: int = 4) -> str:
    """The first few files, and how many are left out."""
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return ", ".join(shown(file, 80) for file in files[:limit]) + more
