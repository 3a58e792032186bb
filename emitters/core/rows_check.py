"""Rows of a bundle held against those of its source: which values are not what they must be.

What is not quantized has one right value. What a method of ours made is made again and compared
byte for byte. Of what others made, codes that are not the nearest ones are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np

from emitters.core.bundle_reading import Bundle
from emitters.core.decoding import Decoder, source_reader
from emitters.core.matching import Piece
from emitters.core.record import BundleModule
from emitters.core.verdicts import AGAIN, EQUAL, NEAREST, Sums, Tally
from emitters.numerics.reach import FLOORS, UNITS
from emitters.numerics.rounding import to_float32
from emitters.numerics.value_types import Array
from emitters.tensor_io.view_rows import Cast
from policy_dsl import version
from policy_dsl.formats import Slack, UnstorableError
from policy_dsl.inventory import Inventory
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.treatments import Coded, coded

# Values that are BF16 already lose nothing in F32, and so on.
_WIDER = {"BF16": ("BF16", "F32"), "F16": ("F16", "F32"), "F32": ("F32",)}


class RowsCheck:
    """A source and a bundle, opened for reading. Threads may share it.

    Raises: PolicyError if the source has no readable weights.
    """

    def __init__(self, bundle: Bundle, source: Inventory, model: Model) -> None:
        self._bundle = bundle
        self._family = model.architecture.family
        self._format = bundle.format
        self._decoder = Decoder(bundle)
        self._reader = source_reader(source, model)
        self._repeats = cache(self._repeated)

    def block_rows(self, module: BundleModule) -> int:
        """How many rows of a module are compared at once."""
        return self._decoder.block_rows(module)

    def way(self, module: BundleModule) -> str:
        """How the module is judged."""
        if not isinstance(module.treatment, Coded):
            return EQUAL
        scaled = module.name in self._bundle.scales
        return AGAIN if self._repeats(module.treatment.method) and not scaled else NEAREST

    def tally(self, piece: Piece) -> Tally:
        """The comparison of all rows of a piece."""
        # What is not finite is counted; numpy's warnings about it would say nothing more.
        with np.errstate(all="ignore"):
            return self._tally(piece)

    def _tally(self, piece: Piece) -> Tally:
        step, total = self.block_rows(piece.module), Tally()
        check = {EQUAL: self._equal, AGAIN: self._again, NEAREST: self._nearest}
        for start in range(0, piece.count, step):
            count = min(step, piece.count - start)
            at = piece.at + start
            if piece.tensor is None:
                total += self._added(piece.module, at, count)
                continue
            rows = piece.tensor, (piece.first + start, count)
            total += check[self.way(piece.module)](piece.module, rows, at)
        if total.at is None:
            return total
        return replace(total, at=piece.place(total.at), source=piece.source_place(total.at))

    def _repeated(self, method: str) -> bool:
        """Whether the codes of this method follow from the source, and from this program."""
        record = self._bundle.record
        # A module that the record leaves out has no method: how it was coded is not known.
        if not method or record is None:
            return False
        # Records of version 1 do not say which encoders made the codes.
        codec_version = self._format.spec.codec_version
        if (record.codec_version or codec_version) != codec_version:
            return False
        if record.codec_version is None and record.policyc != version():
            return False
        known = self._format.methods.get(method)
        return known is None or not (known.needs or known.uses in record.statistics)

    def _equal(
        self, module: BundleModule, rows: tuple[ModelTensor, tuple[int, int]], at: int
    ) -> Tally:
        """Rows that are not quantized: their bits are those of the source's values, cast."""
        tensor, span = rows
        stored, dtype = self._decoder.stored(module, at, span[1])
        wanted = self._values(tensor, span)
        # A row of the bundle may be longer: a bias, by the experts that were added.
        own, rest = stored[:, : wanted.shape[1]], stored[:, wanted.shape[1] :]
        bits = own.view(f"u{own.itemsize}")
        wrong = np.ones(own.shape, bool)
        for how in self._casts(tensor, dtype):
            wrong &= bits != self._reader.rows(tensor.view, *span, how).view(bits.dtype)
            if not wrong.any():
                break
        found = to_float32(np.ascontiguousarray(own), dtype)
        if rest.size:
            padding = self._format.spec.padding[self._family]
            filled = to_float32(np.ascontiguousarray(rest), dtype) != padding.router_bias
            wrong = np.concatenate([wrong, filled], axis=1)
        return Tally.of(Sums.of(wanted, found), wrong, at)

    def _again(
        self, module: BundleModule, rows: tuple[ModelTensor, tuple[int, int]], at: int
    ) -> Tally:
        """Rows coded once more, and compared byte for byte."""
        tensor, span = rows
        parts = self._decoder.parts(module, at, span[1])
        found = self._decoder.decoded(module, parts, span[1])
        values = self._reader.rows(tensor.view, *span, self._own(module.dtype))
        wrong = np.zeros(found.shape, bool)
        try:
            again = self._format.codec().encode(values, module.dtype, coded(module.treatment))
        except UnstorableError:
            wrong[:] = True
        else:
            if any(_bytes(again[part]) != _bytes(parts[part]) for part in parts):
                wrong = found != self._decoder.decoded(module, again, span[1])
                # Bytes that no value depends on.
                wrong[0, 0] |= not wrong.any()
        return Tally.of(Sums.of(self._values(tensor, span), found), wrong, at)

    def _nearest(
        self, module: BundleModule, rows: tuple[ModelTensor, tuple[int, int]], at: int
    ) -> Tally:
        """Rows that something else coded: which codes are not the nearest ones."""
        tensor, span = rows
        parts = self._decoder.parts(module, at, span[1])
        found = self._decoder.decoded(module, parts, span[1])
        wanted = self._values(tensor, span)
        slack, values = self._slack(tensor, module.dtype), wanted
        scale = self._decoder.column_scale(module)
        if scale is not None:
            # What was applied may be more exact than what is stored.
            values = wanted * scale
            slack = slack._replace(relative=slack.relative + 2 * UNITS["F16"])
        wrong = self._format.codec().beyond(
            values, parts, module.dtype, coded(module.treatment), slack
        )
        return Tally.of(Sums.of(wanted, found), wrong, at)

    def _added(self, module: BundleModule, at: int, count: int) -> Tally:
        """Rows of experts that no source has: all of them are zeros."""
        found = self._decoder.rows(module, at, count)
        return Tally.of(Sums.of(np.zeros(found.shape, np.float32), found), found != 0, at)

    def _values(self, tensor: ModelTensor, span: tuple[int, int]) -> Array:
        """float32: rows of the source, exact."""
        return self._reader.rows(tensor.view, *span, Cast("F32"))

    def _own(self, dtype: str) -> Cast:
        """How a build of ours makes values of a type."""
        rule = self._bundle.record.fp8_rule if self._bundle.record else ""
        spec = self._format.spec
        return Cast(dtype, rule or spec.fp8_rules[0], cuts_off=spec.cuts_off)

    def _casts(self, tensor: ModelTensor, dtype: str) -> Iterator[Cast]:
        """How the source's values may have become those of a plain tensor."""
        yield self._own(dtype)
        if self._bundle.record is not None:
            return
        # Other tools: rounded, also by way of the type in which they hold a model.
        yield Cast(dtype)
        if tensor.scale is not None:
            yield from (Cast(dtype, rule) for rule in self._format.spec.fp8_rules[1:])
        else:
            yield from (Cast(dtype, by_way_of=other) for other in ("BF16", "F16"))

    def _slack(self, tensor: ModelTensor, dtype: str) -> Slack:
        """What is rounded of a source's values before they are coded."""
        spec, source = self._format.spec, tensor.source.dtype
        relative = floor = 0.0
        if tensor.scale is not None:
            relative = 0.0 if spec.fp8_rules[0] == "f32" else 2 * UNITS["BF16"]
        if tensor.scale is not None or dtype not in _WIDER.get(source, ()):
            relative, floor = relative + UNITS[dtype], FLOORS[dtype]
        coarsest = max(UNITS.get(one, UNITS["BF16"]) for one in (source, dtype))
        return Slack(relative, floor, coarsest)


def _bytes(part: Array) -> bytes:
    return np.ascontiguousarray(part).tobytes()
