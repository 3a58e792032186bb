"""What ranks the experts of a model, from a file: safetensors, or JSON.

A file has entries by name, such as `reap`: a tensor [layers, experts] of safetensors; in JSON
a list of a list for each layer, or an object of such lists by layer. The entry `keep` lists
the numbers of the experts that stay.
"""

import hashlib
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import PolicyError, Span, UnreadableError, did_you_mean, fail
from policy_dsl.escaping import shown
from policy_dsl.inventory import TensorInfo
from policy_dsl.regular_files import file_stat, read_whole, refuse_placeholder
from policy_dsl.sources.safetensors_header import LENGTH_NBYTES, header_nbytes, parse_header

KEEP = "keep"
# Far more than a number for each expert takes; JSON takes ten times its size in memory.
LARGEST_NBYTES = 64 * 2**20
_NUMBERS = {"F32": "f", "F64": "d", "I32": "i", "I64": "q"}
_SOURCE = "docs/pruning.md shows how to make one of what REAP's observer wrote of the model"

Rows = Mapping[int, Any] | Sequence[Any]


class ModelShape(NamedTuple):
    """What a saliency must fit: the layers that have experts, all layers, experts of each."""

    expert_layers: tuple[int, ...]
    n_layers: int
    n_experts: int


@dataclass(frozen=True, slots=True)
class Saliency:
    """One entry of a saliency file; rows: by layer, or one after the other.

    path: as it was written, in a policy at `span` or on the command line. sha256: of all, in hex.
    """

    path: str
    name: str
    sha256: str
    rows: Rows
    span: Span | None = field(default=None, compare=False, repr=False)

    def ranks(self, shape: ModelShape) -> dict[int, tuple[float, ...]]:
        """A number for each expert of every layer that has experts. Raises: PolicyError."""
        ranks, n = {}, shape.n_experts
        for layer, row in self._rows(shape):
            held = f"layer {layer} has {len(row)} numbers"
            self._require(len(row) == n, f"{held}, the model {n} experts")
            for expert, value in enumerate(row):
                place = f"expert {expert} of layer {layer} has {value!r:.40}"
                self._require(type(value) in (int, float), f"{place}, which is not a number")
                # Nothing ranks before or behind it.
                self._require(type(value) is int or not isnan(value), place)
            ranks[layer] = tuple(row)
        return ranks

    def kept(self, shape: ModelShape, count: int) -> dict[int, tuple[int, ...]]:
        """The `count` experts to keep of every layer that has some. Raises: PolicyError."""
        kept = {}
        experts = f"the model has experts 0-{shape.n_experts - 1}"
        why = "all layers keep as many, because readers know one count"
        for layer, row in self._rows(shape):
            keeps = f"layer {layer} keeps"
            for value in row:
                known = type(value) is int and 0 <= value < shape.n_experts
                self._require(known, f"{keeps} {value!r:.40}; {experts}")
            kept[layer] = tuple(sorted(row))
            for value, after in pairwise(kept[layer]):
                self._require(value != after, f"{keeps} expert {value} twice")
            self._require(len(row) == count, f"{keeps} {len(row)} experts, not {count}; {why}")
        return kept

    def _rows(self, shape: ModelShape) -> Iterator[tuple[int, Sequence[Any]]]:
        """The row of every layer that has experts."""
        rows, layers = self.rows, shape.expert_layers
        if not isinstance(rows, Mapping):
            # One for each layer, or for each that has experts.
            wanted = " or ".join(map(str, sorted({len(layers), shape.n_layers})))
            fits = len(rows) in (shape.n_layers, len(layers))
            self._require(fits, f"it has {len(rows)} layers, the model has {wanted}")
            numbers = range(shape.n_layers) if len(rows) == shape.n_layers else layers
            rows = dict(zip(numbers, rows, strict=True))
        last = max(rows, default=0)
        known = f"the model has layers 0-{shape.n_layers - 1}"
        self._require(last < shape.n_layers, f"it has a layer {last}; {known}")
        for layer in layers:
            self._require(layer in rows, f"it has nothing about layer {layer}")
            is_list = isinstance(rows[layer], list | tuple)
            self._require(is_list, f"layer {layer} has no list of numbers")
            yield layer, rows[layer]

    def _require(self, holds: bool, reason: str) -> None:
        if not holds:
            raise _bad(self.path, self.name, reason, self.span)


