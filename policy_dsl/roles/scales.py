"""Which tensor scales which: scales of FP8 weights and MXFP4 block exponents, by shape.

FP8 weights have one multiplier for each block, each output row, or the whole matrix. Either is
a grid [rows of blocks, columns of blocks] from here on, whatever shape it is stored in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.quantities import counted

FP8_SUFFIX = "_scale_inv"
# compressed-tensors, ModelOpt and vLLM call the same multipliers so.
_PLAIN_SUFFIX = "_scale"
MXFP4_SUFFIXES = ("_blocks", "_scales")
_SUFFIXES = (FP8_SUFFIX, _PLAIN_SUFFIX, MXFP4_SUFFIXES[1])
FP8 = "F8_E4M3"
# Converters also store the FP8 byte under the name of an integer.
FP8_DTYPES = frozenset({FP8, "U8", "I8"})
_SCALE_DTYPES = frozenset({"F32", "BF16", "F16"})
_EXPONENTS = frozenset({"U8", "F8_E8M0"})
# The last part of their names. Readers that compute in 16 bits do not need them.
_ACTIVATION_SCALES = frozenset(
    ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "kv_scale")
)
_PLACES = ("text_config", "llm_config", "language_config")
_ENTRIES = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Scales:
    """Which scales belong to which weight, as grids.

    consumed: names of all scales. orphans: scales of a weight that is not there.
    """

    of_weight: Mapping[str, TensorInfo]
    consumed: frozenset[str]
    orphans: tuple[TensorInfo, ...]
    findings: tuple[Diagnostic, ...] = field(default=())


def find_scales(inventory: Inventory) -> Scales:
    """Every weight's scales, and what is wrong with them.

    Source: FP8 as DeepSeek-V3, MiniMax-M2 and Ministral 3 publish it (`weight_scale_inv`), and
    as compressed-tensors 0.20 and ModelOpt 0.47 write it (`weight_scale`), multipliers all of
    them; MXFP4 as gpt-oss publishes it, one E8M0 exponent for 32 values.
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
            of_weight[weight] = _as_grid(inventory.tensors[weight], tensor)
        else:
            orphans.append(tensor)
    consumed = frozenset(scale.name for scale in (*of_weight.values(), *orphans))
    findings = (*_fp8_findings(inventory, of_weight), *_mxfp4_findings(inventory, of_weight))
    return Scales(of_weight, consumed, tuple(orphans), findings)


def is_activation_scale(name: str) -> bool:
    """Whether a tensor of this name scales activations or a cache, and no weight."""
    return name.rpartition(".")[2] in _ACTIVATION_SCALES


