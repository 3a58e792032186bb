"""How a source is quantized, by its config and its tensors' names, and what scales which weight.

bf16, f16, f32, FP8 with float scales and MXFP4 are what publishers train and release. The
tensors decide; the config describes. FP8 weights have one multiplier for each block, each output
row, or the whole matrix: a grid [rows of blocks, columns of blocks] from here on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.quantities import counted, first_few

FP8 = "F8_E4M3"
# Converters also store the FP8 byte under the name of an integer.
FP8_DTYPES = frozenset({FP8, "U8", "I8"})
_FP8_SUFFIX = "_scale_inv"
# compressed-tensors, ModelOpt and vLLM call the same multipliers so.
_PLAIN_SUFFIX = "_scale"
_MXFP4_BLOCKS, _MXFP4_SCALES = "_blocks", "_scales"
_SCALE_DTYPES = frozenset({"F32", "BF16", "F16"})
_EXPONENTS = frozenset({"U8", "F8_E8M0"})
# Models with vision keep their language model's settings one level down.
_PLACES = ("text_config", "llm_config", "language_config")

# How names end in forms that are recognized by one tensor alone, and that are not read.
_ENDINGS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".tq_packed": "mxtq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_2": "ModelOpt NVFP4",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".trellis": "exllamav3",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
}
# Weights of queries may be called so too.
_CODES = {("I32", ".q_weight"): "exllamav2"}
# Codes in files of their own dtype; E4M3 counts as FP8 only with its scales.
_DTYPES = {
    **{"F4": "4-bit floats", "F6_E2M3": "6-bit floats", "F6_E3M2": "6-bit floats", FP8: "FP8"},
    **{f"F8_{kind}": f"FP8 {kind}" for kind in ("E5M2", "E4M3FNUZ", "E5M2FNUZ")},
}
# Methods whose name says that the publisher's own codes are there.
_NATIVE = {"fp8": "FP8", "fbgemm_fp8": "FP8", "mxfp4": "MXFP4"}
# Files beside the weights in which tools describe what they made.
_SIDECARS = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "jang_config.json": "JANG",
}
_FACTS = ("mode", "bits", "group_size", "format", "fmt", "quant_algo")
_MXFP8 = "scales that are powers of two (MXFP8) are not read: dequantize the model first"


class Quantization(NamedTuple):
    """How a source is quantized, for people, and whether its numbers can be read."""

    form: str
    read: Literal["yes", "if allowed", "no"]

    def finding(self, model: str, *, allowed: bool) -> Diagnostic:
        """The finding about a model: a warning if it is taken. allowed: by the user."""
        if self.read == "yes" or (allowed and self.read == "if allowed"):
            return diagnostic("requantized", model=model, form=self.form)
        cure = "take the original checkpoint, or dequantize it first: this form is not read"
        if self.read == "if allowed":
            cure = "take the original checkpoint, or --allow-requantize"
        return diagnostic("already-quantized", suggestion=cure, model=model, form=self.form)


def quantization_of(inventory: Inventory) -> Quantization | None:
    """How the source is quantized; None if it has its full or native precision.

    A container's config is the original checkpoint's and says nothing.
    """
    if inventory.container is not None:
        return Quantization(inventory.container.form, "no")
    entry, tensors = _declared(inventory.config), inventory.tensors
    # The forms that tensors show by themselves, with the first of each.
    forms: dict[str, TensorInfo] = {}
    for tensor in tensors.values():
        if form := _form(tensor, tensors):
            forms.setdefault(form, tensor)
    native = _NATIVE.get(str(entry.get("quant_method")).lower())
    forms.pop(native or "", None)
    # Forms that are not read decide, also beside others.
    form = min(forms, key=("FP8", "MXFP4").count, default=None)
    if form is None:
        return None
    first = forms[form]
    undeclared = f"{form}: {first.name} is {first.dtype}, and the config does not say so"
    file = next((file for file in _SIDECARS if file in (inventory.side_files or {})), None)
    by_sidecar = f"{_SIDECARS[file]}, as {file} says" if file else None
    entry = {} if native else entry
    if form not in ("FP8", "MXFP4"):
        return Quantization((_described(entry) if entry else by_sidecar) or undeclared, "no")
    tool = entry.get("quant_method") or by_sidecar
    if form == "FP8" and tool:
        return Quantization(f"FP8 by {tool}", "yes")
    # Without a size of blocks the user's word does not help.
    is_broken = form == "FP8" and find_scales(inventory).findings
    return Quantization(undeclared, "no" if is_broken else "if allowed")


def leftover(inventory: Inventory) -> Iterator[Diagnostic]:
    """A warning if the config describes a quantization that no tensor shows."""
    # Tools that merge or dequantize leave the entry of what they started from.
    entry = {} if inventory.container else _declared(inventory.config)
    tensors = inventory.tensors
    if entry and not any(_form(one, tensors) for one in tensors.values()):
        cure = "remove the entry from config.json; the weights are taken as they are"
        form = _described(entry)
        yield diagnostic("quantization-not-shown", suggestion=cure, model=inventory.id, form=form)


def _entries(config: Mapping[str, Any], *keys: str) -> Iterator[Any]:
    """What the config and its language model's part say under these keys, if anything."""
    for level in (config, *(config.get(place) for place in _PLACES)):
        if isinstance(level, Mapping):
            yield from (level[key] for key in keys if level.get(key))


