"""Which tensor scales which: FP8 block scales and MXFP4 block exponents, checked by shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.units import counted

FP8_SUFFIX = "_scale_inv"
MXFP4_SUFFIXES = ("_blocks", "_scales")
_SUFFIXES = (FP8_SUFFIX, MXFP4_SUFFIXES[1])
# Converters also store the FP8 byte under the name of an integer.
_FP8_DTYPES = frozenset({"F8_E4M3", "U8", "I8"})
_SCALE_DTYPES = frozenset({"F32", "BF16", "F16"})


@dataclass(frozen=True)
class Scales:
    """Which scales belong to which weight.

    consumed: names of all scales. orphans: scales of a weight that is not there.
    """

    of_weight: Mapping[str, TensorInfo]
    consumed: frozenset[str]
    orphans: tuple[TensorInfo, ...]
    findings: tuple[Diagnostic, ...] = field(default=())


def find_scales(inventory: Inventory) -> Scales:
    """Every weight's scales, and what is wrong with them.

    Source: FP8 as DeepSeek-V3 and MiniMax-M2 publish it, one multiplier for each
    `weight_block_size` block, edge blocks smaller; MXFP4 as gpt-oss publishes it, one E8M0
    exponent for 32 values.
    """
    of_weight: dict[str, TensorInfo] = {}
    orphans = []
    # Half of 100,000 names are scales: the others must not cost a call each.
    named = [name for name in inventory.tensors if name.endswith(_SUFFIXES)]
    for name in named:
        tensor, weight = inventory.tensors[name], _weight_name(name, inventory.tensors)
        if weight is None:
            continue
        if weight in inventory.tensors:
            of_weight[weight] = tensor
        else:
            orphans.append(tensor)
    consumed = frozenset(scale.name for scale in (*of_weight.values(), *orphans))
    findings = (*_fp8_findings(inventory, of_weight), *_mxfp4_findings(inventory, of_weight))
    return Scales(of_weight, consumed, tuple(orphans), findings)


def _weight_name(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The weight that a tensor of this name would scale; None if it is no tensor of scales."""
    if name.endswith(FP8_SUFFIX):
        return name.removesuffix(FP8_SUFFIX)
    blocks, scales = MXFP4_SUFFIXES
    # `_scales` alone is an ordinary ending; only beside `_blocks` it is MXFP4.
    if name.endswith(scales) and name.removesuffix(scales) + blocks in tensors:
        return name.removesuffix(scales) + blocks
    return None


def _fp8_findings(
    inventory: Inventory, of_weight: Mapping[str, TensorInfo]
) -> Iterator[Diagnostic]:
    weights = inventory.tensors.values()
    bare = [
        each.name for each in weights if each.dtype == "F8_E4M3" and each.name not in of_weight
    ]
    if bare:
        yield diagnostic(
            "missing-scale", tensors=counted(len(bare), "tensor"), names=some(bare)
        )
    scaled = {name: s for name, s in of_weight.items() if s.name.endswith(FP8_SUFFIX)}
    block = block_size(inventory.config)
    if block is not None:
        for name, scale in scaled.items():
            yield from _fp8_defect(inventory.tensors[name], scale, block)
    elif scaled:
        yield diagnostic("missing-block-size", model=inventory.id)


def _fp8_defect(
    weight: TensorInfo, scale: TensorInfo, block: tuple[int, int]
) -> Iterator[Diagnostic]:
    if weight.dtype not in _FP8_DTYPES or scale.dtype not in _SCALE_DTYPES:
        yield _wrong_dtype(weight, scale)
    elif scale.shape != _grid(weight.shape, block):
        yield _wrong_grid(weight, scale, _grid(weight.shape, block))


def _mxfp4_findings(
    inventory: Inventory, of_weight: Mapping[str, TensorInfo]
) -> Iterator[Diagnostic]:
    blocks = [name for name in inventory.tensors if name.endswith(MXFP4_SUFFIXES[0])]
    for name in blocks:
        if name in of_weight:
            yield from _mxfp4_defect(inventory.tensors[name], of_weight[name])
        else:
            yield diagnostic("missing-scale", tensors="1 tensor", names=name)


def _mxfp4_defect(blocks: TensorInfo, scale: TensorInfo) -> Iterator[Diagnostic]:
    *grid, nbytes = blocks.shape or (0,)
    if (blocks.dtype, scale.dtype) != ("U8", "U8"):
        yield _wrong_dtype(blocks, scale)
    elif nbytes != 16 or scale.shape != tuple(grid):
        yield _wrong_grid(blocks, scale, tuple(grid))


def _wrong_dtype(weight: TensorInfo, scale: TensorInfo) -> Diagnostic:
    return diagnostic(
        "wrong-scale-dtype", name=weight.name, scale=scale.dtype, dtype=weight.dtype
    )


def _wrong_grid(weight: TensorInfo, scale: TensorInfo, wanted: tuple[int, ...]) -> Diagnostic:
    return diagnostic(
        "wrong-scale-grid",
        name=weight.name,
        shape=list(weight.shape),
        found=list(scale.shape),
        wanted=list(wanted),
    )


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """`weight_block_size` of the source's FP8 description, (out, in); None if it has none."""
    for level in (config, config.get("text_config")):
        described = level.get("quantization_config") if isinstance(level, Mapping) else None
        block = described.get("weight_block_size") if isinstance(described, Mapping) else None
        # A list with true, 1.5 or 0 in it is no block, and neither is a single number.
        if isinstance(block, list | tuple) and [type(size) for size in block] == [int, int]:
            return (block[0], block[1]) if min(block) > 0 else None
    return None


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    if len(shape) < 2:
        return ()
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def some(names: list[str], limit: int = 5) -> str:
    """The first few names in order, and how many are left out."""
    shown = ", ".join(sorted(names)[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
