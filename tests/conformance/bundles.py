"""Bundles, read by the safetensors library and not by our own reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import deserialize

# Dtype, shape and bytes of a tensor, as its file has them.
Tensor = tuple[str, tuple[int, ...], bytes]
# How a module is stored: (bits, group size, mode).
Width = tuple[int, int, str]


def tensors(bundle: Path) -> dict[str, Tensor]:
    """Name -> dtype, shape and bytes of every tensor of a bundle."""
    found = {}
    for path in sorted(bundle.glob("model*.safetensors")):
        for name, entry in deserialize(path.read_bytes()):
            found[name] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def widths(bundle: Path) -> dict[str, Width | None]:
    """What `config.json` says of every module that has a weight, as mlx-lm 0.32.0 resolves it.

    That release applies the default to modules without an entry; later ones look at shapes.
    """
    config = json.loads((bundle / "config.json").read_text())
    quantization = config["quantization"]
    default = {key: quantization[key] for key in ("bits", "group_size")}
    default["mode"] = quantization.get("mode", "affine")
    names = tensors(bundle)
    found: dict[str, Width | None] = {}
    for name in names:
        path = name.removesuffix(".weight")
        entry = quantization.get(path, f"{path}.scales" in names)
        if name.endswith(".weight"):
            found[path] = _width(default if entry is True else entry)
    return found


def _width(entry: Mapping[str, Any] | bool) -> Width | None:
    if not isinstance(entry, Mapping):
        return None
    # mlx-lm's recipes write a null group size, which means 64.
    return entry.get("bits", 4), entry.get("group_size") or 64, entry.get("mode", "affine")
