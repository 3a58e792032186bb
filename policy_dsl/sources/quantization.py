"""Whether a source was quantized by somebody, told from its config and its tensors' names.

bf16, f16, f32, FP8 with block scales (MiniMax-M2, DeepSeek-V3) and MXFP4 as gpt-oss has it are
what publishers train and release; every other form has lost precision on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policy_dsl.inventory import Inventory, TensorInfo

# How names end in forms that are recognized by one tensor alone.
_ENDINGS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".tq_packed": "mxtq",
    ".weight_packed": "compressed-tensors",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
}
_PLACES = ("text_config", "llm_config", "language_config")
_KEYS = ("quantization_config", "quantization", "compression_config")
_FACTS = ("mode", "bits", "group_size", "format", "fmt", "quant_algo")


def quantization_of(inventory: Inventory) -> str | None:
    """How the source is quantized, for people; None if it has its full or native precision.

    A container's config is the original checkpoint's and tells nothing. Of other sources the
    config is asked first; what it forgets to say, the names and dtypes of tensors tell.
    """
    if inventory.container is not None:
        return inventory.container.form
    said = _said(inventory.config)
    native = _native(said)
    if said and native is None:
        return _described(said)
    tensors = inventory.tensors
    for tensor in tensors.values():
        form = _form(tensor, tensors)
        if form is not None and form != native:
            return f"{form}: {tensor.name} is {tensor.dtype}, and the config does not say so"
    return None


def _said(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the config, or its language model's part, declares; empty if nothing."""
    parts = [config, *(config.get(place) for place in _PLACES)]
    # Models with vision keep their language model's settings one level down.
    for part in parts:
        for key in _KEYS:
            found = part.get(key) if isinstance(part, Mapping) else None
            if found:
                return found if isinstance(found, Mapping) else {"quant_method": str(found)}
    return {}


def _native(said: Mapping[str, Any]) -> str | None:
    """`FP8` or `MXFP4` if the config declares a native release in that form."""
    method = str(said.get("quant_method")).lower()
    block = said.get("weight_block_size")
    if method == "fp8" and isinstance(block, list) and len(block) == 2:
        return "FP8"
    return "MXFP4" if method == "mxfp4" else None


def _described(said: Mapping[str, Any]) -> str:
    method = said.get("quant_method")
    if str(method).lower() == "fp8":
        return "FP8 without weight_block_size: its scales are per tensor or per row"
    if method is None:
        method = "MLX" if "group_size" in said else "a quantization that the config names"
    facts = ", ".join(f"{fact} {said[fact]}" for fact in _FACTS if fact in said)
    return f"{method} ({facts})" if facts else str(method)


def _form(tensor: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The quantized form that a tensor belongs to, as far as it shows by itself."""
    name, dtype = tensor.name, tensor.dtype
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return "FP8"
    if dtype == "F4":
        return "4-bit floats"
    if dtype == "U8" and name.endswith("_blocks"):
        return "MXFP4"
    # Packed words; a lone U32 tensor could be anything, its scales tell.
    if dtype == "U32" and name.removesuffix("weight") + "scales" in tensors:
        return "MLX"
    return _ENDINGS.get(name[name.rfind(".") :])
