"""Rows of a bundle: decoded as its readers do, and held against those of its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np

from emitters.core.bundle_reading import Bundle
from emitters.core.matching import Piece
from emitters.core.record import BundleModule
from emitters.numerics import VALUE_TYPES, Array
from emitters.numerics.reach import FLOORS, UNITS, Sums, distance
from emitters.numerics.rounding import to_float32
from emitters.tensor_io.files import Source, columns, file_facts
from emitters.tensor_io.view_rows import Cast, ViewReader
from policy_dsl import version
from policy_dsl.diagnostics import fail
from policy_dsl.formats import PartShape, Slack, UnstorableError
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.roles.classify import Model
from policy_dsl.treatments import Coded, coded
from policy_dsl.views import View

# How a module is judged: by its one right value, by codes made again, by codes not the nearest.
EQUAL, AGAIN, NEAREST = "equal", "coded again", "nearest codes"
# Values that are BF16 already lose nothing in F32, and so on.
_WIDER = {"BF16": ("BF16", "F32"), "F16": ("F16", "F32"), "F32": ("F32",)}
# Stored, dequantized and decoded values of a block stay in a core's cache.
_BLOCK_VALUES = 2**18
_PLAIN = PartShape("", "", ())


def opened(inventory: Inventory, root: Path) -> Source:
    """A checkpoint or bundle, opened for reading in the state in which it is."""
    files = {tensor.file for tensor in inventory.tensors.values() if tensor.file}
    return Source(root, file_facts(root, files))


def source_reader(source: Inventory, model: Model) -> ViewReader:
    """What reads rows of a source's tensors. Raises: PolicyError if it has no readable weights."""
    if source.root is None:
        raise fail("not-comparable", reason=f"{source.id} is known by its headers alone")
    return ViewReader(opened(source, source.root), model.config)


