"""What HFQ files can hold, under which names, with AWQ's scales, and what loaders cannot run.

Source: Kaden-Schutt/hipfire, crates/hipfire-quantize at 02786be, crates/hipfire-arch-minimax
at 05674fe, read.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from math import gcd, prod
from operator import attrgetter, itemgetter

from emitters.checkpoints import omission, uneven, unfit
from emitters.hipfire_hfq import container
from emitters.hipfire_hfq.container import READER, SCALE
from policy_dsl.formats import Container, ExpertsApart, FormatSpec, PartShape, Review, SchemeSpec
from policy_dsl.inventory import tensor_nbytes
from policy_dsl.plan import Draft, Module, PlannedTensor, Refusal, coded_modules
from policy_dsl.policy import Policy
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.model import apart_path, expert_path
from policy_dsl.sources.hfq_container import QUANT_CODES, stored_nbytes
from policy_dsl.treatments import Coded, Plain, Stored, scheme_of

# Scheme, group size, quant code, and what it is.
_TABLE = (
    ("mq4", 256, 13, "rotated, affine"),
    ("mq3-lloyd", 256, 20, "rotated, 8 levels a block"),
    ("mq2-lloyd", 256, 19, "rotated, 4 levels a block"),
    ("mq6", 256, 15, "rotated, affine"),
    ("mq3", 256, 17, "rotated, affine"),
    ("mq2", 256, 18, "rotated, affine"),
    ("hfq4", 256, 6, "affine"),
    ("hfq4", 128, 7, "affine"),
    ("hfq6", 256, 8, "affine"),
    ("q8", 32, 3, "bytes with a scale each 32"),
)
CODES = {(name, group): code for name, group, code, _ in _TABLE}
AWQ, SCALE_ROLE = "awq", "awq_scale"
GATE_UP = ("experts.gate_proj", "experts.up_proj")
DOWN = "experts.down_proj"
_DEFAULT_ALPHA = 0.55
_LANGUAGE_ONLY = "hipfire's loaders of these families read the language model only"
_LEFT_OUT = {
    "lm_head": "loaders use",
    "vision": _LANGUAGE_ONLY,
    "audio": _LANGUAGE_ONLY,
    "mtp": "hipfire's loaders skip multi-token prediction",
}
# Kernels of these are written for so many experts a token, and no other number.
_FIXED, _TOP_K = ("mq4", "mq6"), 8
_SCALED = re.compile(r"(.*\.block_sparse_moe)\.experts\.\d+\.(?:w1|w3)$")
# Schemes of gate and up, and of down -> the ending of the file's name, a published tier.
_TIERS = {
    ("mq4", "mq4"): "mq4",
    ("mq3-lloyd", "mq4"): "mq3-lloyd",
    ("mq3-lloyd", "mq3-lloyd"): "mq3",
    ("mq2-lloyd", "mq4"): "mq2-lloyd",
    ("mq2-lloyd", "mq3-lloyd"): "mq2",
}


def _part_shapes(treatment: Stored, shape: tuple[int, ...], dtype: str) -> tuple[PartShape, ...]:
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


def _plain_dtype(_tensor: ModelTensor, _model: Model) -> str:
    return "F16"


def _file_name(policy: Policy, modules: Sequence[Module]) -> str:
    """The file's name: `model`, with the tier that these modules are, else `.hfq`."""
    inner = {scheme_of(module.treatment) for module in modules if module.role in GATE_UP}
    outer = {scheme_of(module.treatment) for module in modules if module.role == DOWN}
    tiers = {_TIERS.get((one, other), "hfq") for one in inner for other in outer}
    return f"model.{tiers.pop() if len(tiers) == 1 else 'hfq'}"


def column_scale(module: str) -> str | None:
    """The module with the scale of an expert's columns, which gate and up of a layer share."""
    match = _SCALED.fullmatch(module)
    return f"{match[1]}.{SCALE}" if match else None


def added_scales(modules: Sequence[Module]) -> tuple[Module, ...]:
    """The scale of every layer whose gate and up are coded with AWQ; its bytes come later."""
    scales: dict[str, Module] = {}
    for module, coded in coded_modules(modules):
        name = column_scale(module.name)
        if name is None or coded.method != AWQ or name in scales:
            continue
        shape = module.shape[-1:]
        nbytes = tensor_nbytes("F16", shape)
        tensor = PlannedTensor(f"{name}.weight", "weight", "F16", shape, nbytes, "", 0)
        scales[name] = Module(
            *(name, SCALE_ROLE, module.layer, Plain("F16"), shape, "F16", (), (tensor,), 0),
            decided_by=module.decided_by,
            written="keep",
        )
    return tuple(scales.values())


