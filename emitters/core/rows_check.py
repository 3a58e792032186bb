"""Rows of a bundle held against those of its source: which values are not what they must be.

What is not quantized has one right value. What a method of ours made is made again and compared
byte for byte. Of what others made, codes that are not the nearest ones are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np

from emitters.core.bundle_reading import Bundle
from emitters.core.decoding import Decoder, source_reader
from emitters.core.matching import Piece
from emitters.core.record import BundleModule
from emitters.numerics.reach import FLOORS, UNITS, Sums, distance
from emitters.numerics.rounding import to_float32
from emitters.numerics.value_types import Array
from emitters.tensor_io.view_rows import Cast
from policy_dsl import version
from policy_dsl.formats import Slack, UnstorableError
from policy_dsl.inventory import Inventory
from policy_dsl.roles.classify import Model
from policy_dsl.treatments import Coded, coded
from policy_dsl.views import View

# How a module is judged.
EQUAL, AGAIN, NEAREST = "equal", "coded again", "nearest codes"
# Values that are BF16 already lose nothing in F32, and so on.
_WIDER = {"BF16": ("BF16", "F32"), "F16": ("F16", "F32"), "F32": ("F32",)}


@dataclass(frozen=True, slots=True)
class Tally:
    """The comparison of some rows: their sums, and which values are not what they must be.

    wrong: how many; at: row and column of the first one; source: its place there, in words.
    rows: those compared; sound: those of them without a wrong value.
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

    @classmethod
    def of(cls, sums: Sums, wrong: Array, first: int) -> Tally:
        """The tally of a block. wrong: bool [rows, columns]; first: the number of its row 0."""
        rows = wrong.any(axis=1)
        count, place = int(wrong.sum()), None
        if count:
            row = int(rows.argmax())
            place = first + row, int(wrong[row].argmax())
        return cls(sums, count, place, len(wrong), len(wrong) - int(rows.sum()))


class RowsCheck:
    """A source and a bundle, opened for reading. Threads may share it.

    Raises: PolicyError if the source has no readable weights.
    """

    def __init__(self, bundle: Bundle, source: Inventory, model: Model) -> None:
        self._bundle, self._format = bundle, bundle.format
        self._family = model.architecture.family
        self.decoder = Decoder(bundle)
        self._reader = source_reader(source, model)
        self._repeats = cache(self._repeated)

    def way(self, module: BundleModule) -> str:
        """How the module is judged."""
        if not isinstance(module.treatment, Coded):
            return EQUAL
        scaled = module.name in self._bundle.scales
        return AGAIN if self._repeats(module.treatment.method) and not scaled else NEAREST

    def tally(self, piece: Piece) -> Tally:
        """The comparison of all rows of a piece."""
        step, total = self.decoder.block_rows(piece.module), Tally()
        ways = {EQUAL: self._equal, AGAIN: self._again, NEAREST: self._nearest}
        check = ways[self.way(piece.module)]
        # What is not finite is counted; numpy's warnings about it would say nothing more.
        with np.errstate(all="ignore"):
            for start in range(0, piece.n_rows, step):
                part = piece.cut(start, step)
                total += self._added(part) if part.view is None else check(part, part.view)
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
        if record.codec_version is None and record.policyc != version():
            return False
        if record.codec_version not in (None, self._format.spec.codec_version):
            return False
        known = self._format.methods.get(method)
        return known is None or not (known.needs or known.uses in record.statistics)

    def _added(self, piece: Piece) -> Tally:
        """Experts that no source has: all of them are zeros."""
        found = self.decoder.rows(piece.module, piece.at, piece.n_rows)
        sums = distance(np.zeros(found.shape, np.float32), found)
        return Tally.of(sums, found != 0, piece.at)

    def _equal(self, piece: Piece, view: View) -> Tally:
        """Rows that are not quantized: their bits are those of the source's values, cast."""
        stored, dtype = self.decoder.stored(piece.module, piece.at, piece.n_rows)
        wanted = self._values(piece, view)
        # A row of the bundle may be longer: a bias, by the experts that were added.
        own, rest = stored[:, : wanted.shape[1]], stored[:, wanted.shape[1] :]
        bits = own.view(f"u{own.itemsize}")
        wrong = np.ones(own.shape, bool)
        for how in self._casts(view, dtype):
            wrong &= bits != self._values(piece, view, how).view(bits.dtype)
            if not wrong.any():
                break
        found = to_float32(np.ascontiguousarray(own), dtype)
        if rest.size:
            padding = self._format.spec.padding[self._family]
            filled = to_float32(np.ascontiguousarray(rest), dtype) != padding.router_bias
            wrong = np.concatenate([wrong, filled], axis=1)
        return Tally.of(distance(wanted, found), wrong, piece.at)

    def _again(self, piece: Piece, view: View) -> Tally:
        """Rows coded once more, and compared byte for byte."""
        module = piece.module
        parts = self.decoder.parts(module, piece.at, piece.n_rows)
        found = self.decoder.decoded(module, parts, piece.n_rows)
        values = self._values(piece, view, self._own(module.dtype))
        wrong = np.zeros(found.shape, bool)
        try:
            again = self._format.codec().encode(values, module.dtype, coded(module.treatment))
        except UnstorableError:
            wrong[:] = True
        else:
            if any(again[part].tobytes() != parts[part].tobytes() for part in parts):
                wrong = found != self.decoder.decoded(module, again, piece.n_rows)
                # Bytes that no value depends on.
                wrong[0, 0] |= not wrong.any()
        return Tally.of(distance(self._values(piece, view), found), wrong, piece.at)

    def _nearest(self, piece: Piece, view: View) -> Tally:
        """Rows that something else coded: which codes are not the nearest ones."""
        module, how = piece.module, coded(piece.module.treatment)
        parts = self.decoder.parts(module, piece.at, piece.n_rows)
        found = self.decoder.decoded(module, parts, piece.n_rows)
        wanted = values = self._values(piece, view)
        slack, scale = self._slack(view, module.dtype), self.decoder.column_scale(module)
        if scale is not None:
            # What was applied may be more exact than what is stored.
            values = wanted * scale
            slack = slack._replace(relative=slack.relative + 2 * UNITS["F16"])
        wrong = self._format.codec().beyond(values, parts, module.dtype, how, slack)
        return Tally.of(distance(wanted, found), wrong, piece.at)

    def _values(self, piece: Piece, view: View, how: Cast = Cast("F32")) -> Array:  # noqa: B008
        """Rows of the source: float32 and exact, or as they become another type."""
        return self._reader.rows(view, piece.first, piece.n_rows, how)

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

    def _slack(self, view: View, dtype: str) -> Slack:
        """What is rounded of a source's values before they are coded."""
        source, relative, floor = view.tensor.dtype, 0.0, 0.0
        if view.scale is not None and self._format.spec.fp8_rules[0] != "f32":
            relative = 2 * UNITS["BF16"]
        if view.scale is not None or dtype not in _WIDER.get(source, ()):
            relative, floor = relative + UNITS[dtype], FLOORS[dtype]
        coarsest = max(UNITS.get(one, UNITS["BF16"]) for one in (source, dtype))
        return Slack(relative, floor, coarsest)
