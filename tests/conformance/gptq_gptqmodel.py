"""The peer: what GPTQModel reads from a packed checkpoint, alone or below transformers.

Runs in an interpreter of its own (`gptq_peers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gptq_transformers
import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from numpy.typing import NDArray
from transformers import GPTQConfig

Array = NDArray[Any]


def logits(model: Path, prompt: Sequence[int], dtype: str) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] of a checkpoint that transformers loads."""
    return gptq_transformers.logits(model, prompt, dtype, quantization_config=_torch_kernel())


def missing(model: Path, dtype: str) -> list[str]:
    """Parameters that transformers does not find in a checkpoint."""
    return gptq_transformers.missing(model, dtype, quantization_config=_torch_kernel())


def written(model: Path, prompt: Sequence[int], count: int, dtype: str) -> list[int]:
    """The `count` likeliest tokens that transformers continues the prompt with."""
    options = {"quantization_config": _torch_kernel()}
    return gptq_transformers.written(model, prompt, count, dtype, **options)


def own_logits(model: Path, prompt: Sequence[int], dtype: str) -> NDArray[np.float32]:
    """Logits [tokens, vocabulary] of a checkpoint that GPTQModel loads."""
    return gptq_transformers.logits_of(_loaded(model, dtype), prompt)


def own_written(model: Path, prompt: Sequence[int], count: int, dtype: str) -> list[int]:
    """The `count` likeliest tokens that GPTQModel continues the prompt with."""
    return gptq_transformers.written_by(_loaded(model, dtype), prompt, count)


def unpacked(linears: Sequence[tuple[Mapping[str, Array], int, int, str]]) -> list[Array]:
    """float32 values [out, in] of packed linears, by GPTQModel's own layer.

    Each is given as its parts, bits, group size (-1 for whole rows), version of zero points.
    """
    return [_unpacked(*linear) for linear in linears]


def _unpacked(parts: Mapping[str, Array], bits: int, group_size: int, version: str) -> Array:
    rows, columns = parts["qweight"].shape[1], parts["qweight"].shape[0] * 32 // bits
    layer = TorchLinear(
        bits=bits,
        group_size=group_size,
        sym=False,
        desc_act=False,
        in_features=columns,
        out_features=rows,
        pack_dtype=torch.int32,
    )
    held = {name: torch.from_numpy(part.copy()) for name, part in parts.items()}
    layer.load_state_dict(held, strict=False)
    if version == "gptq":
        convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    layer.post_init()
    layer.eval()
    with torch.inference_mode():
        return layer.dequantize_weight().T.float().contiguous().numpy()


def _torch_kernel() -> GPTQConfig:
    # The kernel that it takes by itself is built from C++ first, for minutes.
    return GPTQConfig(bits=4, backend="gptq_torch")


def _loaded(model: Path, dtype: str) -> Any:
    wanted = getattr(torch, dtype)
    backend = BACKEND.GPTQ_TORCH
    return GPTQModel.load(str(model), backend=backend, device="cpu", dtype=wanted).model