def _declared(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the config declares first; empty if nothing."""
    keys = ("quantization_config", "quantization", "compression_config")
    entry: Any = next(_entries(config, *keys), {})
    return entry if isinstance(entry, Mapping) else {"quant_method": str(entry)}


def _described(entry: Mapping[str, Any]) -> str:
    method = entry.get("quant_method")
    if method is None:
        method = "MLX" if "group_size" in entry else "a quantization that the config names"
    facts = ", ".join(f"{fact} {entry[fact]}" for fact in _FACTS if fact in entry)
    return f"{method} ({facts})" if facts else str(method)


def _form(tensor: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The quantized form that a tensor belongs to, as far as it shows by itself."""
    name, dtype, *_ = tensor
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype in ("U8", "I8"):
        if name.endswith(_MXFP4_BLOCKS):
            return "MXFP4"
        if f"{name}{_FP8_SUFFIX}" in tensors:
            return "FP8"
        if f"{name}{_PLAIN_SUFFIX}" in tensors:
            return "8-bit integers" if dtype == "I8" else "packed bytes with scales"
    # Packed words; a lone U32 tensor could be anything, its scales decide.
    elif dtype == "U32" and name.removesuffix("weight") + "scales" in tensors:
        return "MLX"
    ending = name[name.rfind(".") :]
    return _ENDINGS.get(ending) or _CODES.get((dtype, ending))


@dataclass(frozen=True)
class Scales:
    """Which scales belong to which weight, as grids; consumed: names of all, orphans included."""

    of_weight: Mapping[str, TensorInfo]
    consumed: frozenset[str]
    orphans: Sequence[TensorInfo]
    findings: Sequence[Diagnostic]


def find_scales(inventory: Inventory) -> Scales:
    """Every weight's scales, and what is wrong with them.

    Source: FP8 as DeepSeek-V3, MiniMax-M2 and Ministral 3 publish it (`weight_scale_inv`), and
    as compressed-tensors 0.20 and ModelOpt 0.47 write it (`weight_scale`), multipliers all of
    them; MXFP4 as gpt-oss publishes it, one E8M0 exponent for 32 values.
    """
    tensors, of_weight = inventory.tensors, dict[str, TensorInfo]()
    orphans = []
    suffixes = (_FP8_SUFFIX, _PLAIN_SUFFIX, _MXFP4_SCALES)
    # Half of 100,000 names are scales: the others must not cost a call each.
    for name in [name for name in tensors if name.endswith(suffixes)]:
        weight = _weight_name(name, tensors)
        if weight is not None and weight in tensors:
            shape, scale = tensors[weight].shape, tensors[name]
            if len(shape) > 1 and not weight.endswith(_MXFP4_BLOCKS):
                grid = _grid_shape(shape, scale.shape)
                scale = scale if grid is scale.shape else scale._replace(shape=grid)
            of_weight[weight] = scale
        elif weight is not None:
            orphans.append(tensors[name])
    consumed = frozenset(scale.name for scale in (*of_weight.values(), *orphans))
    return Scales(of_weight, consumed, orphans, list(_scale_findings(inventory, of_weight)))


def _is_of_codes(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether it scales codes of a format whose scales are FP8 themselves, such as NVFP4."""
    codes = name.removesuffix(_PLAIN_SUFFIX)
    return codes != name and (codes in tensors or f"{codes}_packed" in tensors)


def _weight_name(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The weight that a tensor of this name would scale; None if it does not scale any."""
    if name.endswith(_FP8_SUFFIX):
        return name.removesuffix(_FP8_SUFFIX)
    if name.endswith(_PLAIN_SUFFIX):
        # An ordinary ending too: only beside FP8 codes it is known what it means.
        weight = name.removesuffix(_PLAIN_SUFFIX)
        known = weight in tensors and tensors[weight].dtype == FP8
        return weight if known and f"{weight}{_FP8_SUFFIX}" not in tensors else None
    # `_scales` alone is an ordinary ending; only beside `_blocks` it is MXFP4.
    blocks = name.removesuffix(_MXFP4_SCALES) + _MXFP4_BLOCKS
    return blocks if blocks in tensors else None


@lru_cache
def _grid_shape(weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
    """A scale's shape as a grid: one for a matrix is [1, 1], one a row [out, 1]; others stay."""
    lead, rows = weight[:-2], weight[-2]
    grids = {lead: (*lead, 1, 1), (*lead, 1): (*lead, 1, 1), (*lead, rows): (*lead, rows, 1)}
    return grids.get(scale, scale)


class Blocks:
    """What a config says of blocks, [out, in], of FP8: those of all weights, else of some.

    `weight_block_size` decides alone. Else the shape shows one multiplier for a matrix and one
    for a row, and blocks must be among those of the config's `config_groups`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        entries = _mappings(_entries(config, "quantization_config", "compression_config"))
        declared = map(_pair, (entry.get("weight_block_size") for entry in entries))
        self.declared = next(filter(None, declared), None)
        groups = _mappings(entry.get("config_groups") for entry in entries)
        parts = _mappings(part for group in groups for part in group.values())
        weights = _mappings(part.get("weights") for part in parts)
        # Over rows and columns, or along a row.
        written = [entry.get("block_structure") for entry in weights]
        written += [[1, entry.get("group_size")] for entry in weights]
        self.groups = set(filter(None, map(_pair, written)))

    def of(self, weight: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, int] | None:
        """The rows and columns that share a multiplier, by the shapes; None if not known."""
        if len(weight) < 2:
            return None
        if self.declared is not None:
            return self.declared if scale == _grid(weight, self.declared) else None
        rows, columns = weight[-2:]
        # In a matrix of one row, or of one block, several are the same.
        same = {
            (min(height, rows), min(width, columns))
            for height, width in {(rows, columns), (1, columns), *self.groups}
            if scale == _grid(weight, (height, width))
        }
        return same.pop() if len(same) == 1 else None


def _mappings(values: Iterable[Any]) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)]


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


def _scale_findings(
    inventory: Inventory, of_weight: Mapping[str, TensorInfo]
) -> Iterator[Diagnostic]:
    tensors, blocks = inventory.tensors, Blocks(inventory.config)
    block_of = cache(blocks.of)
    bare = [name for name in tensors if name not in of_weight]
    fp8 = [one for one in bare if tensors[one].dtype == FP8 and not _is_of_codes(one, tensors)]
    for names in filter(None, (fp8, [name for name in bare if name.endswith(_MXFP4_BLOCKS)])):
        count, shown = counted(len(names), "tensor"), first_few(sorted(names))
        yield diagnostic("missing-scale", tensors=count, names=shown)
    odd = []
    for name, scale in of_weight.items():
        weight = tensors[name]
        is_mxfp4 = name.endswith(_MXFP4_BLOCKS)
        codes, scales = (("U8",), ("U8",)) if is_mxfp4 else (FP8_DTYPES, _SCALE_DTYPES)
        if weight.dtype not in codes or scale.dtype not in scales:
            cure = _MXFP8 if weight.dtype == FP8 and scale.dtype in _EXPONENTS else None
            facts: dict[str, Any] = {"name": name, "scale": scale.dtype, "dtype": weight.dtype}
            yield diagnostic("wrong-scale-dtype", suggestion=cure, **facts)
        elif is_mxfp4:
            *grid, nbytes = weight.shape or (0,)
            if nbytes != 16 or scale.shape != tuple(grid):
                yield _wrong_grid(weight, scale, tuple(grid))
        elif block_of(weight.shape, scale.shape) is None:
            odd.append((weight, scale))
    if blocks.declared or blocks.groups:
        yield from (_wrong_grid(*pair, _grid(pair[0].shape, blocks.declared)) for pair in odd)
    elif odd:
        cure = "add the weight_block_size that the publisher's config has"
        yield diagnostic("missing-block-size", model=inventory.id, suggestion=cure)


def _wrong_grid(weight: TensorInfo, scale: TensorInfo, wanted: tuple[int, ...]) -> Diagnostic:
    shape, grid, grids = list(weight.shape), list(scale.shape), list(wanted)
    return diagnostic("wrong-scale-grid", name=weight.name, shape=shape, found=grid, wanted=grids)
