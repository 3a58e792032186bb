"""Tiny MiniMax-M2 checkpoints out of an integer hash: what the recorded bundles were made from.

The recipe is in tests/golden/jangtq/README.md. Nothing is drawn at random, so a source is the
same on every machine and with every version of numpy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from small_checkpoints import Array, Tensors, nearest_bf16, write_shard

_GOLDEN_RATIO = 0x9E3779B97F4A7C15
_BLOCK = 128
# As MiniMax publishes it; jang's converter makes the thinking block depend on the caller.
CHAT_TEMPLATE = r"""{%- for message in messages -%}
{{- ']~b]' ~ message.role ~ '\n' ~ message.content ~ '[e~[\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ']~b]ai' ~ '\n' ~ '<think>' ~ '\n' }}
{%- endif -%}
"""
_WORDS = ("<unk>", "]~b]", "[e~[", "<think>", "</think>")
TOKENIZER_CONFIG = {
    "tokenizer_class": "TokenizersBackend",
    "eos_token": "[e~[",
    "bos_token": "]~b]",
    "unk_token": "<unk>",
    "model_max_length": 2048,
}
GENERATION_CONFIG = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "do_sample": True,
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 40,
}


class Recipe(NamedTuple):
    """Storage and sizes of a source, by the names of the recorded manifests.

    form: bf16 or fp8. H hidden, I width of experts, E experts, L layers, V vocabulary; heads,
    kv of them for keys and values, hd their width.
    """

    form: str
    seed: int
    H: int
    I: int  # noqa: E741
    E: int
    L: int
    V: int
    heads: int
    kv: int
    hd: int


def write_source(folder: Path, recipe: Recipe, *, n_shards: int = 1) -> Path:
    """A checkpoint folder with all that a publisher puts beside the weights.

    n_shards: neighbours in the order of names lie in different ones.
    """
    folder.mkdir(parents=True)
    found = source_tensors(recipe)
    weight_map = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        held = {name: found[name] for name in sorted(found)[shard::n_shards]}
        write_shard(folder / file, held)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
    for name, document in (
        ("model.safetensors.index.json", index),
        ("config.json", config(recipe)),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (folder / name).write_text(json.dumps(document, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(recipe.V)))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for file in ("configuration_minimax_m2.py", "modeling_minimax_m2.py"):
        (folder / file).write_text("# placeholder for upstream custom code\n")
    return folder


def source_tensors(recipe: Recipe) -> dict[str, tuple[str, Array]]:
    """Name -> dtype and bits of every tensor; BF16 and FP8 as unsigned integers."""
    found: dict[str, tuple[str, Array]] = {}
    for name, shape in _shapes(recipe):
        words = _words(name, recipe.seed, shape)
        if len(shape) == 1 and name.endswith("_bias"):
            found[name] = "F32", (8 + _bell(words) * 2.0**-17).astype(np.float32)
        elif len(shape) == 1:
            found[name] = "BF16", _bf16(1 + _bell(words) * 2.0**-19)
        elif name.endswith(".gate.weight"):
            gate = (_bell(words) * 2.0**-20).astype(np.float32)
            found[name] = ("F32", gate) if recipe.form == "fp8" else ("BF16", _bf16(gate))
        elif recipe.form == "bf16" or name in ("model.embed_tokens.weight", "lm_head.weight"):
            # One value of a thousand is an outlier.
            often = np.where(words & np.uint64(1023), 1.0, 16.0)
            found[name] = "BF16", _bf16(_bell(words) * 2.0**-21 * often)
        else:
            found[name] = "F8_E4M3", _e4m3(words)
            grid = f"{name}_scale_inv"
            found[grid] = "F32", _scales(grid, recipe.seed, shape)
    return found


def source_digest(found: Tensors) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, as the manifests record it."""
    digest = hashlib.sha256()
    for name, (dtype, array) in sorted(found.items()):
        shape = ",".join(map(str, array.shape))
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode() + array.tobytes())
    return digest.hexdigest()


