"""What HFQ files can hold. Source: Kaden-Schutt/hipfire, quantizer and MiniMax loader."""

from __future__ import annotations

from math import gcd, prod

from emitters.hipfire_hfq.constraints import RUNTIMES
from emitters.hipfire_hfq.names import FAMILIES, file_order, module_path
from emitters.hipfire_hfq.tiers import container
from policy_dsl.formats import Container, ExpertsApart, FormatSpec, PartShape, SchemeSpec
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.published_names import expert_path
from policy_dsl.sources.hfq_codes import QUANT_CODES, stored_nbytes
from policy_dsl.treatments import Plain, Stored

# (scheme, group size) -> quant code.
CODES = {
    ("q8", 32): 3,
    ("hfq4", 256): 6,
    ("hfq4", 128): 7,
    ("hfq6", 256): 8,
    ("mq4", 256): 13,
    ("mq6", 256): 15,
    ("mq3", 256): 17,
    ("mq2", 256): 18,
    ("mq2-lloyd", 256): 19,
    ("mq3-lloyd", 256): 20,
}
_METHODS = ("rtn", "awq")


def part_shapes(treatment: Stored, shape: tuple[int, ...], dtype: str) -> tuple[PartShape, ...]:
    """The one tensor of a module: its logical shape, as blocks of a quant code or plain.

    Raises: ValueError if a single number should be coded.
    """
    if isinstance(treatment, Plain):
        return (PartShape("weight", dtype, shape),)
    if not shape:
        raise ValueError("a single number has no groups")
    group = treatment.group_size
    code = CODES[treatment.scheme, group]
    # Where groups do not divide rows, several rows are coded as one; all, if a group is short.
    together, rows = group // gcd(shape[-1], group), prod(shape[:-1])
    together = rows if rows % together else together
    name, nbytes = QUANT_CODES[code].name, stored_nbytes(code, shape)
    return (PartShape("weight", name, shape, nbytes=nbytes, together=together),)


def plain_dtype(tensor: ModelTensor, model: Model) -> str:
    """F16 for every tensor that is not coded."""
    return "F16"


SPEC = FormatSpec(
    name="hipfire_hfq",
    about="HFQ containers for hipfire on AMD GPUs",
    schemes=(
        SchemeSpec("mq4", (4,), (256,), _METHODS, values="F32", about="rotated, affine"),
        SchemeSpec(
            "mq3-lloyd", (3,), (256,), _METHODS, values="F32", about="rotated, 8 levels a block"
        ),
        SchemeSpec(
            "mq2-lloyd", (2,), (256,), _METHODS, values="F32", about="rotated, 4 levels a block"
        ),
        SchemeSpec("mq6", (6,), (256,), _METHODS, values="F32", about="rotated, affine"),
        SchemeSpec("mq3", (3,), (256,), _METHODS, values="F32", about="rotated, affine"),
        SchemeSpec("mq2", (2,), (256,), _METHODS, values="F32", about="rotated, affine"),
        SchemeSpec("hfq4", (4,), (256, 128), values="F32", flat=True, about="affine"),
        SchemeSpec("hfq6", (6,), (256,), values="F32", flat=True, about="affine"),
        SchemeSpec(
            "q8", (8,), (32,), symmetries=(True,), values="F32", about="bytes with a scale each 32"
        ),
    ),
    fill=(
        ("any", 8, "q8"),
        ("any", 6, "mq6"),
        ("any", 4, "mq4"),
        ("any", 3, "mq3-lloyd"),
        ("any", 2, "mq2-lloyd"),
    ),
    plain_dtypes=("F16", "F32"),
    fp8_rules=("f32", "bf16", "bf16_bf16"),
    families=FAMILIES,
    module_path=module_path,
    part_shapes=part_shapes,
    plain_dtype=plain_dtype,
    tensor_files=Container(
        container,
        (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "chat_template.json",
            "generation_config.json",
        ),
    ),
    file_order=file_order,
    layouts={"apart": ExpertsApart(expert_path, (*dict.fromkeys(name for name, _ in CODES), None))},
    cuts_off=True,
    copied_files=(),
    settings=(
        *("output.file_name", "calibration.imatrix", "calibration.awq_alpha"),
        "calibration.awq_scales",
    ),
    runtimes=RUNTIMES,
)
