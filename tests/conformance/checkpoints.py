"""Tiny random checkpoints, made with transformers and saved as publishers save them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from model_kinds import JANG_KINDS, KINDS, N_LAYERS, SIZES, Checkpoint, Kind, published_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

Tensors = dict[str, torch.Tensor]

_FP8_BLOCK = 128
_FP8_METHOD = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK],
}


def make_checkpoint(name: str, folder: Path) -> Checkpoint:
    """The checkpoint of a kind, written below `folder`."""
    kind = {**KINDS, **JANG_KINDS}[name]
    model = _random_model(kind)
    tensors, config = saved(model, folder / "saved", per_expert=True)
    config = published_config(config, kind)
    tensors = _as_published(tensors, kind, config)
    readable = write_folder(folder / "readable", tensors, config, kind.shards)
    if kind.storage == "plain":
        return Checkpoint(readable, readable)
    if kind.storage == "fused":
        tensors, _ = saved(model, folder / "fused", per_expert=False)
        tensors = _as_published(tensors, kind, config)
        return Checkpoint(write_folder(folder / "published", tensors, config), readable)
    return _write_fp8(folder, tensors, kind, config)


def _random_model(kind: Kind) -> Any:
    torch.manual_seed(7)
    sizes = {**SIZES, **kind.options}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    if kind.config_class == "Gemma3Config":
        vision = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 56,
        }
        sizes = {"text_config": sizes, "vision_config": vision, "mm_tokens_per_image": 4}
    config = getattr(transformers, kind.config_class)(**sizes)
    auto = (
        transformers.AutoModelForImageTextToText
        if kind.config_class == "Gemma3Config"
        else transformers.AutoModelForCausalLM
    )
    model = auto.from_config(config, dtype=getattr(torch, kind.dtype))
    with torch.no_grad():
        # Norms start as ones and biases as zeros: equal ones could hide a mix-up.
        for tensor in model.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def saved(model: Any, folder: Path, *, per_expert: bool) -> tuple[Tensors, dict[str, Any]]:
    """A model's tensors and config, as transformers saves them to a folder.

    per_expert: with experts one by one, under their published names.
    """
    model.save_pretrained(folder, save_original_format=per_expert)
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


def _as_published(tensors: Tensors, kind: Kind, config: dict[str, Any]) -> Tensors:
    """Router biases in float32, and GLM's extra layer that predicts a second token."""
    found = {
        # transformers 5 leaves out a level of the published vision names.
        name.replace("vision_tower.", "vision_tower.vision_model.", 1): (
            tensor.float() if name.endswith("e_score_correction_bias") else tensor
        )
        for name, tensor in tensors.items()
    }
    if kind.family == "glm4_moe" and config["num_nextn_predict_layers"]:
        found |= _next_token_layer(found)
    return found


def _next_token_layer(tensors: Tensors) -> Tensors:
    last, extra = f"model.layers.{N_LAYERS - 1}.", f"model.layers.{N_LAYERS}."
    embed, norm = tensors["model.embed_tokens.weight"], tensors["model.norm.weight"]
    found = {
        name.replace(last, extra): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    for name, like in {
        "embed_tokens": embed,
        "shared_head.head": embed,
        "shared_head.norm": norm,
        "enorm": norm,
        "hnorm": norm,
        "eh_proj": embed[:256].repeat(1, 2),
    }.items():
        found[f"{extra}{name}.weight"] = like.clone()
    return found


def _write_fp8(folder: Path, tensors: Tensors, kind: Kind, config: dict[str, Any]) -> Checkpoint:
    """Both forms of an FP8 checkpoint: MiniMax's scales and routers are float32."""
    wide = kind.family == "minimax_m2"
    stored: Tensors = {}
    plain: Tensors = {}
    for name, tensor in tensors.items():
        if "_proj." in name or ".experts." in name:
            codes, scales = _to_fp8(tensor, torch.float32 if wide else torch.bfloat16)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            plain[name] = _from_fp8(codes, scales)
        else:
            router = wide and name.endswith(".gate.weight")
            stored[name] = plain[name] = tensor.float() if router else tensor
    published = write_folder(
        folder / "published", stored, {**config, "quantization_config": _FP8_METHOD}
    )
    # mlx-lm reads the FP8 form of MiniMax-M2 itself, and of no other family here.
    readable = published if wide else write_folder(folder / "dequantized", plain, config)
    return Checkpoint(published, readable)


def as_fp8(source: Path, out: Path) -> tuple[Path, Path]:
    """A checkpoint with its blocks' linears in FP8, and the same values in bfloat16."""
    stored: Tensors = {}
    plain: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj" in name and ".layers." in name and tensor.ndim == 2:
            codes, scales = _to_fp8(tensor, torch.bfloat16)
            stored |= {name: codes, f"{name}_scale_inv": scales}
            plain[name] = _from_fp8(codes, scales)
        else:
            stored[name] = plain[name] = tensor
    config = json.loads((source / "config.json").read_text())
    method = {"quantization_config": _FP8_METHOD}
    return (
        write_folder(out / "fp8", stored, {**config, **method}, 1),
        write_folder(out / "plain", plain, config, 1),
    )


def _to_fp8(weight: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (-(-n // _FP8_BLOCK) for n in weight.shape)
    scales = torch.empty(rows, columns, dtype=scale_dtype)
    for i in range(rows):
        for j in range(columns):
            block = weight[
                i * _FP8_BLOCK : (i + 1) * _FP8_BLOCK, j * _FP8_BLOCK : (j + 1) * _FP8_BLOCK
            ]
            scales[i, j] = block.abs().max().float() / 440
    codes = (weight.float() / _spread(scales, weight.shape)).to(torch.float8_e4m3fn)
    return codes, scales


def _from_fp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (codes.float() * _spread(scales, codes.shape)).bfloat16()


def _spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    wide = scales.float().repeat_interleave(_FP8_BLOCK, 0).repeat_interleave(_FP8_BLOCK, 1)
    return wide[: shape[0], : shape[1]]


def write_folder(
    folder: Path, tensors: Tensors, config: Mapping[str, Any], shards: int = 3
) -> Path:
    """A checkpoint folder with a tokenizer; the tensors in so many shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(folder)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        # Neighbours land in different shards, as the scales of published FP8 weights may.
        held = {name: tensors[name].contiguous() for name in names[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges; `mlx_lm.convert` wants one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
