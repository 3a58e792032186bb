"""The peer: what jang's own tools make of a checkpoint and read from a bundle.

Runs in an interpreter of its own (`conftest.jang`): its loader replaces methods of mlx-lm.
"""

from __future__ import annotations

import gc
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from bundles import Tensor
from jang_tools.calibrate import _load_bf16_tensor
from jang_tools.capabilities import verify_directory
from jang_tools.convert_zaya_common import tq_quantize_weight_rowwise
from jang_tools.fp8 import load_fp8_tensor
from jang_tools.load_jangtq import load_jangtq_model
from jang_tools.turboquant.codebook import compute_codebook
from jang_tools.turboquant.linear import TurboQuantSwitchLinear
from jang_tools.turboquant.rotation import generate_random_signs
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear
from numpy.typing import NDArray
from safetensors import safe_open

Array = NDArray[Any]

_DTYPES = {
    mx.uint8: "U8",
    mx.uint32: "U32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
}
# Replaced methods know layers by their address: one that was freed could be taken for another.
_ATTENTIONS: list[Any] = []
_CONVERTER = "jang_tools.convert_minimax_jangtq"
_SHARD = "MAX_SHARD = 1_000_000_000"


@dataclass(frozen=True)
class Loaded:
    """A bundle in jang's loader. modules: path -> class, bits, group size or row length."""

    log: str
    parameters: Mapping[str, Tensor]
    modules: Mapping[str, tuple[str, int, int]]


def convert(source: Path, out: Path, profile: str, shard_nbytes: int | None = None) -> str:
    """What the converter prints while it writes a bundle with the experts apart.

    shard_nbytes: instead of the size of shards that its code fixes.
    """
    words = [_CONVERTER, str(source), str(out), profile, "--no-prestack"]
    if shard_nbytes is None:
        return _run(words, lambda: runpy.run_module(_CONVERTER, run_name="__main__"))
    path = Path(getattr(find_spec(_CONVERTER), "origin", ""))
    text = path.read_text()
    assert text.count(_SHARD) == 1
    code = compile(text.replace(_SHARD, f"MAX_SHARD = {shard_nbytes}"), str(path), "exec")
    return _run(words, lambda: exec(code, {"__name__": "__main__"}))


def convert_error(source: Path, out: Path, profile: str) -> str:
    """How the converter fails: kind and text of its error."""
    try:
        convert(source, out, profile)
    except (AssertionError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def rebundle(source: Path, out: Path, *options: str) -> str:
    """What the rebundler prints while it stacks the experts of a bundle."""
    module = "jang_tools.rebundle_jangtq_stacked"
    words = [module, str(source), str(out), *options]
    return _run(words, lambda: runpy.run_module(module, run_name="__main__"))


def load(bundle: Path) -> Loaded:
    """The bundle as jang's loader holds it."""
    model, log = _loaded(bundle)
    modules = {
        path: (type(module).__name__, module.bits, _length(module))
        for path, module in model.named_modules()
        if hasattr(module, "bits")
    }
    parameters = {name: as_tensor(array) for name, array in tree_flatten(model.parameters())}
    return Loaded(log, parameters, modules)


def load_error(bundle: Path) -> str:
    """What the loader says when it fails."""
    try:
        _loaded(bundle)
    except ValueError as error:
        return str(error)
    return ""


def stamp(bundle: Path) -> tuple[bool, str]:
    """Whether the capabilities of a bundle pass JANG's check, and what it says."""
    return verify_directory(bundle)


def logits(bundle: Path, prompt: Sequence[int]) -> Array:
    """Logits [tokens, vocabulary] in float32, the codes decoded by jang.

    All that jang replaces on loading stays, but for its Metal kernels.
    """
    model, _ = _loaded(bundle)
    for _, module in model.named_modules():
        if isinstance(module, SwitchGLU):
            _decode_experts(module)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array([prompt]))[0].astype(mx.float32))


def decode(packed: Array, norms: Array, bits: int, columns: int) -> Array:
    """Weights [experts, out, in] of stacked codes, by jang's own layer."""
    experts, rows = norms.shape
    layer = TurboQuantSwitchLinear(columns, rows, experts, bits=bits)
    layer.packed, layer.norms = mx.array(packed), mx.array(norms)
    return np.array(layer._dequant_experts(list(range(experts))))


def codes(files: Mapping[str, Path], bits: int) -> dict[str, tuple[Array, Array]]:
    """Packed codes and norms of matrices of a source, rows padded to whole words.

    files: name of a matrix -> its file, which holds its FP8 scales too.
    """
    found = {}
    for name, path in files.items():
        made = tq_quantize_weight_rowwise(_matrix(path, name), bits=bits, seed=42)
        found[name] = np.array(made["packed"]), np.array(made["norms"])
    return found


def tables(columns: int, bits: int) -> dict[str, Array]:
    """Signs and codebook for rows of this length, by the names of the runtime's file."""
    return {
        f"signs.{columns}.42": np.asarray(generate_random_signs(columns, seed=42), np.float32),
        f"codebook.{columns}.{bits}": np.asarray(compute_codebook(columns, bits), np.float32),
    }


