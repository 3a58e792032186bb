"""JANGTQ bundles: what of them jang's loader must hold, and which files two of them share."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bundles import Tensor, tensors
from safetensors import deserialize

INDEX = "model.safetensors.index.json"
RECORD = "policyc.json"

_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)$")
_SHORT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_PARTS = {"tq_packed": "packed", "tq_norms": "norms"}


def ran(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """What a command of jang says."""
    command = [sys.executable, "-m", f"jang_tools.{module}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def parameters(bundle: Path) -> dict[str, Tensor]:
    """The parameters of the model that the bundle is, by the names of mlx-lm's modules.

    Experts that lie apart are stacked in the order of their numbers.
    """
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors(bundle).items():
        path, _, part = name.rpartition(".")
        if part == "tq_bits":
            continue
        match = _EXPERT.match(path)
        if match is None:
            found[f"{path}.{_PARTS.get(part, part)}"] = tensor
        else:
            stack = f"{match[1]}.switch_mlp.{_SHORT.get(match[3], match[3])}.{_PARTS[part]}"
            apart.setdefault(stack, {})[int(match[2])] = tensor
    return found | {name: _stacked(experts) for name, experts in apart.items()}


def modules(bundle: Path) -> dict[str, tuple[str, int, int]]:
    """Class, bits, and group size or row length of every quantized module in jang's loader."""
    config = read(bundle, "config.json")
    default = config["quantization"]
    expert_width = config.get("moe_intermediate_size") or config["intermediate_size"]
    held, codes = tensors(bundle), coded(bundle)
    found = {}
    for path, bits in codes.items():
        columns = expert_width if path.endswith("down_proj") else config["hidden_size"]
        found[path] = "TurboQuantSwitchLinear", bits, columns
    for name in held:
        path, _, part = name.rpartition(".")
        if part == "scales":
            entry = default.get(path, default)
            kind = "Embedding" if path.endswith("embed_tokens") else "Linear"
            kind = "SwitchLinear" if ".switch_mlp." in path else kind
            found[path] = f"Quantized{kind}", entry["bits"], entry["group_size"]
    return found


def coded(bundle: Path) -> dict[str, int]:
    """Stack of mxtq codes -> its width, as `tq_bits` tells it."""
    found = {}
    for name, (_, _, stored) in tensors(bundle).items():
        path, _, part = name.rpartition(".")
        if part == "tq_bits":
            match = _EXPERT.match(path)
            if match is not None:
                path = f"{match[1]}.switch_mlp.{_SHORT.get(match[3], match[3])}"
            assert found.setdefault(path, stored[0]) == stored[0]
    return found


def sidecar(bundle: Path) -> dict[str, Tensor]:
    """The tables of signs and codebooks beside a bundle's shards."""
    stored = (bundle / "jangtq_runtime.safetensors").read_bytes()
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in deserialize(stored)
    }


def files(bundle: Path) -> dict[str, bytes]:
    """All files of a bundle but the index and the record of its build."""
    return {
        path.name: path.read_bytes()
        for path in sorted(bundle.iterdir())
        if path.name not in (INDEX, RECORD)
    }


def read(bundle: Path, name: str) -> dict[str, Any]:
    """A JSON file of a bundle."""
    return dict(json.loads((bundle / name).read_text()))


def assert_equal_files(ours: Path, theirs: Path) -> None:
    """Same files, byte for byte, and an index that says the same of them."""
    built, expected = files(ours), files(theirs)
    assert built.keys() == expected.keys()
    assert [name for name in built if built[name] != expected[name]] == []
    found, wanted = read(ours, INDEX), read(theirs, INDEX)
    assert list(found["weight_map"].items()) == list(wanted["weight_map"].items())
    for metadata in (found["metadata"], wanted["metadata"]):
        # A path, and a size that the converter sums when nothing is left to sum.
        metadata.pop("rebundled_from", None)
        if "rebundled_layout" not in metadata:
            del metadata["total_size"]
    assert found["metadata"] == wanted["metadata"]


def assert_held(loaded: Any, bundle: Path, expected: Mapping[str, Tensor]) -> None:
    """The model that jang loaded has these parameters and no others; all codes were used."""
    assert loaded.parameters.keys() == expected.keys()
    wrong = [name for name in expected if loaded.parameters[name] != expected[name]]
    assert wrong == []
    assert f"Replaced {len(coded(bundle))} modules" in loaded.log


def _stacked(experts: Mapping[int, Tensor]) -> Tensor:
    held = [experts[number] for number in range(len(experts))]
    ((dtype, shape),) = {tensor[:2] for tensor in held}
    return dtype, (len(held), *shape), b"".join(tensor[2] for tensor in held)
