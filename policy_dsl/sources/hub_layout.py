"""How transformers lays a checkpoint out: names of shards, odd numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def shard_name(number: int, count: int) -> str:
    """The file name of a shard, counted from 1; a single one has no number."""
    if count == 1:
        return "model.safetensors"
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def finite(value: Any) -> Any:
    """A config's value with floats that JSON lacks written as transformers writes them."""
    if isinstance(value, float) and not math.isfinite(value):
        signed = "Infinity" if value > 0 else "-Infinity"
        return {"__float__": "NaN" if math.isnan(value) else signed}
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