def _weight_name(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The weight that a tensor of this name would scale; None if it is no tensor of scales."""
    if name.endswith(FP8_SUFFIX):
        return name.removesuffix(FP8_SUFFIX)
    if name.endswith(_PLAIN_SUFFIX):
        # An ordinary ending too: only beside FP8 codes it is known what it means.
        weight = name.removesuffix(_PLAIN_SUFFIX)
        known = weight in tensors and tensors[weight].dtype == FP8
        return weight if known and f"{weight}{FP8_SUFFIX}" not in tensors else None
    blocks, scales = MXFP4_SUFFIXES
    # `_scales` alone is an ordinary ending; only beside `_blocks` it is MXFP4.
    if name.endswith(scales) and name.removesuffix(scales) + blocks in tensors:
        return name.removesuffix(scales) + blocks
    return None


def _as_grid(weight: TensorInfo, scale: TensorInfo) -> TensorInfo:
    """The scale with the shape of a grid: one for a matrix is [1, 1], one a row [out, 1].

    Scales that are stored in another way stay as they are.
    """
    if len(weight.shape) < 2 or weight.name.endswith(MXFP4_SUFFIXES[0]):
        return scale
    if len(scale.shape) == len(weight.shape):
        return scale
    *lead, rows, _ = weight.shape
    own, stack = scale.shape[len(lead) :], scale.shape[: len(lead)]
    if stack == tuple(lead) and own in ((), (1,)):
        return scale._replace(shape=(*lead, 1, 1))
    if stack == tuple(lead) and own == (rows,):
        return scale._replace(shape=(*lead, rows, 1))
    return scale


def fp8_block(
    config: Mapping[str, Any], weight: TensorInfo, scale: TensorInfo
) -> tuple[int, int] | None:
    """The rows and columns that share a multiplier of this grid; None if that is not known.

    `weight_block_size` decides alone. Else the shape tells one for a matrix and one for a row,
    and blocks must be among those of the config's `config_groups`.
    """
    return _block(block_size(config), _groups(config), weight, scale)


def _block(
    declared: tuple[int, int] | None,
    groups: tuple[tuple[int, int], ...],
    weight: TensorInfo,
    scale: TensorInfo,
) -> tuple[int, int] | None:
    if len(weight.shape) < 2:
        return None
    if declared is not None:
        return declared if scale.shape == _grid(weight.shape, declared) else None
    rows, columns = weight.shape[-2:]
    blocks = ((rows, columns), (1, columns), *groups)
    # In a matrix of one row, or of one block, several are the same.
    same = {
        (min(block[0], rows), min(block[1], columns))
        for block in blocks
        if scale.shape == _grid(weight.shape, block)
    }
    return same.pop() if len(same) == 1 else None


def _fp8_findings(
    inventory: Inventory, of_weight: Mapping[str, TensorInfo]
) -> Iterator[Diagnostic]:
    fp8 = [each.name for each in inventory.tensors.values() if each.dtype == FP8]
    # What ends in `_scale` and has no scales scales the codes of another format.
    yield from _bare(
        [name for name in fp8 if name not in of_weight and not name.endswith(_PLAIN_SUFFIX)]
    )
    declared, groups = block_size(inventory.config), _groups(inventory.config)
    odd = []
    for name, scale in of_weight.items():
        weight = inventory.tensors[name]
        if weight.name.endswith(MXFP4_SUFFIXES[0]):
            continue
        if weight.dtype not in FP8_DTYPES or scale.dtype not in _SCALE_DTYPES:
            yield _wrong_dtype(weight, scale)
        elif _block(declared, groups, weight, scale) is None:
            odd.append((weight, scale))
    yield from _odd_grids(inventory.id, odd, declared, sized=bool(declared or groups))


def _odd_grids(
    model: str,
    odd: list[tuple[TensorInfo, TensorInfo]],
    declared: tuple[int, int] | None,
    *,
    sized: bool,
) -> Iterator[Diagnostic]:
    """The findings about weights whose scales are not those of their blocks."""
    if sized:
        yield from (_wrong_grid(*pair, _grid(pair[0].shape, declared)) for pair in odd)
    elif odd:
        cure = "add the weight_block_size that the publisher's config has"
        yield diagnostic("missing-block-size", model=model, suggestion=cure)


def _bare(names: list[str]) -> Iterator[Diagnostic]:
    """The finding about weights without scales, if there are any."""
    if names:
        yield diagnostic("missing-scale", tensors=counted(len(names), "tensor"), names=some(names))


def _mxfp4_findings(
    inventory: Inventory, of_weight: Mapping[str, TensorInfo]
) -> Iterator[Diagnostic]:
    blocks = [name for name in inventory.tensors if name.endswith(MXFP4_SUFFIXES[0])]
    yield from _bare([name for name in blocks if name not in of_weight])
    for name in blocks:
        if name in of_weight:
            yield from _mxfp4_defect(inventory.tensors[name], of_weight[name])


def _mxfp4_defect(blocks: TensorInfo, scale: TensorInfo) -> Iterator[Diagnostic]:
    *grid, nbytes = blocks.shape or (0,)
    if (blocks.dtype, scale.dtype) != ("U8", "U8"):
        yield _wrong_dtype(blocks, scale)
    elif nbytes != 16 or scale.shape != tuple(grid):
        yield _wrong_grid(blocks, scale, tuple(grid))


def _wrong_dtype(weight: TensorInfo, scale: TensorInfo) -> Diagnostic:
    powers = weight.dtype == FP8 and scale.dtype in _EXPONENTS
    cure = "scales that are powers of two (MXFP8) are not read: dequantize the model first"
    return diagnostic(
        "wrong-scale-dtype",
        name=weight.name,
        scale=scale.dtype,
        dtype=weight.dtype,
        suggestion=cure if powers else None,
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
    found = (_pair(entry.get("weight_block_size")) for entry in _described(config))
    return next((block for block in found if block is not None), None)


def _groups(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """The blocks of compressed-tensors' groups of modules, without repetition."""
    found: dict[tuple[int, int], None] = {}
    for entry in _described(config):
        groups = entry.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                continue
            # Along a row, or over rows and columns.
            row = _pair([1, weights.get("group_size")])
            for block in (_pair(weights.get("block_structure")), row):
                if block is not None:
                    found[block] = None
    return tuple(found)


def _described(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the config, or its language model's part, says about quantization."""
    for level in (config, *(config.get(place) for place in _PLACES)):
        for key in _ENTRIES:
            entry = level.get(key) if isinstance(level, Mapping) else None
            if isinstance(entry, Mapping):
                yield entry


def _pair(block: Any) -> tuple[int, int] | None:
    # A list with true, 1.5 or 0 in it is no block, and neither is a single number.
    if isinstance(block, list | tuple) and [type(size) for size in block] == [int, int]:
        return (block[0], block[1]) if min(block) > 0 else None
    return None


def _grid(shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, ...]:
    """The shape of the scales of a weight; of a matrix without a block, one a row."""
    if len(shape) < 2:
        return ()
    height, width = block or (1, shape[-1])
    return (*shape[:-2], -(-shape[-2] // height), -(-shape[-1] // max(1, width)))


def some(names: list[str], limit: int = 5) -> str:
    """The first few names in order, and how many are left out."""
    shown = ", ".join(sorted(names)[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
