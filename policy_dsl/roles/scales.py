"""Which tensor scales which: scales of FP8 weights and MXFP4 block exponents, by shape.

FP8 weights have one multiplier for each block, each output row, or the whole matrix. Either is
a grid [rows of blocks, columns of blocks] from here on, whatever shape it is stored in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.quantities import counted, first_few

FP8_SUFFIX = "_scale_inv"
# compressed-tensors, ModelOpt and vLLM call the same multipliers so.
_PLAIN_SUFFIX = "_scale"
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"
_SUFFIXES = (FP8_SUFFIX, _PLAIN_SUFFIX, _MXFP4_SCALES)
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
    findings: tuple[Diagnostic, ...]


def find_scales(inventory: Inventory) -> Scales:
    """Every weight's scales, and what is wrong with them.

    Source: FP8 as DeepSeek-V3, MiniMax-M2 and Ministral 3 publish it (`weight_scale_inv`), and
    as compressed-tensors 0.20 and ModelOpt 0.47 write it (`weight_scale`), multipliers all of
    them; MXFP4 as gpt-oss publishes it, one E8M0 exponent for 32 values.
    """
    tensors, of_weight = inventory.tensors, dict[str, TensorInfo]()
    orphans = []
    # Half of 100,000 names are scales: the others must not cost a call each.
    for name in [name for name in tensors if name.endswith(_SUFFIXES)]:
        weight = _weight_name(name, tensors)
        if weight is not None and weight in tensors:
            of_weight[weight] = _as_grid(tensors[weight], tensors[name])
        elif weight is not None:
            orphans.append(tensors[name])
    consumed = frozenset(scale.name for scale in (*of_weight.values(), *orphans))
    findings = tuple(_findings(inventory, of_weight))
    return Scales(of_weight, consumed, tuple(orphans), findings)


def is_activation_scale(name: str) -> bool:
    """Whether a tensor of this name scales activations or a cache, and no weight."""
    return name.rpartition(".")[2] in _ACTIVATION_SCALES


def _weight_name(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The weight that a tensor of this name would scale; None if it does not scale any."""
    if name.endswith(FP8_SUFFIX):
        return name.removesuffix(FP8_SUFFIX)
    if name.endswith(_PLAIN_SUFFIX):
        # An ordinary ending too: only beside FP8 codes it is known what it means.
        weight = name.removesuffix(_PLAIN_SUFFIX)
        known = weight in tensors and tensors[weight].dtype == FP8
        return weight if known and f"{weight}{FP8_SUFFIX}" not in tensors else None
    # `_scales` alone is an ordinary ending; only beside `_blocks` it is MXFP4.
    blocks = name.removesuffix(_MXFP4_SCALES) + _MXFP4_BLOCKS
    return blocks if blocks in tensors else None


def _as_grid(weight: TensorInfo, scale: TensorInfo) -> TensorInfo:
    """The scale with the shape of a grid: one for a matrix is [1, 1], one a row [out, 1].

    Scales that are stored in another way stay as they are.
    """
    if len(weight.shape) < 2 or weight.name.endswith(_MXFP4_BLOCKS):
        return scale
    lead, rows = weight.shape[:-2], weight.shape[-2]
    grids = {lead: (1, 1), (*lead, 1): (1, 1), (*lead, rows): (rows, 1)}
    grid = grids.get(scale.shape)
    return scale if grid is None else scale._replace(shape=(*lead, *grid))


@dataclass(frozen=True)
class _Blocks:
    """What a config says of blocks, [out, in]: those of all weights, else those of some."""

    declared: tuple[int, int] | None
    groups: tuple[tuple[int, int], ...]

    def of(self, weight: TensorInfo, scale: TensorInfo) -> tuple[int, int] | None:
        if len(weight.shape) < 2:
            return None
        if self.declared is not None:
            fits = scale.shape == _grid(weight.shape, self.declared)
            return self.declared if fits else None
        rows, columns = weight.shape[-2:]
        # In a matrix of one row, or of one block, several are the same.
        same = {
            (min(height, rows), min(width, columns))
            for height, width in ((rows, columns), (1, columns), *self.groups)
            if scale.shape == _grid(weight.shape, (height, width))
        }
        return same.pop() if len(same) == 1 else None


