"""What GPTQ checkpoints can hold, under which names, and how a matrix is described.

Names are as published, with one module for each expert.
Source: auto-round 0.16.1, GPTQModel 7.7.0, vLLM 0.33.0: packers, readers, weight loaders.
"""

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import NamedTuple

from emitters.checkpoints import CONFIG
from policy_dsl.formats import ExpertsApart, FormatSpec, PartShape, SchemeSpec, Shards
from policy_dsl.plan import Draft, Module
from policy_dsl.roles.model import Model, ModelTensor, apart_path, expert_path
from policy_dsl.sources.checkpoint import shard_name
from policy_dsl.sources.side_files import SIDE_FILES
from policy_dsl.treatments import WHOLE_ROW, Coded, Plain, Stored

AUTO_ROUND, GPTQ = "auto-round", "gptq"
# Dialect -> the file with a copy of its configuration.
SIDECARS = {GPTQ: "quantize_config.json", AUTO_ROUND: "quantization_config.json"}
WIDTHS, _GROUP_SIZES = (4, 8, 3, 2), (128, 64, 32, WHOLE_ROW)
RTN = "rtn"
# Method -> the version of AutoRound whose scales it tries.
SEARCHES: Mapping[str, str] = {"opt-rtn": "0.16.1", "opt-rtn-0.12.2": "0.12.2"}
_BAND = 32  # rows whose codes and zero points fill whole words
# Whose tables say what config.json must have -> the readers that read it so.
READERS: Mapping[str, tuple[str, ...]] = {
    "transformers": ("transformers", "auto-round", "gptqmodel", "vllm"),
    "vllm": ("vllm",),
}


class Storage(NamedTuple):
    """version: of zero points, "gptq" (one less is stored) or "gptq_v2"; g_idx: if there.

    act_order: whether groups are of any columns, as g_idx says, and not of neighbours.
    """

    version: str
    g_idx: bool
    act_order: bool = False
    about: str = ""


STORAGE = {
    "int": Storage("gptq", False, about="integers with zero points, version 1"),
    "int-gidx": Storage("gptq", True, about="the same and a group number for each column"),
    "int-v2": Storage("gptq_v2", False, about="zero points of version 2, which has a zero point 0"),
    "int-v2-gidx": Storage("gptq_v2", True, about="version 2 and a group number for each column"),
}
# What others write, and is read only.
READ: Mapping[str, Storage] = {
    **STORAGE,
    "int-act-order": Storage("gptq", g_idx=True, act_order=True),
    "int-v2-act-order": Storage("gptq_v2", g_idx=True, act_order=True),
}


class Width(NamedTuple):
    """How a quantized matrix is stored, in the words of both dialects' rules."""

    bits: int
    group_size: int
    sym: bool


def width_of(module: Module) -> Width | None:
    """The width of a module; None if it is not quantized."""
    coded = module.treatment
    if isinstance(coded, Plain):
        return None
    return Width(coded.bits, coded.group_size, coded.symmetric)


def dialect_of(draft: Draft) -> str:
    """Whose configuration a bundle gets: the policy's word, else AutoRound's."""
    return str(dict(draft.policy.metadata).get("dialect", AUTO_ROUND))


def _part_shapes(treatment: Stored, shape: tuple[int, ...], dtype: str) -> tuple[PartShape, ...]:
    """The tensors of a module [out, in], whose rows are columns of the tensors.

    Codes are packed along `in`, zero points along `out`, both into int32 words.
    Raises: ValueError for what is not a matrix, or has a scheme or bits that the format lacks.
    """
    if isinstance(treatment, Plain):
        return (PartShape("weight", dtype, shape),)
    if len(shape) != 2:
        raise ValueError(f"{list(shape)} is not a matrix")
    storage, bits = READ.get(treatment.scheme), treatment.bits
    if storage is None or bits not in WIDTHS:
        raise ValueError(f"the format has no {bits} bits of {treatment.scheme}")
    out, columns = shape
    size = group_length(treatment, columns)
    groups = columns // size
    by_columns = partial(PartShape, together=_BAND, order="columns")
    parts = (
        by_columns("qweight", "I32", (columns * bits // 32, out)),
        by_columns("qzeros", "I32", (groups, out * bits // 32)),
        by_columns("scales", "F16", (groups, out)),
    )
    if storage.act_order:
        return (*parts, PartShape("g_idx", "I32", (columns,), order="whole"))
    numbers = PartShape("g_idx", "I32", (columns,), constant=_g_idx(columns, size))
    return (*parts, numbers) if storage.g_idx else parts


def group_length(treatment: Coded, columns: int) -> int:
    """How many values of a row of `columns` share a scale."""
    return columns if treatment.group_size == WHOLE_ROW else treatment.group_size


# One object for all modules of a shape: a large model has tens of thousands.
@lru_cache(maxsize=64)
def _g_idx(columns: int, size: int) -> bytes:
    """The number of each column's group, as little-endian int32."""
    numbers = range(-(-columns // size))
    return b"".join(group.to_bytes(4, "little") * size for group in numbers)[: 4 * columns]


def _plain_dtype(tensor: ModelTensor, model: Model) -> str:
    """The source's own dtype; FP8, whose codes may be called integers, becomes bfloat16."""
    return tensor.source.dtype if tensor.scale is None else "BF16"


SPEC = FormatSpec(
    name="gptq",
    about="GPTQ-packed checkpoints for vLLM, AutoRound, GPTQModel and transformers",
    schemes=tuple(
        SchemeSpec(name, WIDTHS, _GROUP_SIZES, (RTN, *SEARCHES), (True, False), about=of.about)
        for name, of in STORAGE.items()
    ),
    fill=tuple(("any", bits, "int") for bits in WIDTHS),
    plain_dtypes=("BF16", "F16", "F32"),
    plain_dtype=_plain_dtype,
    fp8_rules=("bf16", "bf16_bf16", "f32"),
    config_readers=tuple(READERS),
    runtimes={
        "vllm": "server on NVIDIA GPUs",
        "auto-round": "AutoRound's layers in transformers, any device",
        "gptqmodel": "Python, any device",
        "transformers": "with auto-round, or with optimum and gptqmodel, by dialect",
    },
    module_path=apart_path,
    part_shapes=_part_shapes,
    layouts={"apart": ExpertsApart(expert_path, (*STORAGE, None))},
    tensor_files=Shards(4 * 10**9, shard_name, metadata={"format": "pt"}),
    copied_files=SIDE_FILES,
    # AutoGPTQ and auto-round write files of their own.
    metadata_files=(CONFIG, *SIDECARS.values()),
    settings=("output.shard_size", "calibration.imatrix"),
    metadata_keys={"dialect": (AUTO_ROUND, GPTQ)},
)
