"""The codec of the format: a block of rows of one matrix to its stored parts, and back.

Source: jang 2.5.50, `turboquant.linear`; mlx 0.32.4 (CPU) for affine groups.
"""

from emitters.jangtq_prestack.side_files import value_defects
from emitters.jangtq_prestack.spec import MXTQ
from emitters.numerics import Array
from emitters.numerics.affine import affine_beyond, affine_decode, affine_encode
from emitters.numerics.mxtq import mxtq_beyond, mxtq_decode, mxtq_encode
from policy_dsl.formats import Codec, Parts, Slack
from policy_dsl.treatments import Coded

_AFFINE_PARTS = ("weight", "scales", "biases")


def encode(values: Array, dtype: str, treatment: Coded) -> dict[str, Array]:
    """The stored parts of rows, values [rows, in] of value type `dtype`, by their names' ends.

    tq_packed: uint32 [rows, words]; tq_norms: float16 [rows, 1]; no row has a `tq_bits`. Affine:
    weight uint32 [rows, in*bits/32]; scales, biases [rows, in/group_size] as the values are.
    Raises: ValueError for a scheme or width that the format lacks, or a split group.
    """
    if treatment.scheme == MXTQ:
        packed, norms = mxtq_encode(values, dtype, bits=treatment.bits)
        return {"tq_packed": packed, "tq_norms": norms.reshape(-1, 1)}
    bits, group_size = _affine_width(treatment)
    triple = affine_encode(values, dtype, bits=bits, group_size=group_size)
    return dict(zip(_AFFINE_PARTS, triple, strict=True))


def decode(parts: Parts, dtype: str, treatment: Coded, columns: int) -> Array:
    """The float32 weights [rows, columns] that readers compute with, from parts of `encode`.

    Raises: ValueError as `encode` does, or if the parts' shapes disagree.
    """
    if treatment.scheme == MXTQ:
        norms = parts["tq_norms"].reshape(-1)
        return mxtq_decode(parts["tq_packed"], norms, columns=columns, bits=treatment.bits)
    bits, group_size = _affine_width(treatment)
    weight, scales, biases = (parts[part] for part in _AFFINE_PARTS)
    if scales.shape[-1] * group_size != columns:
        raise ValueError(f"scales {scales.shape} are not those of {columns} columns")
    return affine_decode((weight, scales, biases), dtype, bits=bits, group_size=group_size)


def beyond(values: Array, parts: Parts, dtype: str, treatment: Coded, slack: Slack) -> Array:
    """The values [rows, in] that rounding to nearest would not have given these codes."""
    if treatment.scheme == MXTQ:
        stored = parts["tq_packed"], parts["tq_norms"].reshape(-1)
        return mxtq_beyond(values, stored, bits=treatment.bits, slack=slack)
    weight, scales, biases = (parts[part] for part in _AFFINE_PARTS)
    return affine_beyond(values, (weight, scales, biases), dtype, _affine_width(treatment), slack)


def _affine_width(treatment: Coded) -> tuple[int, int]:
    """Bits and group size. Raises: ValueError for another scheme."""
    if treatment.scheme != "affine":
        raise ValueError(f"this format has no scheme {treatment}")
    return treatment.bits, treatment.group_size


CODEC = Codec(encode, decode, beyond, value_defects)