def awq_choices(policy: Policy) -> tuple[float, bool]:
    """The exponent of the scales, and whether weights are scaled by what is stored.

    Upstream scales them by what it rounds to that.
    """
    alpha, scales = policy.calibration.awq_alpha, policy.calibration.awq_scales
    return _DEFAULT_ALPHA if alpha is None else alpha, (scales or "exact") == "exact"


def remarks(policy: Policy, modules: Sequence[Module]) -> tuple[tuple[str, str], ...]:
    """What a plan says about AWQ, if it is used."""
    if not any(coded.method == AWQ for _, coded in coded_modules(modules)):
        return ()
    alpha, exact = awq_choices(policy)
    stored, rounded = "by the float16 values that are stored", "before they are rounded to what is"
    how = f"{stored} (exact)" if exact else f"{rounded} stored (upstream)"
    return ((AWQ, f"alpha {alpha:g}, gate and up share a scale, applied {how}"),)


def _held(tensor: ModelTensor, model: Model, stored: Stored) -> str | None:
    facts = model.architecture.facts(SPEC.name)
    is_awq = isinstance(stored, Coded) and stored.method == AWQ
    if is_awq and tensor.role not in facts.get(AWQ, ()):
        return "it knows AWQ for gate and up of MiniMax-M2's experts only"
    if (reason := unfit(tensor, model, stored, SPEC.name)) is not None:
        return reason
    if tensor.is_matrix and stored == Plain("F32"):
        return "its loaders refuse float32 matrices"
    return None


def _bundle(draft: Draft) -> Iterator[Refusal]:
    gate_up = (module for module in draft.modules if module.role in GATE_UP)
    reason = "gate and up of a layer must be stored alike"
    if fault := uneven(reason, gate_up, attrgetter("treatment")):
        yield Refusal("", "", fault, "error")
    experts = (module for module in draft.modules if module.role in (*GATE_UP, DOWN))
    schemes = {scheme_of(module.treatment) for module in experts}
    routed = draft.model.facts.value("num_experts_per_tok")
    fixed = [scheme for scheme in _FIXED if scheme in schemes]
    if fixed and routed != _TOP_K:
        reason = f"its {fixed[0]} kernels route to {_TOP_K} experts, this model to {routed}"
        yield Refusal("", READER, reason)
    crossing = next((module for module in draft.modules if module.together > 1), None)
    if crossing is not None:
        reason = f"rows of {crossing.name} are not whole blocks of 256 values"
        yield Refusal("", READER, reason)
    yield from refused(draft, READER, READER)


REVIEW = Review(left_out=partial(omission, reasons=_LEFT_OUT), held=_held, bundle=_bundle)


def _scheme(name: str, rows: list[tuple[str, int, int, str]]) -> SchemeSpec:
    bits, sizes = (QUANT_CODES[rows[0][2]].bits,), tuple(group for _, group, _, _ in rows)
    flat, methods = name.startswith("hfq"), ("rtn", AWQ) if name.startswith("mq") else ("rtn",)
    return SchemeSpec(name, bits, sizes, methods, (name == "q8",), "F32", flat, rows[0][3])


SPEC = FormatSpec(
    name="hipfire_hfq",
    about="HFQ containers for hipfire on AMD GPUs",
    schemes=tuple(_scheme(name, list(rows)) for name, rows in groupby(_TABLE, itemgetter(0))),
    fill=tuple(
        ("any", bits, scheme)
        for bits, scheme in ((8, "q8"), (6, "mq6"), (4, "mq4"), (3, "mq3-lloyd"), (2, "mq2-lloyd"))
    ),
    plain_dtypes=("F16", "F32"),
    fp8_rules=("f32", "bf16", "bf16_bf16"),
    module_path=apart_path,
    part_shapes=_part_shapes,
    plain_dtype=_plain_dtype,
    tensor_files=Container(_file_name, container.EMBEDDED, container.preface, container.file_order),
    layouts={"apart": ExpertsApart(expert_path, (*dict.fromkeys(name for name, _ in CODES), None))},
    cuts_off=True,
    copied_files=(),
    settings=(
        *("output.file_name", "calibration.imatrix"),
        *("calibration.awq_alpha", "calibration.awq_scales"),
    ),
    runtimes={READER: "Rust and HIP, AMD GPUs"},
)
