"""What MLX bundles can hold, and what mlx-lm calls a tensor after its own renaming.

Source: mlx 0.32.4 (quantizer); mlx-lm 0.32.2 (loader, `sanitize` of each model module).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from emitters.checkpoints import CONFIG, omission, unfit
from policy_dsl.formats import FormatSpec, PartShape, Review, SchemeSpec, Shards
from policy_dsl.plan import Draft, Module, Refusal
from policy_dsl.reader_config import refused
from policy_dsl.roles.classify import Model, ModelTensor
from policy_dsl.roles.model import is_one_of, module_name, rearranged
from policy_dsl.sources.checkpoint import shard_name
from policy_dsl.sources.side_files import SIDE_FILES
from policy_dsl.treatments import Coded, Plain, Stored

AFFINE, AFFINE_PARTS = "affine", ("weight", "scales", "biases")
_WIDTHS = (2, 3, 4, 5, 6, 8)
# What mlx-lm refuses is refused for mlx-swift-lm, whose classes follow it and were not run.
READER = "mlx_lm"
RUNTIMES = {"mlx-lm": "Python, any Mac or CPU", "mlx-swift-lm": "Swift on Apple devices"}
_LEFT_OUT = {
    "lm_head": "mlx-lm uses",
    "vision": "mlx-lm builds the language model only",
    "audio": "mlx-lm builds the language model only",
    "mtp": "mlx-lm has no multi-token prediction",
}
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def _part_shapes(treatment: Stored, shape: tuple[int, ...], dtype: str) -> tuple[PartShape, ...]:
    """The tensors of a module: `weight`, and of quantized ones `scales` and perhaps `biases`.

    Codes are a bit stream in uint32 words along the last axis.
    """
    if isinstance(treatment, Plain):
        return (PartShape("weight", dtype, shape),)
    *lead, columns = shape
    packed = PartShape("weight", "U32", (*lead, columns * treatment.bits // 32))
    groups = (*lead, columns // treatment.group_size)
    if treatment.scheme == AFFINE:
        return packed, *(PartShape(part, dtype, groups) for part in AFFINE_PARTS[1:])
    return packed, PartShape("scales", "U8", groups)


def configured_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype to which `mlx_lm.convert` casts values by this config; None if by none."""
    text = config.get("text_config")
    inner = text.get("dtype") if isinstance(text, Mapping) else None
    return _DTYPES.get(str(config.get("torch_dtype") or inner))


def _plain_dtype(tensor: ModelTensor, model: Model) -> str:
    """The dtype of a tensor's values, as `mlx_lm.convert` chooses it: the config's if it has one.

    FP8 becomes bfloat16. What its classes never cast stays as it is.
    """
    wanted, source = configured_dtype(model.config), tensor.source.dtype
    is_kept = is_one_of(module_name(tensor, model), model.architecture.mlx.keep_dtype)
    if source in _DTYPES.values() and (is_kept or wanted is None):
        return source
    return wanted or "BF16"


def _held(tensor: ModelTensor, model: Model, stored: Stored) -> str | None:
    family, name = model.architecture.family, module_name(tensor, model)
    if isinstance(stored, Coded) and is_one_of(name, model.architecture.mlx.bare):
        return f"mlx-lm holds the {tensor.namesake} of {family} as a bare parameter"
    return unfit(tensor, model, stored, SPEC.name)


def _bundle(draft: Draft) -> Iterator[Refusal]:
    rules = (rule.arranged for rule in draft.model.architecture.names.values())
    missed = {rule.misses for rule in rules if rule and rule.misses}
    missed &= {tensor.left_out for tensor in draft.model.tensors}
    for runtime in RUNTIMES:
        yield from refused(draft, READER, runtime)
        yield from (Refusal("", runtime, reason, "inexact") for reason in sorted(missed))


def _usual(module: Module, model: Model) -> int | None:
    mlx = model.architecture.mlx
    given = {**mlx.bits, **dict.fromkeys(mlx.plain, 16)}
    return next((given[pattern] for pattern in given if is_one_of(module.name, (pattern,))), None)


REVIEW = Review(
    left_out=partial(omission, reasons=_LEFT_OUT), held=_held, bundle=_bundle, usual=_usual
)
SPEC = FormatSpec(
    name="mlx_affine",
    about="MLX bundles for stock mlx-lm and mlx-swift-lm on Apple silicon",
    schemes=(
        SchemeSpec(AFFINE, _WIDTHS, (64, 32, 128), about="scale and bias a group"),
        SchemeSpec("mxfp4", (4,), (32,), ("rtn",), (True,), about="E2M1 codes, power-of-two scale"),
        SchemeSpec("mxfp8", (8,), (32,), ("rtn",), (True,), about="E4M3 codes, power-of-two scale"),
        SchemeSpec("nvfp4", (4,), (16,), ("rtn",), (True,), about="E2M1 codes, E4M3 scale"),
    ),
    fill=tuple(("any", bits, AFFINE) for bits in _WIDTHS),
    plain_dtypes=("BF16", "F16", "F32"),
    fp8_rules=("bf16", "f32", "bf16_bf16"),
    arrangement=rearranged,
    module_path=module_name,
    part_shapes=_part_shapes,
    plain_dtype=_plain_dtype,
    tensor_files=Shards(5 * 2**30, shard_name, metadata={"format": "mlx"}),
    copied_files=SIDE_FILES,
    metadata_files=(CONFIG,),
    settings=("output.shard_size",),
    config_readers=(READER,),
    runtimes=RUNTIMES,
)