def fp8_block(
    config: Mapping[str, Any], weight: TensorInfo, scale: TensorInfo
) -> tuple[int, int] | None:
    """The rows and columns that share a multiplier of this grid; None if that is not known.

    `weight_block_size` decides alone. Else the shape shows one for a matrix and one for a row,
    and blocks must be among those of the config's `config_groups`.
    """
    return _blocks(config).of(weight, scale)


def _blocks(config: Mapping[str, Any]) -> _Blocks:
    entries = list(_described(config))
    declared = filter(None, (_pair(entry.get("weight_block_size")) for entry in entries))
    listed = (entry.get("config_groups") for entry in entries)
    groups = [group for each in listed if isinstance(each, Mapping) for group in each.values()]
    weights = [group.get("weights") for group in groups if isinstance(group, Mapping)]
    pairs = [
        pair
        for entry in weights
        if isinstance(entry, Mapping)
        # Over rows and columns, or along a row.
        for pair in (_pair(entry.get("block_structure")), _pair([1, entry.get("group_size")]))
        if pair is not None
    ]
    return _Blocks(next(declared, None), tuple(dict.fromkeys(pairs)))


def _described(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the config, or its language model's part, says about quantization."""
    for level in (config, *(config.get(place) for place in _PLACES)):
        for key in _ENTRIES:
            entry = level.get(key) if isinstance(level, Mapping) else None
            if isinstance(entry, Mapping):
                yield entry


def _pair(block: Any) -> tuple[int, int] | None:
    # Neither a list with true, 1.5 or 0 in it is a block, nor a single number.
    if isinstance(block, list | tuple) and [type(size) for size in block] == [int, int]:
        return (block[0], block[1]) if min(block) > 0 else None
    return None


def _grid(shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, ...]:
    """The shape of the scales of a weight; of a matrix without a block, one a row."""
    if len(shape) < 2:
        return ()
    height, width = block or (1, shape[-1])
    return (*shape[:-2], -(-shape[-2] // height), -(-shape[-1] // max(1, width)))


def _findings(inventory: Inventory, of_weight: Mapping[str, TensorInfo]) -> Iterator[Diagnostic]:
    tensors, blocks = inventory.tensors, _blocks(inventory.config)
    bare = [name for name in tensors if name not in of_weight]
    # What ends in `_scale` and has no scales scales the codes of another format.
    fp8 = [one for one in bare if tensors[one].dtype == FP8 and not one.endswith(_PLAIN_SUFFIX)]
    for names in (fp8, [name for name in bare if name.endswith(_MXFP4_BLOCKS)]):
        if names:
            count, shown = counted(len(names), "tensor"), first_few(sorted(names))
            yield diagnostic("missing-scale", tensors=count, names=shown)
    odd = []
    for name, scale in of_weight.items():
        weight = tensors[name]
        if name.endswith(_MXFP4_BLOCKS):
            *grid, nbytes = weight.shape or (0,)
            if (weight.dtype, scale.dtype) != ("U8", "U8"):
                yield _wrong_dtype(weight, scale)
            elif nbytes != 16 or scale.shape != tuple(grid):
                yield _wrong_grid(weight, scale, tuple(grid))
        elif weight.dtype not in FP8_DTYPES or scale.dtype not in _SCALE_DTYPES:
            yield _wrong_dtype(weight, scale)
        elif blocks.of(weight, scale) is None:
            odd.append((weight, scale))
    if blocks.declared or blocks.groups:
        yield from (_wrong_grid(*pair, _grid(pair[0].shape, blocks.declared)) for pair in odd)
    elif odd:
        cure = "add the weight_block_size that the publisher's config has"
        yield diagnostic("missing-block-size", model=inventory.id, suggestion=cure)


def _wrong_dtype(weight: TensorInfo, scale: TensorInfo) -> Diagnostic:
    powers = weight.dtype == FP8 and scale.dtype in _EXPONENTS
    cure = "scales that are powers of two (MXFP8) are not read: dequantize the model first"
    return diagnostic(
        "wrong-scale-dtype",
        suggestion=cure if powers else None,
        name=weight.name,
        scale=scale.dtype,
        dtype=weight.dtype,
    )


def _wrong_grid(weight: TensorInfo, scale: TensorInfo, wanted: tuple[int, ...]) -> Diagnostic:
    shape, grid = list(weight.shape), list(scale.shape)
    return diagnostic(
        "wrong-scale-grid", name=weight.name, shape=shape, found=grid, wanted=list(wanted)
    )
