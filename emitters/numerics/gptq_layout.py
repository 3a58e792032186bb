"""How GPTQ stores a matrix: codes and zero points in columns of words, scales in float16.

Rows of the matrix are columns of every part: `qweight` [in*bits/32, rows] packs the codes of a
row from top to bottom, `qzeros` [groups, rows*bits/32] the zero points of neighbouring rows,
`scales` is [groups, rows]. Words are int32, the stream of bits that of `bitpack`.
value = scale * (code - zero point).
Source: auto-round 0.16.1, `auto_round_extension/torch/qlinear_torch_zp.py` and, for version 2,
`qlinear_torch.py`; GPTQModel 7.7.0 packs alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from emitters.numerics.bitpack import pack_codes, unpack_codes
from emitters.numerics.jit import device, factory, int64, int64_pair, kernel, reads, writes
from emitters.numerics.scalars import rounded, widen
from emitters.numerics.value_types import F16, Array, flat, raw_bits

WIDTHS = (2, 3, 4, 8)
# What is added to a zero point to be stored; "gptq_v2" is the second version of the layout.
ZERO_OFFSETS = {"gptq": -1, "gptq_v2": 0}

_BAND = 32  # rows that go to their columns together: whole cache lines


class GptqParts(NamedTuple):
    """What rows become, zero points not yet packed.

    qweight: int32 [in*bits/32, rows]; zeros: int16 [groups, rows]; scales: float16 [groups,
    rows].
    """

    qweight: Array
    zeros: Array
    scales: Array


@device
def new_band(n_words: int) -> Array:
    """Room for the words of the rows that go to their columns together: uint32, flat."""
    return np.empty(_BAND * n_words, np.uint32)


@device
def pack_row(codes: Array, bits: int, place: tuple[int, int], band: Array, words: Array) -> None:
    """The packed codes of one row go to its column, together with the others of its band.

    codes: uint8 [in]; place: (row, rows); rows come in order. band: from `new_band`, kept
    between them; words: int32 [in*bits/32, rows], flat.
    """
    row, rows = place
    n_words, first = codes.shape[0] // 32 * bits, row // _BAND * _BAND
    pieces = np.empty(codes.shape[0] // 8, np.uint64)
    pack_codes(codes, pieces, band[(row - first) * n_words :][:n_words], bits)
    if row == rows - 1 or row == first + _BAND - 1:
        for j in range(n_words):
            line = words[j * rows + first : j * rows + row + 1]
            for k in range(line.shape[0]):
                line[k] = np.int32(band[k * n_words + j])


@device
def _unpack_row(words: Array, bits: int, place: tuple[int, int], band: Array, codes: Array) -> None:
    """The inverse of `pack_row`."""
    row, rows = place
    n_words, first = codes.shape[0] // 32 * bits, row // _BAND * _BAND
    if row == first:
        for j in range(n_words):
            line = words[j * rows + first : j * rows + min(first + _BAND, rows)]
            for k in range(line.shape[0]):
                band[k * n_words + j] = np.uint32(line[k])
    unpack_codes(band[(row - first) * n_words :][:n_words], codes, bits)


@factory
def _packer() -> Callable[..., None]:
    """The kernel that packs the codes of rows into columns."""

    @kernel(reads("uint8"), int64, int64, writes("int32"))
    def pack_gptq(codes: Array, columns: int, bits: int, words: Array) -> None:
        rows, band = codes.shape[0] // columns, new_band(columns // 32 * bits)
        for row in range(rows):
            part = codes[row * columns : (row + 1) * columns]
            pack_row(part, bits, (row, rows), band, words)

    return pack_gptq


@factory
def _unpacker() -> Callable[..., None]:
    """The kernel that unpacks columns into the codes of rows."""

    @kernel(reads("int32"), int64, int64, writes("uint8"))
    def unpack_gptq(words: Array, columns: int, bits: int, codes: Array) -> None:
        rows, band = codes.shape[0] // columns, new_band(columns // 32 * bits)
        for row in range(rows):
            part = codes[row * columns : (row + 1) * columns]
            _unpack_row(words, bits, (row, rows), band, part)

    return unpack_gptq


@factory
def _decoder() -> Callable[..., None]:
    """The kernel that turns the codes of rows into values."""

    @kernel(reads("uint8"), int64_pair, reads("int16"), reads("uint16"), writes("float32"))
    def decode_gptq(
        codes: Array, layout: tuple[int, int], zeros: Array, scales: Array, values: Array
    ) -> None:
        columns, size = layout
        rows = codes.shape[0] // columns
        for row in range(rows):
            for first in range(0, columns, size):
                at = first // size * rows + row
                scale, zero = widen(F16, scales[at]), np.float32(zeros[at])
                start, end = row * columns + first, row * columns + min(first + size, columns)
                part, its_codes = values[start:end], codes[start:end]
                for i in range(part.shape[0]):
                    part[i] = rounded(F16, (np.float32(its_codes[i]) - zero) * scale)

    return decode_gptq


def pack_columns(codes: Array, *, bits: int) -> Array:
    """The codes of each row as a column of words: int32 [in*bits/32, rows].

    codes: uint8 [rows, in], each below 2**bits, in % 32 == 0.
    Raises: ValueError for other widths than 2, 3, 4 and 8, or rows that fill no whole words.
    """
    rows, columns = codes.shape
    _check_words(columns, bits)
    words = np.empty((columns // 32 * bits, rows), np.int32)
    _packer()(flat(codes, np.uint8, "codes"), columns, bits, words.reshape(-1))
    return words


def unpack_columns(words: Array, *, bits: int) -> Array:
    """The inverse of `pack_columns`: uint8 [rows, in]."""
    columns = words.shape[0] * 32 // max(bits, 1)
    _check_words(columns, bits)
    codes = np.empty((words.shape[1], columns), np.uint8)
    _unpacker()(flat(words, np.int32, "words"), columns, bits, codes.reshape(-1))
    return codes


def first_unstorable_zero(zeros: Array, *, bits: int, version: str) -> int:
    """The flat index of the first zero point that readers would not read back, or -1.

    zeros: int16 [groups, rows]; version: one of `ZERO_OFFSETS`. "gptq" has no zero point 0:
    what tools store for it is read as another one. A zero point of 2**bits, to which an
    asymmetric group can come, is cut off by some readers of "gptq", and "gptq_v2" has none.
    """
    lost = np.flatnonzero((zeros < -ZERO_OFFSETS[version]) | (zeros >= 1 << bits))
    return int(lost[0]) if len(lost) else -1


def pack_zeros(zeros: Array, *, bits: int, version: str) -> Array:
    """The zero points of each group, packed along the rows: int32 [groups, rows*bits/32].

    zeros, version: as in `first_unstorable_zero`; rows % 32 == 0.
    Raises: ValueError as `pack_columns` does, or if a zero point cannot be stored.
    """
    if (at := first_unstorable_zero(zeros, bits=bits, version=version)) >= 0:
        raise ValueError(f"{version} cannot store the zero point {zeros.reshape(-1)[at]}")
    stored = (zeros + ZERO_OFFSETS[version]).astype(np.uint8)
    return np.ascontiguousarray(pack_columns(stored, bits=bits).T)


def unpack_zeros(qzeros: Array, *, bits: int, version: str) -> Array:
    """The inverse of `pack_zeros`: int16 [groups, rows]."""
    stored = unpack_columns(np.ascontiguousarray(qzeros.T), bits=bits)
    return stored.astype(np.int16) - np.int16(ZERO_OFFSETS[version])


def gptq_decode(parts: GptqParts, *, bits: int, group_size: int) -> Array:
    """The float32 values [rows, in] that a reader on a CPU sees: products rounded to float16.

    parts: as the encoders give them; group_size: -1 for one group a row. The last group of a
    row may be short.
    Raises: ValueError for other widths than 2, 3, 4 and 8, or if the parts' shapes disagree.
    Source: auto-round 0.16.1, the weights that `QuantLinear.forward` multiplies with.
    """
    qweight, zeros, scales = parts
    codes = unpack_columns(qweight, bits=bits)
    rows, columns = codes.shape
    size = columns if group_size == -1 else group_size
    if size < 1 or zeros.shape != scales.shape or scales.shape != (-(-columns // size), rows):
        shapes = f"{qweight.shape}, {zeros.shape} and {scales.shape}"
        raise ValueError(f"shapes {shapes} are not one matrix at {bits} bits, {group_size}")
    values = np.empty((rows, columns), np.float32)
    stored = flat(zeros, np.int16, "zeros"), raw_bits(scales, "F16")
    _decoder()(codes.reshape(-1), (columns, size), *stored, values.reshape(-1))
    return values


def group_order(g_idx: Array) -> Array:
    """The columns of a matrix group by group, those of a group in their own order.

    g_idx: int32 [in], the number of each column's group.
    """
    return np.argsort(g_idx, kind="stable")


def is_grouping(g_idx: Array, group_size: int) -> bool:
    """Whether columns are numbered by groups of this size, the last of which may be short."""
    return np.array_equal(g_idx[group_order(g_idx)], np.arange(len(g_idx)) // group_size)


def new_parts(shape: tuple[int, int], bits: int, group_size: int) -> GptqParts:
    """Uninitialized parts of a matrix [rows, in] in groups of -1 (whole rows) or group_size.

    Raises: ValueError for other widths than 2, 3, 4 and 8, or unless groups divide rows and
    fill whole words.
    """
    rows, columns = shape
    _check_words(columns, bits)
    size = columns if group_size == -1 else group_size
    if size <= 0 or size % 32 or columns % size:
        raise ValueError(f"groups of {group_size} do not divide rows of {columns} values")
    words, groups = np.empty((columns // 32 * bits, rows), np.int32), (columns // size, rows)
    return GptqParts(words, np.empty(groups, np.int16), np.empty(groups, np.float16))


def _check_words(columns: int, bits: int) -> None:
    """Raises: ValueError unless rows of codes fill whole words."""
    if bits not in WIDTHS:
        raise ValueError(f"GPTQ codes have 2, 3, 4 or 8 bits, not {bits}")
    if columns % 32:
        raise ValueError(f"{columns} codes do not fill whole words")
