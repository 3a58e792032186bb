"""Q8 blocks: 32 signed bytes after a float16 scale; value = scale * code.

Codes come from the float32 scale, which is then cut off toward zero.
Source: Kaden-Schutt/hipfire at 91e58a5 (0.1.8-alpha.2), crates/hipfire-quantize, run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emitters.numerics.jit import device, factory, kernel, reads, writes
from emitters.numerics.scalars import bits_of, float_of, half_toward_zero, widen
from emitters.numerics.value_types import F16, Array, flat

_SIZE, _NBYTES = 32, 34
_TOP, _MOST = np.float32(127), np.float32(128)
_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)


@device
def _scale(values: Array) -> np.float32:
    """The float32 scale of finite float32 [n]; magnitudes are compared as integers."""
    largest = np.uint32(0)
    for i in range(values.shape[0]):
        largest = max(largest, np.uint32(bits_of(values[i]) & np.uint32(0x7FFFFFFF)))
    return float_of(largest) / _TOP


@device
def _write_codes(values: Array, scale: np.float32, codes: Array) -> None:
    """codes = int8, the values times 1 / scale, rounded to nearest, halves away from zero."""
    inverse = _ONE / scale if scale > _ZERO else _ZERO
    for i in range(values.shape[0]):
        quotient = values[i] * inverse
        # Clamped before rounding: the inverse of the smallest scales is infinite, and 0 times
        # that is NaN, which counts as 0.
        size = abs(quotient)
        size = size if size >= _ZERO else _ZERO
        size = size if size < _MOST else _MOST
        whole = np.int32(size)
        whole += np.int32(size - np.float32(whole) >= _HALF)
        whole = -whole if quotient < _ZERO else whole
        codes[i] = np.int8(whole if whole < 128 else 127)


@factory
def _encoder() -> Callable[..., None]:
    """The kernel that encodes whole groups."""

    @kernel(reads("float32"), writes("uint16"))
    def encode_q8(values: Array, stored: Array) -> None:
        codes = np.empty(_SIZE, np.int8)
        blocks = stored.reshape(values.shape[0] // _SIZE, -1)
        for k in range(blocks.shape[0]):
            group = values[k * _SIZE : (k + 1) * _SIZE]
            scale = _scale(group)
            _write_codes(group, scale, codes)
            blocks[k, 0] = half_toward_zero(bits_of(scale))
            blocks[k, 1:] = codes.view(np.uint16)

    return encode_q8


@factory
def _decoder() -> Callable[..., None]:
    """The kernel that decodes blocks to whole groups."""

    @kernel(reads("uint16"), writes("float32"))
    def decode_q8(stored: Array, values: Array) -> None:
        codes = np.empty(_SIZE, np.int8)
        blocks = stored.reshape(values.shape[0] // _SIZE, -1)
        for k in range(blocks.shape[0]):
            scale = widen(F16, blocks[k, 0])
            codes.view(np.uint16)[:] = blocks[k, 1:]
            group = values[k * _SIZE : (k + 1) * _SIZE]
            for i in range(_SIZE):
                group[i] = np.float32(codes[i]) * scale

    return decode_q8


def q8_encode(values: Array) -> Array:
    """The blocks of the values: uint8 [blocks, 34].

    values: float32 [n], finite; not changed. What is missing of the last group gets code 0. A
    scale that overflows is stored as infinity.
    Raises: ValueError if the values are not float32.
    """
    whole = flat(values, np.float32, "values")
    if missing := -whole.size % _SIZE:
        whole = np.append(whole, np.zeros(missing, np.float32))
    blocks = np.empty((whole.size // _SIZE, _NBYTES), np.uint8)
    _encoder()(whole, blocks.reshape(-1).view(np.uint16))
    return blocks


def q8_decode(blocks: Array, count: int) -> Array:
    """The float32 values [count] of blocks as `q8_encode` gives them.

    Raises: ValueError if the blocks are not those of so many values.
    """
    shape = -(-count // _SIZE), _NBYTES
    if blocks.shape != shape:
        raise ValueError(f"blocks {blocks.shape} of {count} values should be {shape}")
    values = np.empty(shape[0] * _SIZE, np.float32)
    _decoder()(flat(blocks, np.uint8, "blocks").view(np.uint16), values)
    return values[:count]