def split_heads(
    kv_b: Mapping[str, Tensor], heads: int, nope: int, width: Mapping[str, int]
) -> dict[str, Tensor]:
    """Parameters that mlx-lm makes of `kv_b_proj`, by their names below the attention.

    kv_b: its parts; affine ones, of this `width`, are decoded, split, and quantized again.
    nope: rows of a head that belong to keys.
    """
    arrays = {part: as_array(tensor) for part, tensor in kv_b.items()}
    if "scales" not in arrays:
        halves = _halves(arrays["weight"], heads, nope)
        return {f"{name}.weight": as_tensor(half) for name, half in halves.items()}
    names = ("weight", "scales", "biases")
    values = mx.dequantize(*(arrays[name] for name in names), **width)
    found = {}
    for name, half in _halves(values, heads, nope).items():
        for part, array in zip(names, mx.quantize(half, **width), strict=True):
            found[f"{name}.{part}"] = as_tensor(array)
    return found


def cast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with all floating-point values rounded to BF16."""
    found = {}
    for name, tensor in tensors.items():
        array = as_array(tensor)
        floating = mx.issubdtype(array.dtype, mx.floating)
        found[name] = as_tensor(array.astype(mx.bfloat16)) if floating else tensor
    return found


def kernel_inputs(bundles: Sequence[Path]) -> list[list[list[Array]] | str]:
    """The inputs of each Metal kernel that the first layer's experts ask for, for one token.

    Where they do not get that far, the error's text. There is no Metal here, so the kernels'
    outputs are zeros.
    """
    asked: list[list[Array]] = []

    def kernel(*_: Any, **options: Any) -> Any:
        def call(*_: Any, **given: Any) -> list[mx.array]:
            asked.append([np.array(one) for one in given["inputs"]])
            places = zip(given["output_shapes"], given["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype=dtype) for shape, dtype in places]

        return call

    mx.fast.metal_kernel = kernel
    # Kernels that are compiled see no values while they are traced.
    mx.disable_compile()
    found: list[list[list[Array]] | str] = []
    for bundle in bundles:
        model, _ = _loaded(bundle)
        experts = next(one for _, one in model.named_modules() if isinstance(one, SwitchGLU))
        token = mx.zeros((1, 1, experts.gate_proj.in_features))
        asked.clear()
        try:
            mx.eval(experts(token, mx.zeros((1, 1, 2), dtype=mx.uint32)))
            found.append(list(asked))
        except AttributeError as error:
            found.append(str(error))
    return found


def as_tensor(array: mx.array) -> Tensor:
    """Dtype, shape and bytes, as a safetensors file has them."""
    stored = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return _DTYPES[array.dtype], tuple(array.shape), np.array(stored).tobytes()


def as_array(tensor: Tensor) -> mx.array:
    """The inverse of `as_tensor`."""
    dtype, shape, stored = tensor
    numpy = {"U8": np.uint8, "U32": np.uint32, "F32": np.float32, "F16": np.float16}
    array = mx.array(np.frombuffer(stored, numpy.get(dtype, np.uint16)).reshape(shape))
    return array.view(mx.bfloat16) if dtype == "BF16" else array


def _run(words: list[str], main: Callable[[], object]) -> str:
    # Both tools collect garbage after each matrix, through all that is imported here.
    gc.freeze()
    before, sys.argv = sys.argv, words
    try:
        with _silence() as said:
            main()
    finally:
        sys.argv = before
    return said.getvalue()


@contextmanager
def _silence() -> Iterator[StringIO]:
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        yield said


def _loaded(bundle: Path) -> tuple[Any, str]:
    with _silence() as said:
        model, _ = load_jangtq_model(bundle, skip_params_eval=True)
    _ATTENTIONS.extend(one for _, one in model.named_modules() if hasattr(one, "q_proj"))
    return model, said.getvalue()


def _length(module: Any) -> int:
    return int(getattr(module, "group_size", None) or module.in_features)


def _decode_experts(experts: Any) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        coded = experts[name]
        if hasattr(coded, "packed"):
            rows, columns = coded.out_features, coded.in_features
            plain = SwitchLinear(columns, rows, coded.num_experts, bias=False)
            # Latent attention makes them BF16, which numpy does not know.
            norms = np.array(coded.norms.astype(mx.float32))
            plain.weight = mx.array(decode(np.array(coded.packed), norms, coded.bits, columns))
            experts[name] = plain


def _halves(values: mx.array, heads: int, nope: int) -> dict[str, mx.array]:
    by_head = values.reshape(heads, -1, values.shape[-1])
    keys = mx.contiguous(by_head[:, :nope].swapaxes(-1, -2))
    return {"embed_q": keys, "unembed_out": mx.contiguous(by_head[:, nope:])}


def _matrix(path: Path, name: str) -> Array:
    with safe_open(str(path), framework="numpy") as opened:
        part = opened.get_slice(name)
        shape, dtype = list(part.get_shape()), part.get_dtype()
        if dtype == "BF16":
            return np.asarray(_load_bf16_tensor(path, name, shape), np.float32)
        return load_fp8_tensor(path, name, shape, opened.get_tensor(f"{name}_scale_inv"))
