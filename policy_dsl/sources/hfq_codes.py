"""The numbers in a hipfire HFQ file: quant codes with their block sizes, and model families.

The one table of them, for the reader here and for whoever writes such files.
Source: Kaden-Schutt/hipfire, crates/hipfire-quantize/src/hfq.rs @ 2b62be6, read as facts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Literal, NamedTuple


class QuantCode(NamedTuple):
    """How a tensor is stored: `nbytes` for every `group` elements, the last group padded.

    Both are 0 where rows are laid out whole, or the size is not known. bits: of a code; 0 if
    they are not known. header: what a block begins with: a scale and the lowest
    value in float32, or a scale or 2**bits levels in float16. rotated: whether a group is
    rotated before it is coded.
    """

    name: str
    group: int = 0
    nbytes: int = 0
    bits: int = 0
    header: Literal["", "line", "scale", "levels"] = ""
    rotated: bool = False


def _line(name: str, group: int, bits: int, *, rotated: bool = False) -> QuantCode:
    return QuantCode(name, group, 8 + group * bits // 8, bits, "line", rotated)


def _levels(name: str, bits: int) -> QuantCode:
    return QuantCode(name, 256, 2 * 2**bits + 32 * bits, bits, "levels", rotated=True)


# Codes from 31 on mean different things to different versions of hipfire: none is known here.
QUANT_CODES: Mapping[int, QuantCode] = MappingProxyType(
    {
        0: QuantCode("Q4F16G64", 64, 36),
        1: QuantCode("F16", 1, 2),
        2: QuantCode("F32", 1, 4),
        3: QuantCode("Q8F16", 32, 34, 8, "scale"),
        4: QuantCode("Q4K", 256, 144),
        5: QuantCode("Q8HFQ"),
        6: _line("HFQ4G256", 256, 4),
        7: _line("HFQ4G128", 128, 4),
        8: _line("HFQ6G256", 256, 6),
        9: _line("HFQ2G256", 256, 2),
        10: _line("HFQ2G128", 128, 2),
        11: _line("HFQ3G256", 256, 3),
        12: _line("HFQ3G128", 128, 3),
        13: _line("MQ4G256", 256, 4, rotated=True),
        14: QuantCode("MQ8G256", 256, 258, 8, "scale", rotated=True),
        15: _line("MQ6G256", 256, 6, rotated=True),
        16: QuantCode("BF16", 1, 2),
        17: _line("MQ3G256", 256, 3, rotated=True),
        18: _line("MQ2G256", 256, 2, rotated=True),
        19: _levels("MQ2G256Lloyd", 2),
        20: _levels("MQ3G256Lloyd", 3),
        21: QuantCode("HFP4G32"),
        # DeepSeek's table from token to expert, plain integers.
        22: QuantCode("U32", 1, 4),
        24: QuantCode("MFP4G32"),
        28: QuantCode("ParoQuantG128"),
        29: QuantCode("ParoQuantG128Tiled"),
        30: _levels("MQ4G256Lloyd", 4),
    }
)

# arch_id -> the family of models, or the kind of sidecar, that a loader takes the file for.
ARCH_FAMILIES: Mapping[int, str] = MappingProxyType(
    {
        0: "LLaMA, Mistral",
        1: "Qwen3",
        5: "Qwen3.5 dense",
        6: "Qwen3.5 MoE",
        7: "Qwen2 dense",
        8: "dots.ocr",
        9: "DeepSeek V4 Flash",
        10: "MiniMax-M2",
        11: "LFM2.5",
        12: "Cohere2-MoE",
        13: "Gemma 4 text",
        14: "Muse Glimmer",
        20: "DFlash draft",
        21: "Qwen3.5 MTP head",
        22: "Gemma 4 EAGLE draft",
        23: "Muse Glimmer draft",
        45: "FLUX.2",
        46: "FLUX.2 text encoder",
        47: "Stable Diffusion UNet",
        255: "toy",
    }
)

_Q8HFQ = 5


def code_name(code: int) -> str:
    """The name of a quant code; `code31` for one that has no settled meaning."""
    known = QUANT_CODES.get(code)
    return known.name if known else f"code{code}"


def stored_nbytes(code: int, shape: Sequence[int]) -> int | None:
    """Bytes of a tensor of this logical shape under a quant code; None if they do not follow."""
    if code == _Q8HFQ:
        return _q8hfq_nbytes(shape)
    known = QUANT_CODES.get(code)
    # Groups run over the flattened tensor; a short last one is stored whole.
    return -(-prod(shape) // known.group) * known.nbytes if known and known.group else None


def _q8hfq_nbytes(shape: Sequence[int]) -> int | None:
    # Each row: a half for every 32 values, the values, then zeros up to 128 bytes.
    if len(shape) != 2 or shape[1] % 32:
        return None
    rows, columns = shape
    return rows * -(-(columns // 16 + columns) // 128) * 128
