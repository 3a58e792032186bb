"""What ranks the experts of a model, from a file: safetensors, or JSON.

path ── read_saliency ──> Saliency ── ranks, or kept ──> layer -> a number for each expert

A file has entries by name, such as `reap`: a tensor [layers, experts] of safetensors; in JSON
a list of a list for each layer, or an object of such lists by layer. The entry `keep` lists
the numbers of the experts that stay.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

from policy_dsl.bounded_json import parse_json
from policy_dsl.diagnostics import PolicyError, Span, did_you_mean, fail
from policy_dsl.escaping import shown
from policy_dsl.inventory import TensorInfo
from policy_dsl.regular_files import file_stat, read_whole, refuse_placeholder
from policy_dsl.sources.safetensors_header import LENGTH_NBYTES, header_nbytes, parse_header

KEEP = "keep"
# Far more than a number for each expert takes; JSON takes ten times its size in memory.
LARGEST_NBYTES = 64 * 2**20
_NUMBERS = {"F32": "f", "F64": "d", "I32": "i", "I64": "q"}
_SOURCE = "docs/pruning.md shows how to make one of what REAP's observer wrote of the model"


class ModelShape(NamedTuple):
    """What a saliency must fit: the layers that have experts, all layers, experts of each."""

    expert_layers: tuple[int, ...]
    n_layers: int
    n_experts: int


@dataclass(frozen=True, slots=True)
class Saliency:
    """One entry of a saliency file, as the file has it.

    path: as it was written, in a policy at `span` or on the command line. sha256: in hex, of
    the whole file. rows: by layer, or one after the other.
    """

    path: str
    name: str
    sha256: str
    rows: Mapping[int, Any] | Sequence[Any]
    span: Span | None = field(default=None, compare=False, repr=False)

    def ranks(self, shape: ModelShape) -> dict[int, tuple[float, ...]]:
        """A number for each expert of every layer that has experts.

        Raises: PolicyError (bad-saliency) unless the entry has just that.
        """
        found = {}
        for layer, row in self._rows(shape):
            self._require(len(row) == shape.n_experts, self._length(layer, row, shape))
            for expert, value in enumerate(row):
                place = f"expert {expert} of layer {layer} has {value!r:.40}"
                self._require(type(value) in (int, float), f"{place}, which is not a number")
                # Nothing ranks before or behind it.
                self._require(type(value) is int or not isnan(value), place)
            found[layer] = tuple(row)
        return found

    def kept(self, shape: ModelShape, count: int) -> dict[int, tuple[int, ...]]:
        """The numbers of `count` experts of every layer that has experts, ascending.

        Raises: PolicyError (bad-saliency) unless the entry lists just that.
        """
        found = {}
        for layer, row in self._rows(shape):
            for value in row:
                known = type(value) is int and 0 <= value < shape.n_experts
                experts = f"the model has experts 0-{shape.n_experts - 1}"
                self._require(known, f"layer {layer} keeps {value!r:.40}; {experts}")
            for value, after in pairwise(sorted(row)):
                self._require(value != after, f"layer {layer} keeps expert {value} twice")
            why = "all layers keep as many, because readers know one count"
            self._require(
                len(row) == count, f"layer {layer} keeps {len(row)} experts, not {count}; {why}"
            )
            found[layer] = tuple(sorted(row))
        return found

    def _rows(self, shape: ModelShape) -> Iterator[tuple[int, Sequence[Any]]]:
        """The row of every layer that has experts."""
        layers = shape.expert_layers
        rows = self._by_layer(self.rows, shape)
        last = max(rows, default=0)
        wanted = f"the model has layers 0-{shape.n_layers - 1}"
        self._require(last < shape.n_layers, f"it has a layer {last}; {wanted}")
        for layer in layers:
            self._require(layer in rows, f"it has nothing about layer {layer}")
            row, listed = rows[layer], isinstance(rows[layer], list | tuple)
            self._require(listed, f"layer {layer} has no list of numbers")
            yield layer, row

    def _by_layer(
        self, rows: Mapping[int, Any] | Sequence[Any], shape: ModelShape
    ) -> Mapping[int, Any]:
        """The rows by layer: one for each layer, or for each that has experts."""
        if isinstance(rows, Mapping):
            return rows
        found, layers = len(rows), shape.expert_layers
        wanted = " or ".join(str(one) for one in sorted({len(layers), shape.n_layers}))
        fits = found in (shape.n_layers, len(layers))
        self._require(fits, f"it has {found} layers, the model has {wanted}")
        every = range(shape.n_layers)
        return dict(zip(every if found == shape.n_layers else layers, rows, strict=True))

    def _length(self, layer: int, row: Sequence[Any], shape: ModelShape) -> str:
        return f"layer {layer} has {len(row)} numbers, the model {shape.n_experts} experts"

    def _require(self, holds: bool, reason: str) -> None:
        if not holds:
            raise _bad(self.path, self.name, self.span, reason)


def read_saliency(path: Path, name: str, span: Span | None = None) -> Saliency:
    """The entry of that name of a saliency file.

    span: where a policy names the file, for the findings.
    Raises: PolicyError if the file cannot be read, is no saliency file, or lacks the entry.
    """
    content = _content(path, span)
    digest = hashlib.sha256(content).hexdigest()
    rows: Mapping[int, Any] | Sequence[Any]
    try:
        refuse_placeholder(path.name, content, len(content))
        # The length of a header of safetensors is no text: its upper bytes are zero.
        if content[4:LENGTH_NBYTES] == bytes(4):
            rows = _tensor_rows(content, path, name, span)
        else:
            rows = _json_rows(content, path, name, span)
    except PolicyError as error:
        # Where a policy names it is where the cure is.
        raise PolicyError(replace(found, span=span) for found in error.diagnostics) from None
    return Saliency(str(path), name, digest, rows, span)


def _content(path: Path, span: Span | None) -> bytes:
    try:
        nbytes = file_stat(path).st_size
        if nbytes > LARGEST_NBYTES:
            raise _no_saliencies(path, span, f"it has {nbytes} bytes, over {LARGEST_NBYTES}")
        return read_whole(path, most=LARGEST_NBYTES)
    except PolicyError as error:
        raise PolicyError(
            replace(found, span=span, suggestion=_SOURCE) for found in error.diagnostics
        ) from None


def _tensor_rows(
    content: bytes, path: Path, name: str, span: Span | None
) -> Sequence[Sequence[Any]]:
    nbytes = header_nbytes(content[:LENGTH_NBYTES], file=path.name, file_nbytes=len(content))
    header = content[LENGTH_NBYTES : LENGTH_NBYTES + nbytes]
    tensors = parse_header(header, file=path.name, file_nbytes=len(content))
    found: TensorInfo = _entry(tensors, path, name, span)
    kind = _NUMBERS.get(found.dtype)
    # What takes no bytes may have any number of rows or columns.
    if kind is None or len(found.shape) != 2 or 0 in found.shape:
        wanted = f"[layers, experts] of {', '.join(_NUMBERS)}"
        shape = f"{found.dtype} {list(found.shape)}"
        raise _bad(str(path), name, span, f"it is {shape}, not {wanted}")
    row = struct.Struct(f"<{found.shape[1]}{kind}")
    return list(row.iter_unpack(content[found.start : found.stop]))


def _json_rows(
    content: bytes, path: Path, name: str, span: Span | None
) -> Mapping[int, Any] | Sequence[Any]:
    try:
        document = parse_json(content, hook=_once)
    except ValueError as error:
        reason = f"it is not safetensors, and {error}"
        raise _no_saliencies(path, span, reason) from None
    if not isinstance(document, dict):
        raise _no_saliencies(path, span, "it is JSON, and no object of entries")
    # What else stands there says where the numbers come from.
    entries = {key: one for key, one in document.items() if isinstance(one, list | dict)}
    found = _entry(entries, path, name, span)
    if isinstance(found, list):
        return found
    odd = next((key for key in found if not _is_layer(key)), None)
    if odd is not None:
        raise _bad(str(path), name, span, f'"{shown(odd)}" is not a number of a layer')
    return {int(layer): row for layer, row in found.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises: ValueError if it has a key twice: one of them would not count."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f'"{shown(key)}" appears twice in an object')
        found[key] = value
    return found


def _is_layer(key: str) -> bool:
    # 01 is another key than 1, and a number of many digits is no layer.
    return key.isascii() and key.isdecimal() and len(key) < 8 and str(int(key)) == key


def _entry(entries: Mapping[str, Any], path: Path, name: str, span: Span | None) -> Any:
    if name in entries:
        return entries[name]
    raise fail(
        "missing-saliency",
        span,
        suggestion=did_you_mean(name, map(shown, entries)),
        path=str(path),
        name=name,
        known=", ".join(shown(one) for one in sorted(entries)[:8]) or "nothing",
    )


def _no_saliencies(path: Path, span: Span | None, reason: str) -> PolicyError:
    return fail("not-saliencies", span, suggestion=_SOURCE, path=str(path), reason=reason)


def _bad(path: str, name: str, span: Span | None, reason: str) -> PolicyError:
    cure = "give the saliencies of this model"
    return fail("bad-saliency", span, suggestion=cure, path=path, name=name, reason=reason)
