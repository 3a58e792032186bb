"""The peer: what AutoRound writes for a checkpoint, and what it reads from a packed one.

Runs in an interpreter of its own (`gptq_peers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from gptq_transformers import logits, missing, written
from numpy.typing import NDArray

__all__ = ["convert", "convert_error", "logits", "missing", "unpacked", "written"]

Array = NDArray[Any]

# Version of zero points -> the kernel that reads them.
_KERNELS = {"gptq": qlinear_torch_zp.QuantLinear, "gptq_v2": qlinear_torch.QuantLinear}


def convert(
    source: Path, out: Path, scheme: Mapping[str, Any], *, with_model: bool = False
) -> Path:
    """The folder that AutoRound writes when it rounds a checkpoint to nearest.

    scheme: its name and what differs from it. with_model: by the flow that loads the model.
    """
    route = {"disable_model_free": True, "iters": 0} if with_model else {"model_free": True}
    # Compiled code keeps float16 steps in float32: asymmetric zero points come out otherwise.
    rounding = AutoRound(
        str(source), **scheme, **route, disable_opt_rtn=True, enable_torch_compile=False
    )
    rounding.quantize_and_save(str(out), format="auto_round")
    (config,) = out.rglob("config.json")
    return config.parent


def convert_error(source: Path, out: Path, scheme: Mapping[str, Any]) -> str:
    """What the flow without a model says when it fails."""
    try:
        convert(source, out, scheme)
    except ValueError as error:
        return str(error)
    return ""


def unpacked(linears: Sequence[tuple[Mapping[str, Array], int, int, str]]) -> list[Array]:
    """float32 values [out, in] of packed linears, by AutoRound's own kernel.

    Each is given as its parts, bits, group size (-1 for whole rows), version of zero points.
    """
    return [_unpacked(*linear) for linear in linears]


def _unpacked(parts: Mapping[str, Array], bits: int, group_size: int, version: str) -> Array:
    rows, columns = parts["qweight"].shape[1], parts["qweight"].shape[0] * 32 // bits
    held = {name: torch.from_numpy(part.copy()) for name, part in parts.items()}
    kernel = _KERNELS[version](bits, group_size, columns, rows, bias=False)
    kernel.load_state_dict(held)
    with torch.inference_mode():
        # Each product has one term that is not zero: nothing is rounded again.
        return kernel(torch.eye(columns)).T.contiguous().numpy()
