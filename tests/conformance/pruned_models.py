"""A model pruned by hand: experts taken out of a checkpoint with torch and safetensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Kept = Mapping[int, Sequence[int]]

_EXPERT = re.compile(r"(.*\.layers\.(\d+)\..*\.experts\.)(\d+)(\..*)")
_BY_EXPERT = re.compile(r".*\.layers\.(\d+)\..*(\.gate\.weight|e_score_correction_bias)")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def kept_of(source: Path) -> dict[int, list[int]]:
    """Layer -> all of its experts but one, another one in each layer."""
    counts: dict[int, set[int]] = {}
    for name in _tensors(source):
        if found := _EXPERT.fullmatch(name):
            counts.setdefault(int(found[2]), set()).add(int(found[3]))
    config = json.loads((source / "config.json").read_text())
    return {
        layer: [number for number in sorted(experts) if number != layer % len(experts)]
        for layer, experts in sorted(counts.items())
        if layer < config["num_hidden_layers"]
    }


def pruned_by_hand(source: Path, out: Path, kept: Kept) -> Path:
    """A copy of a checkpoint with experts of their own tensors, which has only these."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {}
    for name, tensor in _tensors(source).items():
        expert, whole = _EXPERT.fullmatch(name), _BY_EXPERT.fullmatch(name)
        if expert and (numbers := kept.get(int(expert[2]))):
            if int(expert[3]) in numbers:
                new = numbers.index(int(expert[3]))
                tensors[f"{expert[1]}{new}{expert[4]}"] = tensor
        elif whole and (numbers := kept.get(int(whole[1]))):
            tensors[name] = tensor[list(numbers)].clone()
        else:
            tensors[name] = tensor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    count = len(next(iter(kept.values())))
    config |= {key: count for key in _COUNTS if key in config}
    (out / "config.json").write_text(json.dumps(config))
    return out


def _tensors(source: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors")):
        found |= load_file(path)
    return found
