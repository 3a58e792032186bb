"""Small checkpoints written by hand, and bundles read by the safetensors library."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from policy_dsl.sources.hfq_container import QUANT_CODES

Array = NDArray[Any]
Tensors = Mapping[str, tuple[str, Array]]


def write_shard(path: Path, tensors: Tensors) -> None:
    """A safetensors file, without the program's own writer. tensors: name -> dtype, array."""
    header, at = {}, 0
    for name, (dtype, array) in tensors.items():
        offsets = [at, at + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        at += array.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            opened.write(array.tobytes())


def bf16(values: Array) -> Array:
    """The upper halves of float32 values: BF16 bits, rounded towards zero."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widened(content: bytes) -> Array:
    """Exactly the float32 values, flat, of BF16 bytes."""
    return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32)


def random_bf16(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """BF16 bits of small normal values that float16 can hold exactly."""
    values = 0.02 * random.standard_normal(shape, np.float32)
    return bf16(np.where(np.abs(values) < 1e-4, 0, values))


def write_folder(folder: Path, config: Mapping[str, object], tensors: Tensors) -> None:
    """A checkpoint folder of one shard."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_shard(folder / "model.safetensors", tensors)


def llama_config(*, layers: int, hidden: int, inner: int, vocabulary: int) -> dict[str, object]:
    """The config of `llama_tensors`."""
    return {
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


def llama_tensors(
    *, layers: int, hidden: int, inner: int, vocabulary: int
) -> dict[str, tuple[str, Array]]:
    """The BF16 tensors of a small Llama."""
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{block}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj"] = (hidden, inner)
        shapes |= {f"{block}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm"] = (hidden,)
    random = np.random.default_rng(1)
    return {
        f"{name}.weight": ("BF16", random_bf16(random, shape)) for name, shape in shapes.items()
    }


def e4m3_values() -> Array:
    """The float32 values of all 256 E4M3 codes."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = 2.0 ** (exponent - 7.0) * (1 + mantissa / 8)
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    magnitude = np.where(codes & 127 == 127, np.nan, magnitude)
    return np.where(codes & 128, -magnitude, magnitude).astype(np.float32)


def nearest_bf16(values: Array) -> Array:
    """BF16 bits of float32 values, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def mixtral_config(*, inner: int) -> dict[str, object]:
    """The config of `mixtral_tensors`."""
    dense = llama_config(layers=1, hidden=64, inner=inner, vocabulary=96)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return {**dense, **heads, "model_type": "mixtral", "num_local_experts": 4}


def mixtral_tensors(*, fused: bool, inner: int) -> dict[str, tuple[str, Array]]:
    """A BF16 Mixtral of one layer and four experts; fused: as transformers 5 keeps them."""
    shapes = {"model.embed_tokens": (96, 64), "lm_head": (96, 64), "model.norm": (64,)}
    block = "model.layers.0"
    shapes |= {f"{block}.self_attn.{name}_proj": (64, 64) for name in "qkvo"}
    shapes |= {f"{block}.{name}_layernorm": (64,) for name in ("input", "post_attention")}
    random = np.random.default_rng(2)
    weights = {f"{name}.weight": random_bf16(random, shape) for name, shape in shapes.items()}
    gate, up = (random_bf16(random, (4, inner, 64)) for _ in range(2))
    down, router = random_bf16(random, (4, 64, inner)), random_bf16(random, (4, 64))
    if fused:
        weights[f"{block}.mlp.gate.weight"] = router
        weights[f"{block}.mlp.experts.gate_up_proj"] = np.concatenate((gate, up), axis=1)
        weights[f"{block}.mlp.experts.down_proj"] = down
    else:
        moe = f"{block}.block_sparse_moe"
        weights[f"{moe}.gate.weight"] = router
        for expert in range(4):
            for name, stack in (("w1", gate), ("w2", down), ("w3", up)):
                weights[f"{moe}.experts.{expert}.{name}.weight"] = stack[expert]
    return {name: ("BF16", bits) for name, bits in weights.items()}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of a model's tensors.

    As the safetensors library reads them; those of an HFQ file by the rules of its format.
    """
    found = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        if content.startswith(b"HFQM"):
            found |= hfq_tensors(content)
    # Other names are no shards: JANG's runtime has tables of its own.
    for path in sorted(folder.glob("model*.safetensors")):
        for name, entry in safetensors.deserialize(path.read_bytes()):
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def hfq_tensors(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of the tensors of an HFQ file."""
    count, start, stop = struct.unpack_from("<IQQ", content, 12)
    text = content[start:stop].decode("utf-8", "surrogateescape")
    length = json.JSONDecoder().raw_decode(text)[1]
    at = start + len(text[:length].encode("utf-8", "surrogateescape")) + 4
    found = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", content, at)
        name = content[at + 2 : at + 2 + length].decode()
        at += 2 + length
        code, dimensions = struct.unpack_from("<BB", content, at)
        shape = struct.unpack_from(f"<{dimensions}I", content, at + 2)
        at += 2 + 4 * dimensions
        (nbytes,) = struct.unpack_from("<Q", content, at + 4)
        at += 12
        found[name] = QUANT_CODES[code].name, shape, content[stop : stop + nbytes]
        stop += nbytes
    return found
