"""Whether a source was quantized by somebody, by its config and its tensors' names.

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
_FP8, _MXFP4 = "FP8", "MXFP4"
# Codes in files of their own dtype; E4M3 counts as FP8 only with its scales.
_DTYPES = {
    "F4": "4-bit floats",
    "F6_E2M3": "6-bit floats",
    "F6_E3M2": "6-bit floats",
    "F8_E4M3": _FP8,
    "F8_E5M2": "FP8 E5M2",
    "F8_E4M3FNUZ": "FP8 E4M3FNUZ",
    "F8_E5M2FNUZ": "FP8 E5M2FNUZ",
}
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

    A container's config is the original checkpoint's and says nothing.
    """
    if inventory.container is not None:
        return Quantization(inventory.container.form, "no")
    entry, forms = _declared(inventory.config), _forms(inventory.tensors)
    native = _NATIVE.get(str(entry.get("quant_method")).lower())
    forms.pop(native or "", None)
    # Forms that are not read decide, also beside others.
    form = min(forms, key=(_FP8, _MXFP4).count, default=None)
    if form is None:
        return None
    tensor = forms[form]
    undeclared = f"{form}: {tensor.name} is {tensor.dtype}, and the config does not say so"
    entry = {} if native else entry
    if form not in (_FP8, _MXFP4):
        described = _described(entry) if entry else _by_sidecar(inventory)
        return Quantization(described or undeclared, "no")
    tool = entry.get("quant_method") or _by_sidecar(inventory)
    if form == _FP8 and tool:
        return Quantization(f"{_FP8} by {tool}", "yes")
    # Without a size of blocks the user's word does not help.
    is_broken = form == _FP8 and find_scales(inventory).findings
    return Quantization(undeclared, "no" if is_broken else "if allowed")


def leftover(inventory: Inventory) -> Iterator[Diagnostic]:
    """A warning if the config describes a quantization that no tensor shows."""
    # Tools that merge or dequantize leave the entry of what they started from.
    entry = {} if inventory.container else _declared(inventory.config)
    if entry and not _forms(inventory.tensors):
        cure = "remove the entry from config.json; the weights are taken as they are"
        form = _described(entry)
        yield diagnostic("quantization-not-shown", suggestion=cure, model=inventory.id, form=form)


def _declared(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the config, or its language model's part, declares; empty if nothing."""
    # Models with vision keep their language model's settings one level down.
    for part in (config, *(config.get(place) for place in _PLACES)):
        settings = part if isinstance(part, Mapping) else {}
        for key in _KEYS:
            if entry := settings.get(key):
                return entry if isinstance(entry, Mapping) else {"quant_method": str(entry)}
    return {}


def _by_sidecar(inventory: Inventory) -> str | None:
    file = next((file for file in _SIDECARS if file in (inventory.side_files or {})), None)
    return f"{_SIDECARS[file]}, as {file} says" if file else None


def _described(entry: Mapping[str, Any]) -> str:
    method = entry.get("quant_method")
    if method is None:
        method = "MLX" if "group_size" in entry else "a quantization that the config names"
    facts = ", ".join(f"{fact} {entry[fact]}" for fact in _FACTS if fact in entry)
    return f"{method} ({facts})" if facts else str(method)


def _forms(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The quantized forms that tensors show by themselves, with the first of each."""
    forms: dict[str, TensorInfo] = {}
    for tensor in tensors.values():
        form = _form(tensor.name, tensor.dtype, tensors)
        if form is not None:
            forms.setdefault(form, tensor)
    return forms


def _form(name: str, dtype: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The quantized form that a tensor belongs to, as far as it shows by itself."""
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype in ("U8", "I8"):
        if name.endswith("_blocks"):
            return _MXFP4
        if f"{name}{FP8_SUFFIX}" in tensors:
            return _FP8
        if f"{name}_scale" in tensors:
            return "8-bit integers" if dtype == "I8" else "packed bytes with scales"
    # Packed words; a lone U32 tensor could be anything, its scales decide.
    elif dtype == "U32" and name.removesuffix("weight") + "scales" in tensors:
        return "MLX"
    return _ENDINGS.get(name[name.rfind(".") :])
