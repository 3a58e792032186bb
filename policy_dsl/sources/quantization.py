"""Whether a source was quantized by somebody, told from its config and its tensors' names.

bf16, f16, f32, FP8 with float scales (MiniMax-M2, DeepSeek-V3, Ministral 3) and MXFP4 as
gpt-oss has it are what publishers train and release. The tensors decide; the config describes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.roles.scales import FP8_SUFFIX, find_scales

# How names end in forms that are recognized by one tensor alone, and that are not read.
_ENDINGS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".tq_packed": "mxtq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale_2": "ModelOpt NVFP4",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".trellis": "exllamav3",
    ".q_weight": "exllamav2",
    ".W_q": "HQQ",
    ".codebooks": "AQLM",
}
# Codes in files of their own dtype; E4M3 counts as FP8 only with its scales.
_DTYPES = {
    "F4": "4-bit floats",
    "F6_E2M3": "6-bit floats",
    "F6_E3M2": "6-bit floats",
    "F8_E5M2": "FP8 E5M2",
    "F8_E4M3FNUZ": "FP8 E4M3FNUZ",
    "F8_E5M2FNUZ": "FP8 E5M2FNUZ",
}
_FP8, _MXFP4 = "FP8", "MXFP4"
# Methods whose name says that the publisher's own codes are there.
_NATIVE = {"fp8": _FP8, "fbgemm_fp8": _FP8, "mxfp4": _MXFP4}
# Files beside the weights in which tools describe what they made.
_SIDECARS = {
    "hf_quant_config.json": "ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "jang_config.json": "JANG",
}
_PLACES = ("text_config", "llm_config", "language_config")
_KEYS = ("quantization_config", "quantization", "compression_config")
_FACTS = ("mode", "bits", "group_size", "format", "fmt", "quant_algo")


class Quantization(NamedTuple):
    """How a source is quantized, for people, and whether its numbers can be read.

    read: yes; if it is allowed, because nothing says what they are; or no.
    """

    form: str
    read: Literal["yes", "if allowed", "no"]

    def finding(self, model: str, *, allowed: bool) -> Diagnostic:
        """The finding about a model: a warning if it is taken. allowed: by the user."""
        if self.read == "yes" or (allowed and self.read == "if allowed"):
            return diagnostic("requantized", model=model, form=self.form)
        cure = "take the original checkpoint, or dequantize it first: this form is not read"
        if self.read == "if allowed":
            cure = "take the original checkpoint, or --allow-requantize"
        return diagnostic("already-quantized", suggestion=cure, model=model, form=self.form)


def quantization_of(inventory: Inventory) -> Quantization | None:
    """How the source is quantized; None if it has its full or native precision.

    A container's config is the original checkpoint's and tells nothing.
    """
    if inventory.container is not None:
        return Quantization(inventory.container.form, "no")
    said, shown = _said(inventory.config), _shown(inventory.tensors)
    native = _NATIVE.get(str(said.get("quant_method")).lower())
    shown.pop(native or "", None)
    # Forms that are not read decide, also beside others.
    form = min(shown, key=(_FP8, _MXFP4).count, default=None)
    if form is None:
        return None
    tensor = shown[form]
    untold = f"{form}: {tensor.name} is {tensor.dtype}, and the config does not say so"
    teller = {} if native else said
    if form in (_FP8, _MXFP4):
        return _readable(form, teller, untold, inventory)
    described = _described(teller) if teller else _by_sidecar(inventory)
    return Quantization(described or untold, "no")


def _readable(
    form: str, said: Mapping[str, Any], untold: str, inventory: Inventory
) -> Quantization:
    """The form of numbers that can be read, though not as a publisher releases them."""
    tool = said.get("quant_method") or _by_sidecar(inventory)
    if form == _FP8 and tool:
        return Quantization(f"{_FP8} by {tool}", "yes")
    # Without a size of blocks the user's word does not help.
    broken = form == _FP8 and find_scales(inventory).findings
    return Quantization(untold, "no" if broken else "if allowed")


def leftover(inventory: Inventory) -> Iterator[Diagnostic]:
    """A warning if the config describes a quantization that no tensor shows.

    Tools that merge or dequantize leave the entry of what they started from.
    """
    said = {} if inventory.container else _said(inventory.config)
    if said and not _shown(inventory.tensors):
        cure = "remove the entry from config.json; the weights are taken as they are"
        form = _described(said)
        yield diagnostic("quantization-not-shown", suggestion=cure, model=inventory.id, form=form)


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


def _by_sidecar(inventory: Inventory) -> str | None:
    there = (file for file in _SIDECARS if file in (inventory.side_files or {}))
    file = next(there, None)
    return f"{_SIDECARS[file]}, as {file} says" if file else None


def _described(said: Mapping[str, Any]) -> str:
    method = said.get("quant_method")
    if method is None:
        method = "MLX" if "group_size" in said else "a quantization that the config names"
    facts = ", ".join(f"{fact} {said[fact]}" for fact in _FACTS if fact in said)
    return f"{method} ({facts})" if facts else str(method)


def _shown(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The quantized forms that tensors show by themselves, with the first of each."""
    found: dict[str, TensorInfo] = {}
    for tensor in tensors.values():
        form = _form(tensor, tensors)
        if form is not None:
            found.setdefault(form, tensor)
    return found


def _form(tensor: TensorInfo, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The quantized form that a tensor belongs to, as far as it shows by itself."""
    name, dtype = tensor.name, tensor.dtype
    if dtype == "F8_E4M3":
        return _FP8
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype in ("U8", "I8"):
        return _bytes_form(name, dtype, tensors)
    # Packed words; a lone U32 tensor could be anything, its scales tell.
    if dtype == "U32" and name.removesuffix("weight") + "scales" in tensors:
        return "MLX"
    return _ENDINGS.get(name[name.rfind(".") :])


def _bytes_form(name: str, dtype: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The form of a tensor of bytes, by what is beside it."""
    if name.endswith("_blocks"):
        return _MXFP4
    if f"{name}{FP8_SUFFIX}" in tensors:
        return _FP8
    if f"{name}_scale" in tensors:
        return "8-bit integers" if dtype == "I8" else "packed bytes with scales"
    return _ENDINGS.get(name[name.rfind(".") :])
