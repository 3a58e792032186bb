"""The codec of the format: a block of rows of one matrix to its stored parts, and back.

A quantized module stores `weight` (uint32, packed codes) and `scales`; the affine scheme also
stores `biases`. Leading axes (stacked experts) are layout only: they are rows here.
Source: mlx 0.32.4 (CPU), `mx.quantize` and `mx.dequantize`.
"""

from __future__ import annotations

from collections.abc import Mapping

from emitters.numerics.affine import affine_beyond, affine_decode, affine_encode
from emitters.numerics.small_floats import FP_MODES, fp_beyond, fp_decode, fp_encode
from emitters.numerics.value_types import Array
from policy_dsl.formats import Slack
from policy_dsl.treatments import Coded

AFFINE = "affine"


def encode(values: Array, dtype: str, treatment: Coded) -> dict[str, Array]:
    """The stored parts of these rows, by the last part of their tensor names.

    values: [rows, in] of value type `dtype`: BF16 (uint16 bit patterns), F16 or F32; not
    changed. treatment: scheme "affine", "mxfp4", "mxfp8" or "nvfp4", bits and group size.
    weight: uint32 [rows, in*bits/32]; affine scales and biases: [rows, in/group_size] of the
    source's value type; other scales: uint8 [rows, in/group_size].
    Raises: ValueError for a scheme, width or group size that mlx does not have, or if a group
    would be split.
    """
    scheme, bits, group_size = _geometry(treatment)
    if scheme == AFFINE:
        triple = affine_encode(values, dtype, bits=bits, group_size=group_size)
        return dict(zip(("weight", "scales", "biases"), triple, strict=True))
    return dict(zip(("weight", "scales"), fp_encode(values, dtype, mode=scheme), strict=True))


def decode(parts: Mapping[str, Array], dtype: str, treatment: Coded, columns: int) -> Array:
    """The float32 weights [rows, columns] that mlx computes with, from the parts of `encode`.

    dtype: value type of the scales and biases; of no effect but for affine.
    Raises: ValueError as `encode` does, or if the parts' shapes disagree.
    """
    scheme, bits, group_size = _geometry(treatment)
    if parts["scales"].shape[-1] * group_size != columns:
        raise ValueError(f"scales {parts['scales'].shape} are not those of {columns} columns")
    if scheme == AFFINE:
        triple = parts["weight"], parts["scales"], parts["biases"]
        return affine_decode(triple, dtype, bits=bits, group_size=group_size)
    return fp_decode(parts["weight"], parts["scales"], mode=scheme)


def beyond(
    values: Array, parts: Mapping[str, Array], dtype: str, treatment: Coded, slack: Slack
) -> Array:
    """The values [rows, in] that rounding to nearest would not have given these codes.

    values: float32; parts: as `encode` gives them; slack: what was rounded before.
    Raises: ValueError as `decode` does.
    """
    scheme, bits, group_size = _geometry(treatment)
    if scheme == AFFINE:
        triple = parts["weight"], parts["scales"], parts["biases"]
        return affine_beyond(values, triple, dtype, (bits, group_size), slack)
    return fp_beyond(values, (parts["weight"], parts["scales"]), scheme, dtype, slack)


def _geometry(treatment: Coded) -> tuple[str, int, int]:
    """Scheme, bits and group size. Raises: ValueError unless mlx has such a scheme."""
    scheme, bits, group_size = treatment.scheme, treatment.bits, treatment.group_size
    if scheme == AFFINE:
        return scheme, bits, group_size
    if scheme not in FP_MODES:
        raise ValueError(f"scheme {scheme!r} is none of {AFFINE}, {', '.join(FP_MODES)}")
    mode = FP_MODES[scheme]
    if (bits, group_size) != (mode.bits, mode.group_size):
        own = f"{mode.bits} bits in groups of {mode.group_size}"
        raise ValueError(f"{scheme} has {own}, not {bits} in {group_size}")
    return scheme, bits, group_size
