"""Checkpoints that are published in low bits, as BF16 ones with the values of their codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from small_checkpoints import Tensors, bf16, e4m3_values, stored, widened, write_folder

_DTYPES = {"BF16": np.uint16, "F32": np.float32}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
# A scale is for so many values of a row; of FP8 also for so many rows.
_BLOCK = 32
Stored = tuple[str, tuple[int, ...], bytes]


def write_unpacked(case: Path, folder: Path) -> Path:
    """The checkpoint of `case` without packed tensors, written to a new folder."""
    config = json.loads((case / "config.json").read_text())
    for level in (config, config.get("text_config", {})):
        level.pop("quantization_config", None)
    write_folder(folder, config, _unpacked(stored(case)))
    return folder


def _unpacked(held: dict[str, Stored]) -> Tensors:
    found = {}
    for name, tensor in held.items():
        module = name.removesuffix("_packed").removesuffix(".weight")
        scale = held.get(f"{module}.weight_scale") or held.get(f"{module}.scale")
        if name.startswith(module) and scale and tensor is not scale:
            values = _values(tensor, scale)
            assert (widened(bf16(values).tobytes()) == values.ravel()).all(), name
            found[f"{module}.weight"] = ("BF16", bf16(values))
        elif not name.endswith((".weight_scale", ".scale")):
            dtype, shape, content = tensor
            found[name] = (dtype, np.frombuffer(content, _DTYPES[dtype]).reshape(shape))
    return found


def _values(tensor: Stored, scale: Stored) -> NDArray[np.float32]:
    (dtype, shape, content), (_, blocks, exponents) = tensor, scale
    codes = np.frombuffer(content, np.uint8).reshape(shape)
    factors = np.ldexp(np.float32(1), np.frombuffer(exponents, np.uint8).astype(int) - 127)
    factors = np.repeat(factors.reshape(blocks), _BLOCK, axis=1)
    if dtype == "F8_E4M3":
        values = e4m3_values()[codes]
        factors = np.repeat(factors, _BLOCK, axis=0)
    else:
        # Two values a byte, the first in its lower half.
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(shape[0], -1)
        values = np.where(codes & 8, -_E2M1[codes & 7], _E2M1[codes & 7])
    scaled: NDArray[np.float32] = values * factors[: values.shape[0], : values.shape[1]]
    return scaled
