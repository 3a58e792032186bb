"""What readers of packed checkpoints stumble over although every tensor has the right size.

Source: vLLM 0.33.0 (its Marlin kernels have the zero point of symmetric groups built in),
auto-round 0.16.1 and gptqmodel 7.7.0 (where they look for a configuration), read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from emitters.checkpoints import CONFIG, document, uneven_experts, wrong_metadata, wrong_tensor
from emitters.gptq.spec import READ, SIDECARS, group_length
from emitters.numerics.gptq import is_grouping, unpack_zeros
from emitters.numerics.value_types import Array
from emitters.tensor_io.read import Source, file_facts
from policy_dsl.diagnostics import Diagnostic, diagnostic
from policy_dsl.formats import Claim, FileContents, ForeignMetadataError, Tensors
from policy_dsl.inventory import TensorInfo
from policy_dsl.roles.architecture import expert_keys
from policy_dsl.roles.config_facts import written_value
from policy_dsl.treatments import Coded

_QUANTIZATION = "quantization_config"
# What the copy must say too; the rest is notes about how it was made.
_SHARED = (
    *("bits", "group_size", "sym", "desc_act", "lm_head", "dynamic", "checkpoint_format"),
    *("packing_format", "block_name_to_quantize", "extra_config"),
)
_CODES = ".qweight"


def defects(
    folder: Path, files: FileContents, tensors: Tensors, claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """What readers would miss, or read without a word of complaint.

    claims: of every packed module, found to be right.
    """
    config = document(files, CONFIG)
    yield from _copies(files, config)
    count = next(filter(None, (written_value(config, key) for key in expert_keys())), None)
    if count is not None:
        yield from uneven_experts(claims, count)
    for name, tensor in tensors.items():
        # Codes that readers take for nothing they know, and leave the linear random.
        if name.endswith(_CODES) and name.removesuffix(_CODES) not in claims:
            yield _wrong(tensor, f"{CONFIG} says that its module is not quantized")


def _copies(files: FileContents, config: Mapping[str, Any]) -> Iterator[Diagnostic]:
    text = config.get("text_config")
    nested = text.get(_QUANTIZATION) if isinstance(text, Mapping) else None
    described = config.get(_QUANTIZATION) or nested
    for file in (name for name in reversed(SIDECARS.values()) if name in files):
        if described is None:
            reason = f"only {file} describes the packed weights; most readers look here"
            yield diagnostic("metadata-elsewhere", file=CONFIG, reason=reason)
            continue
        try:
            copy = document(files, file)
            wrong = [key for key in _SHARED if copy.get(key) != described.get(key)]
        except (ForeignMetadataError, AttributeError):
            reason = "it is not a JSON object, and some readers look there first"
            yield wrong_metadata(file, reason)
            continue
        if wrong:
            reason = f"its {wrong[0]} differs from that in {CONFIG}, and readers look at either"
            yield wrong_metadata(file, reason)


def values(
    folder: Path, _files: FileContents, tensors: Tensors, claims: Mapping[str, Claim]
) -> Iterator[Diagnostic]:
    """Scales and zero points that no kernel computes with as they are described; all are read.

    Raises: PolicyError if a file cannot be read any more.
    """
    files = {tensor.file or "" for tensor in tensors.values()}
    source = Source(folder, file_facts(folder, files))
    for name, claim in claims.items():
        scales, zeros = tensors[f"{name}.scales"], tensors[f"{name}.qzeros"]
        if not np.isfinite(_read(source, scales, np.float16)).all():
            yield _wrong(scales, "a scale is not finite")
        coded = claim.treatment
        if not isinstance(coded, Coded):
            continue
        if coded.symmetric and not _are_middle(_read(source, zeros, np.int32), coded):
            yield _wrong(zeros, "it holds other zero points than those of symmetric groups")
        if not READ[coded.scheme].act_order:
            continue
        g_idx, size = tensors[f"{name}.g_idx"], group_length(coded, claim.shape[-1])
        if not is_grouping(_read(source, g_idx, np.int32), size):
            yield _wrong(g_idx, f"it does not number groups of {size} columns each")


def _are_middle(qzeros: Array, coded: Coded) -> bool:
    zeros = unpack_zeros(qzeros, bits=coded.bits, version=READ[coded.scheme].version)
    return bool((zeros == 1 << (coded.bits - 1)).all())


def _read(source: Source, tensor: TensorInfo, dtype: type[np.generic]) -> Array:
    stored = source.read(tensor.file or "", tensor.start, tensor.nbytes)
    return stored.view(dtype).reshape(tensor.shape)


def _wrong(tensor: TensorInfo, reason: str) -> Diagnostic:
    return wrong_tensor(tensor.file or "", tensor.name, reason)
