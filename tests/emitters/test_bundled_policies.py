"""Bundles of the bundled policies keep their tensors, whatever happens to the code around them.

tests/golden/bundled_policies.json was recorded by the program of 25ad3e9 from the embedded model:
policy -> [number of tensors, SHA-256 of their names, dtypes, shapes and the hashes of their bytes].
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from policy_dsl.sources.reference import open_source
from policyc.cli import main
from tests.models import DATA, TINY

ROOT = Path(__file__).parents[2]
RECORDED = json.loads((ROOT / "tests" / "golden" / "bundled_policies.json").read_text())
POLICIES = sorted(path.stem for path in (ROOT / "policies").iterdir())
# The embedded model has 8 experts, so that the policy's own number would be too large.
OPTIONS = {
    "hipfire": ["--imatrix", DATA / "imatrix.gguf"],
    "reap": ["--saliency", DATA / "reap.safetensors", "--set", "experts=6"],
}
# One policy of each target; the others are slow.
QUICK = ("config_i", "hipfire_mq4", "jangtq_k", "w4a16")


def digest(folder: Path) -> list[int | str]:
    """Number of tensors, and the digest of them all."""
    (container,) = [path for path in folder.glob("model.*") if path.suffix[1:2] == "m"] or [folder]
    inventory = open_source(str(container))
    rows = []
    for tensor in sorted(inventory.tensors.values(), key=lambda tensor: tensor.name):
        path = container if container.is_file() else folder / (tensor.file or "")
        content = path.read_bytes()[tensor.start : tensor.stop]
        sha256 = hashlib.sha256(content).hexdigest()
        rows.append([tensor.name, tensor.dtype, list(tensor.shape), sha256])
    return [len(rows), hashlib.sha256(json.dumps(rows).encode()).hexdigest()]


@pytest.mark.parametrize(
    "policy",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in POLICIES],
)
def test_tensors_are_those_that_were_always_built(policy: str, tmp_path: Path) -> None:
    options = OPTIONS.get(policy.partition("_")[0], [])
    words = ["build", ROOT / "policies" / f"{policy}.yaml", "--model", TINY, *options]
    assert main([*map(str, words), "-q", "-o", str(tmp_path / "bundle")]) == 0
    assert digest(tmp_path / "bundle") == RECORDED[policy]
