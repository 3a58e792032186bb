"""What MLX bundles can hold. Source: mlx 0.32.4 (quantizer), mlx-lm 0.32.2 (loader)."""

from __future__ import annotations

from collections.abc import Iterator

from emitters.mlx_affine.names import FAMILIES, module_path, omission, plain_dtype, unsupported
from policy_dsl.formats import FormatSpec, PartShape, Review, SchemeSpec, Shards
from policy_dsl.plan import Draft, Refusal
from policy_dsl.reader_config import refused
from policy_dsl.sources.checkpoint import shard_name
from policy_dsl.sources.side_files import SIDE_FILES
from policy_dsl.treatments import Plain, Stored

_WIDTHS = (2, 3, 4, 5, 6, 8)
# What mlx-lm refuses is refused for mlx-swift-lm, whose classes follow it and were not run.
READER = "mlx_lm"
RUNTIMES = {"mlx-lm": "Python, any Mac or CPU", "mlx-swift-lm": "Swift on Apple devices"}


def part_shapes(treatment: Stored, shape: tuple[int, ...], dtype: str) -> tuple[PartShape, ...]:
    """The tensors of a module: `weight`, and `scales` and `biases` of quantized ones.

    Codes are a bit stream in uint32 words along the last axis; affine scales and biases have
    the dtype of the values, the floating-point modes have uint8 scales and no biases.
    """
    if isinstance(treatment, Plain):
        return (PartShape("weight", dtype, shape),)
    bits, group_size = treatment.bits, treatment.group_size
    *lead, columns = shape
    packed = PartShape("weight", "U32", (*lead, columns * bits // 32))
    groups = (*lead, columns // group_size)
    if treatment.scheme == "affine":
        return packed, PartShape("scales", dtype, groups), PartShape("biases", dtype, groups)
    return packed, PartShape("scales", "U8", groups)


def _bundle(draft: Draft) -> Iterator[Refusal]:
    """What readers cannot compute of what the source's config means."""
    for name in RUNTIMES:
        yield from refused(draft, READER, name)


REVIEW = Review(left_out=omission, held=unsupported, bundle=_bundle)


SPEC = FormatSpec(
    name="mlx_affine",
    about="MLX bundles for stock mlx-lm and mlx-swift-lm on Apple silicon",
    schemes=(
        SchemeSpec("affine", _WIDTHS, (64, 32, 128), about="scale and bias a group"),
        SchemeSpec(
            "mxfp4", (4,), (32,), symmetries=(True,), about="E2M1 codes, power-of-two scale"
        ),
        SchemeSpec(
            "mxfp8", (8,), (32,), symmetries=(True,), about="E4M3 codes, power-of-two scale"
        ),
        SchemeSpec("nvfp4", (4,), (16,), symmetries=(True,), about="E2M1 codes, E4M3 scale"),
    ),
    fill=tuple(("any", bits, "affine") for bits in _WIDTHS),
    plain_dtypes=("BF16", "F16", "F32"),
    fp8_rules=("bf16", "f32", "bf16_bf16"),
    families=FAMILIES,
    module_path=module_path,
    part_shapes=part_shapes,
    plain_dtype=plain_dtype,
    tensor_files=Shards(5 * 2**30, shard_name, metadata={"format": "mlx"}),
    copied_files=SIDE_FILES,
    metadata_files=("config.json",),
    settings=("output.shard_size",),
    config_readers=(READER,),
    runtimes=RUNTIMES,
)
