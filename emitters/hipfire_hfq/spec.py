"""What HFQ files can hold, under which names, and the scales beside experts coded with AWQ.

Source: Kaden-Schutt/hipfire, crates/hipfire-quantize at 02786be, crates/hipfire-arch-minimax,
read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import gcd, prod

from emitters.hipfire_hfq.container import READER, SCALE, file_order, preface
from policy_dsl.formats import Container, ExpertsApart, FormatSpec, PartShape, SchemeSpec
from policy_dsl.inventory import tensor_nbytes
from policy_dsl.plan import Module, PlannedTensor, coded_modules
from policy_dsl.policy import Policy
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.published_names import expert_path, experts_path, published_name
from policy_dsl.sources.hfq_container import QUANT_CODES, stored_nbytes
from policy_dsl.treatments import Plain, Stored, scheme_of

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
AWQ = "awq"
GATE_UP = ("experts.gate_proj", "experts.up_proj")
DOWN = "experts.down_proj"
EXACT, _UPSTREAM = "exact", "upstream"
_DEFAULT_ALPHA = 0.55
_METHODS = ("rtn", AWQ)
_SCALED = re.compile(r"(.*\.block_sparse_moe)\.experts\.\d+\.(?:w1|w3)$")
# Schemes of gate and up, and of down -> the ending of the file's name, a published tier.
_TIERS = {
    ("mq4", "mq4"): "mq4",
    ("mq3-lloyd", "mq4"): "mq3-lloyd",
    ("mq3-lloyd", "mq3-lloyd"): "mq3",
    ("mq2-lloyd", "mq4"): "mq2-lloyd",
    ("mq2-lloyd", "mq3-lloyd"): "mq2",
}


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


def _module_path(tensor: ModelTensor, model: Model) -> str:
    """The module of a tensor: its published name; that of a layer's experts has a `*`."""
    if tensor.expert is not None:
        return experts_path(tensor, model)
    return published_name(tensor, model).removesuffix(".weight")


def _plain_dtype(tensor: ModelTensor, model: Model) -> str:
    """F16 for every tensor that is not coded."""
    return "F16"


def _file_name(policy: Policy, modules: Sequence[Module]) -> str:
    """The file's name: `model`, with the tier that these modules are, else `.hfq`."""
    inner, down = _schemes(modules, GATE_UP), _schemes(modules, (DOWN,))
    tiers = {_TIERS.get((one, other), "hfq") for one in inner for other in down}
    return f"model.{tiers.pop() if len(tiers) == 1 else 'hfq'}"


def _schemes(modules: Sequence[Module], roles: tuple[str, ...]) -> set[str]:
    return {scheme_of(module.treatment) for module in modules if module.role in roles}


def column_scale(module: str) -> str | None:
    """The module with the scale of an expert's columns, which gate and up of a layer share."""
    match = _SCALED.fullmatch(module)
    return f"{match[1]}.{SCALE}" if match else None


def added_scales(modules: Sequence[Module]) -> tuple[Module, ...]:
    """The scale of every layer whose gate and up are coded with AWQ; its bytes come later."""
    scales: dict[str, Module] = {}
    for module, coded in coded_modules(modules):
        name = column_scale(module.name)
        if name is not None and coded.method == AWQ and name not in scales:
            scales[name] = _scale(name, module)
    return tuple(scales.values())


def _scale(name: str, scaled: Module) -> Module:
    shape = scaled.shape[-1:]
    nbytes = tensor_nbytes("F16", shape)
    tensor = PlannedTensor(f"{name}.weight", "weight", "F16", shape, nbytes, "", 0)
    return Module(
        name=name,
        role="awq_scale",
        layer=scaled.layer,
        treatment=Plain("F16"),
        shape=shape,
        dtype="F16",
        sources=(),
        tensors=(tensor,),
        parameters=0,
        decided_by=scaled.decided_by,
        written="keep",
    )


def alpha_of(policy: Policy) -> float:
    """The exponent of the scales."""
    alpha = policy.calibration.awq_alpha
    return _DEFAULT_ALPHA if alpha is None else alpha


def scales_of(policy: Policy) -> str:
    """Whether weights are scaled by what is stored, or, as upstream does, by what it rounds."""
    return policy.calibration.awq_scales or EXACT


def remarks(policy: Policy, modules: Sequence[Module]) -> tuple[tuple[str, str], ...]:
    """What a plan says about AWQ, if it is used."""
    if not any(coded.method == AWQ for _, coded in coded_modules(modules)):
        return ()
    how = {
        EXACT: "by the float16 values that are stored (exact)",
        _UPSTREAM: "before they are rounded to what is stored (upstream)",
    }[scales_of(policy)]
    return ((AWQ, f"alpha {alpha_of(policy):g}, gate and up share a scale, applied {how}"),)


def _scheme(name: str, bits: int, about: str, *, sizes: tuple[int, ...] = (256,)) -> SchemeSpec:
    flat, methods = name.startswith("hfq"), _METHODS if name.startswith("mq") else ("rtn",)
    symmetries = (name == "q8",)
    return SchemeSpec(name, (bits,), sizes, methods, symmetries, "F32", flat, about)


SPEC = FormatSpec(
    name="hipfire_hfq",
    about="HFQ containers for hipfire on AMD GPUs",
    schemes=(
        _scheme("mq4", 4, "rotated, affine"),
        _scheme("mq3-lloyd", 3, "rotated, 8 levels a block"),
        _scheme("mq2-lloyd", 2, "rotated, 4 levels a block"),
        _scheme("mq6", 6, "rotated, affine"),
        _scheme("mq3", 3, "rotated, affine"),
        _scheme("mq2", 2, "rotated, affine"),
        _scheme("hfq4", 4, "affine", sizes=(256, 128)),
        _scheme("hfq6", 6, "affine"),
        _scheme("q8", 8, "bytes with a scale each 32", sizes=(32,)),
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
    module_path=_module_path,
    part_shapes=part_shapes,
    plain_dtype=_plain_dtype,
    tensor_files=Container(
        _file_name,
        (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "chat_template.json",
            "generation_config.json",
        ),
        preface,
        file_order,
    ),
    layouts={"apart": ExpertsApart(expert_path, (*dict.fromkeys(name for name, _ in CODES), None))},
    cuts_off=True,
    copied_files=(),
    settings=(
        *("output.file_name", "calibration.imatrix", "calibration.awq_alpha"),
        "calibration.awq_scales",
    ),
    runtimes={READER: "Rust and HIP, AMD GPUs"},
)