def read_saliency(path: Path, name: str, span: Span | None = None) -> Saliency:
    """The entry of that name of a saliency file, which a policy names at `span`.

    Raises: PolicyError if the file cannot be read, is not a saliency file, or lacks the entry.
    """
    try:
        nbytes = file_stat(path).st_size
        if nbytes > LARGEST_NBYTES:
            raise _not_saliencies(path, f"it has {nbytes} bytes, over {LARGEST_NBYTES}")
        content = read_whole(path, most=LARGEST_NBYTES)
        refuse_placeholder(path.name, content, len(content))
        # The length of a header of safetensors is not text: its upper bytes are zero.
        is_tensors = content[4:LENGTH_NBYTES] == bytes(4)
        rows = (_tensor_rows if is_tensors else _json_rows)(content, path, name)
    except PolicyError as error:
        # Where a policy names it is where the cure is.
        cure = _SOURCE if isinstance(error, UnreadableError) else None
        raise PolicyError(
            replace(defect, span=span, suggestion=cure or defect.suggestion)
            for defect in error.diagnostics
        ) from None
    return Saliency(str(path), name, hashlib.sha256(content).hexdigest(), rows, span)


def _tensor_rows(content: bytes, path: Path, name: str) -> Rows:
    file, size = path.name, len(content)
    stop = LENGTH_NBYTES + header_nbytes(content, file=file, file_nbytes=size)
    tensors = parse_header(content[LENGTH_NBYTES:stop], file=file, file_nbytes=size)
    tensor: TensorInfo = _entry(tensors, path, name)
    kind, shape = _NUMBERS.get(tensor.dtype), list(tensor.shape)
    # What takes no bytes may have any number of rows or columns.
    if kind is None or len(shape) != 2 or 0 in shape:
        wanted = f"[layers, experts] of {', '.join(_NUMBERS)}"
        raise _bad(str(path), name, f"it is {tensor.dtype} {shape}, not {wanted}")
    row = struct.Struct(f"<{shape[1]}{kind}")
    return list(row.iter_unpack(content[tensor.start : tensor.stop]))


def _json_rows(content: bytes, path: Path, name: str) -> Rows:
    try:
        document = parse_json(content, hook=_object)
    except ValueError as error:
        raise _not_saliencies(path, f"it is not safetensors, and {error}") from None
    if not isinstance(document, dict):
        raise _not_saliencies(path, "it is JSON, but not an object of entries")
    # What else is there says where the numbers come from.
    entries = {key: value for key, value in document.items() if isinstance(value, list | dict)}
    rows = _entry(entries, path, name)
    if isinstance(rows, list):
        return rows
    for key in rows:
        # 01 is another key than 1, and a number of many digits is not a layer.
        if not re.fullmatch(r"0|[1-9][0-9]{0,6}", key):
            raise _bad(str(path), name, f'"{shown(key)}" is not the number of a layer')
    return {int(layer): row for layer, row in rows.items()}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises: ValueError if it has a key twice: one of them would not count."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f'"{shown(key)}" appears twice in an object')
    return entries


def _entry(entries: Mapping[str, Any], path: Path, name: str) -> Any:
    if name in entries:
        return entries[name]
    known = ", ".join(shown(entry) for entry in sorted(entries)[:8]) or "nothing"
    cure = did_you_mean(name, map(shown, entries))
    raise fail("missing-saliency", suggestion=cure, path=str(path), name=name, known=known)


def _not_saliencies(path: Path, reason: str) -> PolicyError:
    return fail("not-saliencies", suggestion=_SOURCE, path=str(path), reason=reason)


def _bad(path: str, name: str, reason: str, span: Span | None = None) -> PolicyError:
    cure = "give the saliencies of this model"
    return fail("bad-saliency", span, suggestion=cure, path=path, name=name, reason=reason)
