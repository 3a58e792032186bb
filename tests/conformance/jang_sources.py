"""Checkpoints that jang's own converter can read as well.

It takes files called `model-…` only, and looks for the scales of FP8 weights beside them.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

_BLOCK = 128
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def regrouped(source: Path, out: Path) -> Path:
    """The checkpoint with a file for each layer, and one before them for all else."""
    _copy_texts(source, out)
    files: dict[int, Tensors] = {}
    for name, tensor in _tensors(source).items():
        layer = _LAYER.search(name)
        files.setdefault(int(layer[1]) + 1 if layer else 0, {})[name] = tensor
    weight_map = {}
    for number, tensors in sorted(files.items()):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def widened(source: Path, out: Path) -> Path:
    """The checkpoint with its FP8 weights as BF16, each in the file that it was in."""
    _copy_texts(source, out)
    for path in sorted(source.glob("*.safetensors")):
        held = load_file(path)
        for name in [name for name in held if name.endswith("_scale_inv")]:
            scales, weight = held.pop(name), name.removesuffix("_scale_inv")
            for dim in (0, 1):
                scales = scales.repeat_interleave(_BLOCK, dim)
            held[weight] = (held[weight].float() * scales).bfloat16()
        save_file(held, out / path.name, metadata={"format": "pt"})
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        name: file for name, file in index["weight_map"].items() if not name.endswith("_scale_inv")
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def _tensors(source: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _copy_texts(source: Path, out: Path) -> None:
    out.mkdir()
    for path in source.iterdir():
        if not path.name.endswith((".safetensors", ".index.json")):
            shutil.copy(path, out / path.name)
