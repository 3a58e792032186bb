"""The codec of the format: a block of rows of one matrix to its stored parts, and back.

Source: mlx 0.32.4 (CPU), `mx.quantize` and `mx.dequantize`.
"""

from emitters.mlx_affine.spec import AFFINE, AFFINE_PARTS
from emitters.numerics import Array
from emitters.numerics.affine import affine_beyond, affine_decode, affine_encode
from emitters.numerics.small_floats import FP_MODES, fp_beyond, fp_decode, fp_encode
from policy_dsl.formats import Codec, Parts, Slack
from policy_dsl.treatments import Coded


def encode(values: Array, dtype: str, treatment: Coded) -> dict[str, Array]:
    """The stored parts of rows, values [rows, in] of value type `dtype`, by their names' ends.

    weight: uint32 [rows, in*bits/32]; affine scales and biases: [rows, in/group_size] as the
    values are; other scales: uint8 [rows, in/group_size].
    Raises: ValueError for a scheme or width that mlx does not have, or a split group.
    """
    if _is_affine(treatment):
        triple = affine_encode(values, dtype, bits=treatment.bits, group_size=treatment.group_size)
        return dict(zip(AFFINE_PARTS, triple, strict=True))
    weight, scales = fp_encode(values, dtype, mode=treatment.scheme)
    return {"weight": weight, "scales": scales}


def decode(parts: Parts, dtype: str, treatment: Coded, columns: int) -> Array:
    """The float32 weights [rows, columns] that mlx computes with, from the parts of `encode`.

    Raises: ValueError as `encode` does, or if the parts' shapes disagree.
    """
    is_affine, size, scales = _is_affine(treatment), treatment.group_size, parts["scales"]
    if scales.shape[-1] * size != columns:
        raise ValueError(f"scales {scales.shape} are not those of {columns} columns")
    if is_affine:
        triple = parts["weight"], scales, parts["biases"]
        return affine_decode(triple, dtype, bits=treatment.bits, group_size=size)
    return fp_decode(parts["weight"], scales, mode=treatment.scheme)


def beyond(values: Array, parts: Parts, dtype: str, treatment: Coded, slack: Slack) -> Array:
    """The values [rows, in] that rounding to nearest would not have given these codes."""
    weight, scales = parts["weight"], parts["scales"]
    if _is_affine(treatment):
        width = treatment.bits, treatment.group_size
        return affine_beyond(values, (weight, scales, parts["biases"]), dtype, width, slack)
    return fp_beyond(values, (weight, scales), treatment.scheme, dtype, slack)


def _is_affine(treatment: Coded) -> bool:
    """Whether the scheme is affine. Raises: ValueError unless mlx has such a scheme."""
    scheme, width = treatment.scheme, (treatment.bits, treatment.group_size)
    known = {AFFINE: width, **FP_MODES}
    if scheme not in known:
        raise ValueError(f"scheme {scheme!r} is not one of {', '.join(known)}")
    if known[scheme] != width:
        own = "{} bits in groups of {}, not {} in {}".format(*known[scheme], *width)
        raise ValueError(f"{scheme} has {own}")
    return scheme == AFFINE


CODEC = Codec(encode, decode, beyond)
