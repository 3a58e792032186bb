"""What JANGTQ bundles can hold. Source: jang 2.5.50, its converter, rebundler and loader."""

from __future__ import annotations

from emitters.jangtq_prestack.capabilities import METADATA_KEYS
from emitters.jangtq_prestack.names import FAMILIES, MXTQ, expert_path, module_path, plain_dtype
from emitters.jangtq_prestack.order import SHARD_NBYTES, file_order
from emitters.jangtq_prestack.readers import READER, RUNTIMES
from policy_dsl.formats import (
    ExpertPadding,
    ExpertsApart,
    FormatSpec,
    PartShape,
    SchemeSpec,
    Shards,
)
from policy_dsl.sources.side_files import SIDE_FILES
from policy_dsl.treatments import Plain, Stored

AFFINE_WIDTHS = (8, 6, 5, 4, 3, 2)


def part_shapes(treatment: Stored, shape: tuple[int, ...], dtype: str) -> tuple[PartShape, ...]:
    """The tensors of a module: `tq_packed`, `tq_norms`, `tq_bits`, or those of MLX affine.

    Codes of a row are packed into whole uint32 words, `32 // bits` a word; there is a norm for
    each row and one width for the whole module. Plain modules have a `weight`.
    """
    if isinstance(treatment, Plain):
        return (PartShape("weight", dtype, shape),)
    bits = treatment.bits
    *lead, columns = shape
    if treatment.scheme == MXTQ:
        words = -(-columns // (32 // bits))
        return (
            PartShape("tq_packed", "U32", (*lead, words)),
            PartShape("tq_norms", "F16", tuple(lead)),
            PartShape("tq_bits", "U8", (1,), constant=bytes([bits])),
        )
    groups = (*lead, columns // treatment.group_size)
    return (
        PartShape("weight", "U32", (*lead, columns * bits // 32)),
        PartShape("scales", dtype, groups),
        PartShape("biases", dtype, groups),
    )


def shard_name(number: int, count: int) -> str:
    """The file name of a shard, counted from 1; jang's loader looks for the dash."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


SPEC = FormatSpec(
    name="jangtq_prestack",
    about="JANGTQ bundles for JANG's MLX runtimes on Apple silicon",
    schemes=(
        SchemeSpec(
            MXTQ,
            (2, 3, 4, 1),
            (),
            symmetries=(True,),
            values="F32",
            about="rotated rows, Lloyd-Max codebook",
        ),
        SchemeSpec("affine", AFFINE_WIDTHS, (64, 32, 128), about="scale and bias a group"),
    ),
    fill=(
        *(("experts", bits, MXTQ) for bits in (1, 2, 3, 4)),
        *(("any", bits, "affine") for bits in AFFINE_WIDTHS),
    ),
    plain_dtypes=("F16", "BF16", "F32"),
    fp8_rules=("f32", "bf16", "bf16_bf16"),
    families=FAMILIES,
    module_path=module_path,
    part_shapes=part_shapes,
    plain_dtype=plain_dtype,
    tensor_files=Shards(SHARD_NBYTES, shard_name, overfull=True),
    file_order=file_order,
    # Readers stack codes themselves; of other tensors they would take the first layer's only.
    layouts={"prestacked": None, "per_expert": ExpertsApart(expert_path, (MXTQ,))},
    padding={"minimax_m2": ExpertPadding(multiple=32, router_bias=-10000.0)},
    metadata_keys=METADATA_KEYS,
    edited_files=("chat_template.jinja", "tokenizer_config.json"),
    copied_files=(*SIDE_FILES, "configuration.json"),
    metadata_files=("config.json", "jang_config.json"),
    settings=("output.shard_size", "output.layout", "output.pad_experts"),
    config_readers=(READER,),
    runtimes=RUNTIMES,
)
