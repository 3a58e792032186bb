"""`config.json`, the copy of its quantization, and the index: from a plan, and read back.

Source: auto-round 0.16.1, its flow without a model; transformers 5.23.0, `save_pretrained`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from emitters.gptq import auto_round, gptq_config
from emitters.gptq.readers import READERS
from emitters.gptq.rule_patterns import Unknown
from emitters.gptq.schemes import READ, Storage
from emitters.gptq.structure import CONFIG, defects
from emitters.gptq.told import Told, read
from emitters.gptq.widths import AUTO_ROUND, GPTQ, Width, default_width, dialect_of
from policy_dsl.formats import Claim, Forms, TensorForm, UnreadError, document
from policy_dsl.plan import Plan
from policy_dsl.reader_config import written_config
from policy_dsl.sources.checkpoint import finite
from policy_dsl.treatments import Coded, Unread

__all__ = ["claims", "defects", "metadata"]

INDEX = "model.safetensors.index.json"
_DIALECTS = {AUTO_ROUND: auto_round, GPTQ: gptq_config}
# What the source's own quantization was.
_DROPPED = ("quantization", "quantization_config", "compression_config")
_PARTS = frozenset({"qweight", "qzeros", "scales"})
_WORD_BITS = 32
_PROJECTION = re.compile(r".*(?:_proj|\.w[123])")


def metadata(plan: Plan) -> dict[str, bytes]:
    """`config.json`, its `quantization_config` once more, and the index of several shards.

    The config is the source's, key by key; then what readers need and it lacks, and at its end
    the new quantization. A single
    shard has no index: its readers look for `model.safetensors`.
    """
    given = written_config(plan, *READERS).items()
    config = {key: finite(value) for key, value in given if key not in _DROPPED}
    default, files = default_width(plan.modules), {}
    if default is not None:
        dialect = _DIALECTS[dialect_of(plan)]
        config["quantization_config"] = dialect.quantization(plan, default)
        files[dialect.SIDECAR] = _json(config["quantization_config"])
    shards = {tensor.file for module in plan.modules for tensor in module.tensors}
    if len(shards) > 1:
        files[INDEX] = _json(_index(plan))
    return {CONFIG: _json(config), **files}


def claims(files: Mapping[str, bytes], forms: Forms) -> dict[str, Claim]:
    """What readers understand of these files: packed module -> scheme, width, shape.

    Linears that they take for packed and that are not are among them, without a shape.
    Raises: ValueError without a config, or if it is another format's.
    """
    described = quantization(files)
    if described is None:
        return {}
    asked = [name for name, parts in forms.items() if _may_be_packed(name, parts)]
    told = _told(described, forms, asked)
    found = {name: _claim(told, name, forms[name]) for name in asked}
    return {name: claim for name, claim in found.items() if claim is not None}


def _told(described: Any, forms: Forms, asked: Collection[str]) -> Told:
    try:
        return read(described, forms.keys(), asked)
    except ValueError as error:
        ours = isinstance(described, Mapping) and described.get("quant_method") in [*_DIALECTS]
        if ours:
            raise UnreadError(str(error)) from None
        raise


def quantization(files: Mapping[str, bytes]) -> Any:
    """What `quantization_config` says, or the sidecar of a tool that writes none; else None."""
    config = document(files, CONFIG)
    for level in (config, config.get("text_config")):
        found = level.get("quantization_config") if isinstance(level, Mapping) else None
        if found is not None:
            return found
    for dialect, file in ((GPTQ, gptq_config.SIDECAR), (AUTO_ROUND, auto_round.SIDECAR)):
        told = document(files, file) if file in files else {}
        # Older releases of AutoGPTQ do not say who they are.
        if "bits" in told:
            return {"quant_method": dialect, **told}
    return None


def _is_packed(parts: Collection[str]) -> bool:
    # Scales without codes were packed too, once.
    return not _PARTS.isdisjoint(parts)


def _may_be_packed(name: str, parts: Collection[str]) -> bool:
    """Whether readers look for the width of a module."""
    return _is_packed(parts) or ("weight" in parts and bool(_PROJECTION.fullmatch(name)))


def _claim(told: Told, name: str, parts: Mapping[str, TensorForm]) -> Claim | None:
    if not _is_packed(parts) and not told.covers:
        return None
    width = told.width(name)
    if width is None:
        return None
    if isinstance(width, Unknown):
        return Claim(Unread(width.reason), (), "")
    numbered = "g_idx" in parts
    stored = Storage(told.version, numbered, numbered and told.act_order)
    scheme = next(scheme for scheme, storage in READ.items() if storage == stored)
    treatment = Coded(scheme, width.bits, width.group_size, width.symmetric, "")
    return Claim(treatment, _shape(width, parts), parts.get("scales", ("F16",))[0])


def _shape(width: Width, parts: Mapping[str, TensorForm]) -> tuple[int, ...]:
    """The logical shape [out, in] that the words tell, empty if there are none."""
    words = parts["qweight"][1] if "qweight" in parts else ()
    # No words are a matrix of any size.
    if len(words) != 2 or 0 in words:
        return ()
    return words[1], words[0] * _WORD_BITS // width.bits


def _index(plan: Plan) -> dict[str, Any]:
    tensors = [tensor for module in plan.modules for tensor in module.tensors]
    places = {tensor.name: tensor.file for tensor in tensors}
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {name: places[name] for name in sorted(places)},
    }


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode()