class Decoder:
    """Decodes modules of one bundle. Many threads may share it."""

    def __init__(self, bundle: Bundle) -> None:
        self._format, self._scales = bundle.format, bundle.scales
        self._source = opened(bundle.inventory, bundle.folder)
        # Thousands of modules have the same form.
        self._shapes = lru_cache(256)(bundle.format.spec.part_shapes)

    def block_rows(self, module: BundleModule) -> int:
        """How many logical rows to ask for at once."""
        forms = self._forms(module)
        together = max((form.together for form in forms), default=1)
        # Rows stored by columns are read in pieces, which should be long.
        values = _BLOCK_VALUES * (16 if any(form.order == "columns" for form in forms) else 1)
        return max(1, values // columns(module.shape) // together) * together

    def rows(self, module: BundleModule, first: int, count: int) -> Array:
        """float32 [count, last axis]: logical rows of a module, as its readers see them.

        Raises: PolicyError if a file cannot be read any more.
        """
        if not isinstance(module.treatment, Coded):
            return to_float32(*self.stored(module, first, count))
        return self.decoded(module, self.parts(module, first, count), count)

    def stored(self, module: BundleModule, first: int, count: int) -> tuple[Array, str]:
        """[count, last axis]: rows of a plain module as they are stored, and their dtype."""
        (tensor,) = module.tensors.values()
        return self._read(tensor, _PLAIN, module, (first, count)), tensor.dtype

    def parts(self, module: BundleModule, first: int, count: int) -> dict[str, Array]:
        """What is stored for rows of a quantized module, as its format's encoder gives it."""
        return {
            form.part: self._read(module.tensors[form.part], form, module, (first, count))
            for form in self._forms(module)
            if not form.constant
        }

    def decoded(self, module: BundleModule, parts: Mapping[str, Array], count: int) -> Array:
        """float32 [count, last axis]: the values of the parts of so many rows."""
        width = columns(module.shape)
        decoded = self._format.codec().decode(parts, module.dtype, coded(module.treatment), width)
        # What fills up the last of the groups that run over all rows is none of them.
        values: Array = decoded.reshape(-1, width)[:count]
        scale = self.column_scale(module)
        # A damaged scale gives values that are not finite, which is found.
        with np.errstate(divide="ignore", invalid="ignore"):
            return values if scale is None else values / scale

    def wrong_constants(self, module: BundleModule) -> Iterator[str]:
        """The parts of a module that do not hold what its treatment says."""
        for form in self._forms(module):
            held = module.tensors.get(form.part)
            if form.constant and held and self._all(held).tobytes() != form.constant:
                yield form.part

    def column_scale(self, module: BundleModule) -> Array | None:
        """float32 [in]: what the columns were multiplied by, if the bundle has it."""
        held = self._scales.get(module.name)
        return None if held is None else self.rows(held, 0, 1)[0]

    def _forms(self, module: BundleModule) -> tuple[PartShape, ...]:
        # A plain tensor has none, whatever it is called.
        is_coded = isinstance(module.treatment, Coded)
        return self._shapes(module.treatment, module.shape, module.dtype) if is_coded else ()

    def _all(self, tensor: TensorInfo) -> Array:
        return self._source.read(tensor.file or "", tensor.start, tensor.nbytes)

    def _read(
        self, tensor: TensorInfo, form: PartShape, module: BundleModule, span: tuple[int, int]
    ) -> Array:
        """A part's share of rows (first, count): [count / together, …], [lines, …], or all."""
        known = VALUE_TYPES.get(tensor.dtype)
        words = {"U32": np.uint32, "I32": np.int32}
        dtype = np.dtype(known.storage if known else words.get(tensor.dtype, np.uint8))
        file, n_rows = tensor.file or "", max(1, prod(module.shape[:-1]))
        if form.order == "whole":
            return self._all(tensor).view(dtype)
        n_lines = tensor.shape[0] if form.order == "columns" else 1
        stride = tensor.nbytes // n_lines
        start, stop = (row * stride // n_rows for row in (span[0], sum(span)))
        shape = n_lines, stop - start
        stored = self._source.lines(file, tensor.start + start, shape, stride).view(dtype)
        return stored if form.order == "columns" else stored.reshape(span[1] // form.together, -1)


@dataclass(frozen=True, slots=True)
class Tally:
    """The comparison of some rows: their sums, and which values are not what they must be.

    wrong: how many; at: row and column of the first in its whole module; source: its place there,
    in words. rows: those compared; sound: those of them without a wrong value.
    """

    sums: Sums = field(default_factory=Sums)
    wrong: int = 0
    at: tuple[int, int] | None = None
    rows: int = 0
    sound: int = 0
    source: str = ""

    def __add__(self, other: Tally) -> Tally:
        """The tally of both; `other` is about rows after these."""
        first = other if self.at is None else self
        sums, wrong = self.sums + other.sums, self.wrong + other.wrong
        rows, sound = self.rows + other.rows, self.sound + other.sound
        return Tally(sums, wrong, first.at, rows, sound, first.source)


class RowsCheck:
    """Compares rows; threads may share it. Raises: PolicyError if the source has no weights."""

    def __init__(self, bundle: Bundle, source: Inventory, model: Model) -> None:
        self._bundle, self._format = bundle, bundle.format
        self._family = model.architecture.family
        self.decoder, self._reader = Decoder(bundle), source_reader(source, model)

    def way(self, module: BundleModule) -> str:
        """How the module is judged: again if codes follow from the source and this program."""
        record, treatment = self._bundle.record, module.treatment
        if not isinstance(treatment, Coded):
            return EQUAL
        # A module that the record leaves out has no method: how it was coded is not known.
        if record is None or not treatment.method or module.name in self._bundle.scales:
            return NEAREST
        known, spec = self._format.methods.get(treatment.method), self._format.spec
        # Records of version 1 do not say which encoders made the codes, only which policyc.
        made_by = record.policyc if record.codec_version is None else record.codec_version
        alike = made_by in (spec.codec_version, version())
        by_statistics = known and (known.needs or known.uses in record.statistics)
        return AGAIN if alike and not by_statistics else NEAREST

    def tally(self, piece: Piece) -> Tally:
        """The comparison of all rows of a piece."""
        step = self.decoder.block_rows(piece.module)
        blocks = (piece.cut(start, step) for start in range(0, piece.n_rows, step))
        # What is not finite is counted; numpy's warnings about it would say nothing more.
        with np.errstate(all="ignore"):
            return sum(map(self._tally, blocks), Tally())

    def _tally(self, piece: Piece) -> Tally:
        if piece.view is None:
            # Experts that no source has: all of them are zeros.
            found = self.decoder.rows(piece.module, piece.at, piece.n_rows)
            wanted, wrong = np.zeros_like(found), found != 0
        else:
            wanted = self._reader.rows(piece.view, piece.first, piece.n_rows, Cast("F32"))
            ways = {EQUAL: self._equal, AGAIN: self._again, NEAREST: self._nearest}
            found, wrong = ways[self.way(piece.module)](piece, piece.view, wanted)
        sums, unsound = distance(wanted, found), wrong.any(axis=1)
        sound = len(wrong) - int(unsound.sum())
        if sound == len(wrong):
            return Tally(sums, rows=sound, sound=sound)
        row = int(unsound.argmax())
        at, source = piece.places(row, int(wrong[row].argmax()))
        return Tally(sums, int(wrong.sum()), at, len(wrong), sound, source)

    # Each of these gives what was found, float32, and which of it is wrong, bool.

    def _equal(self, piece: Piece, view: View, wanted: Array) -> tuple[Array, Array]:
        """Rows that are not quantized: their bits are those of the source's values, cast."""
        stored, dtype = self.decoder.stored(piece.module, piece.at, piece.n_rows)
        # A row of the bundle may be longer: a bias, by the experts that were added.
        own, rest = stored[:, : wanted.shape[1]], stored[:, wanted.shape[1] :]
        bits = own.view(f"u{own.itemsize}")
        wrong = np.ones(own.shape, bool)
        for how in self._casts(view, dtype):
            values = self._reader.rows(view, piece.first, piece.n_rows, how)
            wrong &= bits != values.view(bits.dtype)
            if not wrong.any():
                break
        if rest.size:
            padding = self._format.spec.padding[self._family]
            filled = to_float32(np.ascontiguousarray(rest), dtype) != padding.router_bias
            wrong = np.concatenate([wrong, filled], axis=1)
        return to_float32(np.ascontiguousarray(own), dtype), wrong

    def _again(self, piece: Piece, view: View, wanted: Array) -> tuple[Array, Array]:
        """Rows coded once more, and compared byte for byte."""
        module = piece.module
        parts = self.decoder.parts(module, piece.at, piece.n_rows)
        found = self.decoder.decoded(module, parts, piece.n_rows)
        values = self._reader.rows(view, piece.first, piece.n_rows, self._own(module.dtype))
        try:
            again = self._format.codec().encode(values, module.dtype, coded(module.treatment))
        except UnstorableError:
            return found, np.ones(found.shape, bool)
        if all(again[part].tobytes() == parts[part].tobytes() for part in parts):
            return found, np.zeros(found.shape, bool)
        wrong = found != self.decoder.decoded(module, again, piece.n_rows)
        # Bytes that no value depends on.
        wrong[0, 0] |= not wrong.any()
        return found, wrong

    def _nearest(self, piece: Piece, view: View, wanted: Array) -> tuple[Array, Array]:
        """Rows that something else coded: which codes are not the nearest ones."""
        module, how = piece.module, coded(piece.module.treatment)
        parts = self.decoder.parts(module, piece.at, piece.n_rows)
        scale = self.decoder.column_scale(module)
        # What is rounded of the source's values before they are coded.
        source, dtype, relative, floor = view.tensor.dtype, module.dtype, 0.0, 0.0
        if view.scale is not None and self._format.spec.fp8_rules[0] != "f32":
            relative = 2 * UNITS["BF16"]
        if view.scale is not None or dtype not in _WIDER.get(source, ()):
            relative, floor = relative + UNITS[dtype], FLOORS[dtype]
        if scale is not None:
            # What was applied may be more exact than what is stored.
            wanted, relative = wanted * scale, relative + 2 * UNITS["F16"]
        coarsest = max(UNITS.get(one, UNITS["BF16"]) for one in (source, dtype))
        slack = Slack(relative, floor, coarsest)
        wrong = self._format.codec().beyond(wanted, parts, dtype, how, slack)
        return self.decoder.decoded(module, parts, piece.n_rows), wrong

    def _own(self, dtype: str) -> Cast:
        """How a build of ours makes values of a type."""
        rule = self._bundle.record.fp8_rule if self._bundle.record else ""
        spec = self._format.spec
        return Cast(dtype, rule or spec.fp8_rules[0], cuts_off=spec.cuts_off)

    def _casts(self, view: View, dtype: str) -> Iterator[Cast]:
        """How the source's values may have become those of a plain tensor."""
        yield self._own(dtype)
        if self._bundle.record is not None:
            return
        # Other tools: rounded, also by way of the type in which they hold a model.
        yield Cast(dtype)
        if view.scale is not None:
            yield from (Cast(dtype, rule) for rule in self._format.spec.fp8_rules[1:])
        else:
            yield from (Cast(dtype, by_way_of=other) for other in ("BF16", "F16"))
