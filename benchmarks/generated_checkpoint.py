"""A MiniMax-M2 checkpoint with M2.7's matrix shapes, but fewer layers and experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

DEMO = Path(__file__).parents[1] / "examples" / "tiny-minimax-m2"
HIDDEN, INNER, QUERIES, KEYS = 3072, 1536, 6144, 1024
BLOCK = 128
NBYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}

# Name, dtype, shape.
Entry = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """What is not as in MiniMax-M2.7; fp8: layers in the original's form, else all bfloat16."""

    layers: int
    experts: int
    vocabulary: int = 200064
    fp8: bool = False


def write_checkpoint(folder: Path, sizes: Sizes) -> int:
    """Write it, one shard for each layer; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    shards = {f"layer-{layer}": list(_layer(layer, sizes)) for layer in range(sizes.layers)}
    ends = (sizes.vocabulary, HIDDEN)
    shards["embed"] = [("model.embed_tokens.weight", "BF16", ends)]
    shards["head"] = [("lm_head.weight", "BF16", ends), ("model.norm.weight", "BF16", (HIDDEN,))]
    weight_map = {}
    for number, entries in enumerate(shards.values(), 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as opened:
            write_shard(opened, entries)
        weight_map.update({entry[0]: name for entry in entries})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(sizes)))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(DEMO / name, folder / name)
    return sum(_nbytes(entry) for entries in shards.values() for entry in entries)


def _config(sizes: Sizes) -> dict[str, object]:
    config: dict[str, object] = json.loads((DEMO / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "num_hidden_layers": sizes.layers,
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": min(2, sizes.experts),
        "vocab_size": sizes.vocabulary,
        "attn_type_list": [1] * sizes.layers,
        "torch_dtype": "bfloat16",
    }
    if not sizes.fp8:
        del config["quantization_config"]
    return config


def _layer(layer: int, sizes: Sizes) -> Iterator[Entry]:
    block = f"model.layers.{layer}"
    moe = f"{block}.block_sparse_moe"
    matrices = {
        f"{block}.self_attn.q_proj": (QUERIES, HIDDEN),
        f"{block}.self_attn.k_proj": (KEYS, HIDDEN),
        f"{block}.self_attn.v_proj": (KEYS, HIDDEN),
        f"{block}.self_attn.o_proj": (HIDDEN, QUERIES),
    }
    for expert in range(sizes.experts):
        matrices[f"{moe}.experts.{expert}.w1"] = (INNER, HIDDEN)
        matrices[f"{moe}.experts.{expert}.w2"] = (HIDDEN, INNER)
        matrices[f"{moe}.experts.{expert}.w3"] = (INNER, HIDDEN)
    for name, shape in matrices.items():
        yield f"{name}.weight", "F8_E4M3" if sizes.fp8 else "BF16", shape
        if sizes.fp8:
            grid = (shape[0] // BLOCK, shape[1] // BLOCK)
            yield f"{name}.weight_scale_inv", "F32", grid
    yield f"{moe}.gate.weight", "F32", (sizes.experts, HIDDEN)
    yield f"{moe}.e_score_correction_bias", "F32", (sizes.experts,)
    yield f"{block}.self_attn.q_norm.weight", "BF16", (QUERIES,)
    yield f"{block}.self_attn.k_norm.weight", "BF16", (KEYS,)
    yield f"{block}.input_layernorm.weight", "BF16", (HIDDEN,)
    yield f"{block}.post_attention_layernorm.weight", "BF16", (HIDDEN,)


def _nbytes(entry: Entry) -> int:
    return prod(entry[2]) * NBYTES[entry[1]]


def write_shard(opened: BinaryIO, entries: list[Entry], *, hole: bool = False) -> None:
    """Header and values of a file of tensors. hole: nothing is written where values are."""
    header, at = {}, 0
    for name, dtype, shape in entries:
        end = at + _nbytes((name, dtype, shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    opened.write(len(text).to_bytes(8, "little") + text)
    if hole:
        opened.truncate(opened.tell() + at)
        return
    for number, entry in enumerate(entries):
        for piece in _content(entry, number):
            opened.write(piece)


def _content(entry: Entry, seed: int) -> Iterator[bytes]:
    """The tensor's bytes: normal values, the same few million of them over and over."""
    _, dtype, shape = entry
    random = np.random.default_rng(seed)
    left = prod(shape)
    values = random.standard_normal(min(left, 2**22), np.float32)
    if dtype == "F8_E4M3":
        # Codes of magnitudes up to 1.9, both signs.
        block = (random.integers(0, 64, len(values)) + 128 * (values > 0)).astype(np.uint8)
    elif dtype == "BF16":
        block = ((0.02 * values).view(np.uint32) >> 16).astype(np.uint16)
    else:
        block = 0.02 * np.abs(values)
    while left > 0:
        yield block[:left].tobytes()
        left -= len(block)
