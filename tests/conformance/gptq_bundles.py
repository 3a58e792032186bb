"""Packed bundles: what their linears decode to, and the same model with nothing packed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bundles import Tensor, tensors
from numpy.typing import NDArray
from small_checkpoints import write_folder

from emitters.checkpoints import forms_of
from emitters.gptq.codec import decode
from emitters.gptq.read_config import claims
from policy_dsl.treatments import Coded, coded

Array = NDArray[Any]

_TOLERANCE = 2**-9
_STORED = {"I32": np.int32, "F16": np.float16, "BF16": np.uint16, "F32": np.float32}


class Linear(NamedTuple):
    """One packed linear: its tensors, and what the configuration tells of it."""

    parts: Mapping[str, Array]
    treatment: Coded

    @property
    def columns(self) -> int:
        """How many inputs it has."""
        return int(self.parts["qweight"].shape[0] * 32 // (self.treatment.bits))


def linears(bundle: Path) -> dict[str, Linear]:
    """Name -> packed linear."""
    held = tensors(bundle)
    files = {path.name: path.read_bytes() for path in bundle.glob("*.json")}
    forms = forms_of({name: tensor[:2] for name, tensor in held.items()})
    return {
        name: Linear(
            {part: _array(held[f"{name}.{part}"]) for part in forms[name] if part != "bias"},
            coded(claim.treatment),
        )
        for name, claim in claims(files, forms).items()
    }


def decoded(bundle: Path) -> dict[str, Array]:
    """Name -> float32 values [out, in] of every packed linear, as we decode them."""
    return {
        name: decode(linear.parts, "F32", linear.treatment, linear.columns)
        for name, linear in linears(bundle).items()
    }


def write_plain(bundle: Path, out: Path, values: Mapping[str, Array] | None = None) -> Path:
    """The checkpoint with plain weights instead of packed ones, and nothing beside it.

    values: of the packed linears by name, exact in float16; ours if None.
    """
    values = decoded(bundle) if values is None else values
    held = {
        name: (tensor[0], _array(tensor))
        for name, tensor in tensors(bundle).items()
        if name.rpartition(".")[0] not in values or name.endswith(".bias")
    }
    for name, weight in values.items():
        narrow = weight.astype(np.float16)
        assert np.array_equal(narrow.astype(np.float32), weight)
        held[f"{name}.weight"] = "F16", narrow
    config = json.loads((bundle / "config.json").read_text())
    del config["quantization_config"]
    write_folder(out, config, held)
    return out


def assert_close(found: Array, expected: Array) -> None:
    """The same logits but for rounding to float16 in another order, layer by layer.

    A product of the same matrices rounds to within half a step, 2**-12 of it; some ten layers
    of them differed by 0.0012 at most, and 4 bits from the source by 0.27.
    """
    assert found.shape == expected.shape
    assert np.isfinite(expected).all()
    assert np.linalg.norm(found - expected) <= _TOLERANCE * np.linalg.norm(expected)


def assert_likely(tokens: Sequence[int], scores: Array) -> None:
    """No other token is likelier than these, by more than the same rounding."""
    chosen = scores[np.arange(len(tokens)), list(tokens)]
    assert (scores.max(axis=-1) - chosen).max() <= 2 * _TOLERANCE * np.abs(scores).max()


def _array(tensor: Tensor) -> Array:
    dtype, shape, stored = tensor
    return np.frombuffer(stored, _STORED[dtype]).reshape(shape)