def config(recipe: Recipe) -> dict[str, Any]:
    """The source's `config.json`, keys in the order in which the bundles repeat them."""
    known: dict[str, Any] = {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "head_dim": recipe.hd,
        "hidden_act": "silu",
        "hidden_size": recipe.H,
        "intermediate_size": recipe.I,
        "max_position_embeddings": 2048,
        "model_type": "minimax_m2",
        "num_attention_heads": recipe.heads,
        "num_experts_per_tok": 2,
        "num_hidden_layers": recipe.L,
        "num_key_value_heads": recipe.kv,
        "num_local_experts": recipe.E,
        "rms_norm_eps": 1e-06,
        "rope_theta": 5000000,
        "rotary_dim": recipe.hd // 2,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": recipe.V,
    }
    if recipe.form == "fp8":
        known["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "quant_method": "fp8",
            "weight_block_size": [_BLOCK, _BLOCK],
        }
    return known


def _shapes(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor but the scales, as MiniMax-M2 checkpoints name them."""
    hidden, queries, keys = recipe.H, recipe.heads * recipe.hd, recipe.kv * recipe.hd
    yield "model.embed_tokens.weight", (recipe.V, hidden)
    yield "lm_head.weight", (recipe.V, hidden)
    yield "model.norm.weight", (hidden,)
    for layer in range(recipe.L):
        block = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{name}.weight", (hidden,)
        for name, width in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{block}.self_attn.{name}_proj.weight", (width, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{block}.self_attn.q_norm.weight", (queries,)
        yield f"{block}.self_attn.k_norm.weight", (keys,)
        moe = f"{block}.block_sparse_moe"
        yield f"{moe}.gate.weight", (recipe.E, hidden)
        yield f"{moe}.e_score_correction_bias", (recipe.E,)
        for expert in range(recipe.E):
            yield f"{moe}.experts.{expert}.w1.weight", (recipe.I, hidden)
            yield f"{moe}.experts.{expert}.w2.weight", (hidden, recipe.I)
            yield f"{moe}.experts.{expert}.w3.weight", (recipe.I, hidden)


def _words(name: str, seed: int, shape: tuple[int, ...]) -> Array:
    """64 hashed bits for each element: SplitMix64 from a key of the tensor's own name."""
    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = (key ^ byte) * 0x100000001B3 % 2**64
    key ^= seed * _GOLDEN_RATIO % 2**64
    count = np.arange(1, np.prod(shape) + 1, dtype=np.uint64)
    z = np.uint64(key) + count * np.uint64(_GOLDEN_RATIO)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return (z ^ z >> np.uint64(31)).reshape(shape)


def _bell(words: Array) -> Array:
    """The sum of four 16-bit lanes around its mean: exact in float64, nearly normal."""
    lanes = (words >> np.uint64(16 * k) & np.uint64(0xFFFF) for k in range(4))
    return sum(lane.astype(np.float64) for lane in lanes) - 131070


def _bf16(values: Array) -> Array:
    return nearest_bf16(values.astype(np.float32))


def _e4m3(words: Array) -> Array:
    low, high = (words >> np.uint64(at) & np.uint64(63) for at in (0, 8))
    magnitude = np.uint64(0x18) + (low + high >> np.uint64(1))
    return (magnitude | words >> np.uint64(63) << np.uint64(7)).astype(np.uint8)


def _scales(name: str, seed: int, shape: tuple[int, ...]) -> Array:
    words = _words(name, seed, tuple(-(-n // _BLOCK) for n in shape))
    return ((1024 + (words & np.uint64(1023)).astype(np.float64)) * 2.0**-17).astype(np.float32)


def _tokenizer(n_words: int) -> dict[str, Any]:
    """One word for each entry of the vocabulary."""
    names = [*_WORDS, *(f"w{number}" for number in range(len(_WORDS), n_words))]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": number, "content": word, **flags, "special": "think" not in word}
        for number, word in enumerate(_WORDS[1:], 1)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(names)},
            "unk_token": "<unk>",
        },
    }
