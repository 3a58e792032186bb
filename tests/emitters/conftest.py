"""A small Llama on disk, and plans of policies for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_checkpoints import Array, llama_config, llama_tensors, write_folder

from policy_dsl.inventory import Inventory
from policy_dsl.language.load import load
from policy_dsl.plan import Plan
from policy_dsl.sources.reference import open_source
from policyc.workflow import plan_for

ROOT = Path(__file__).parents[2]
SIZES = {"layers": 2, "hidden": 64, "inner": 128, "vocabulary": 96}
FOUR_BITS = "name: four_bits\ntarget: mlx_affine\nrules: |\n  all: 4bit\n  norm: keep\n"


@pytest.fixture
def write_llama(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small Llama to a folder: change(tensors) may alter it before, in one shard."""

    def write(
        change: Callable[[dict[str, tuple[str, Array]]], None] | None = None,
        *,
        name: str = "source",
        **sizes: int,
    ) -> Path:
        tensors = llama_tensors(**{**SIZES, **sizes})
        if change is not None:
            change(tensors)
        folder = tmp_path / name
        write_folder(folder, llama_config(**{**SIZES, **sizes}), tensors)
        (folder / "tokenizer.json").write_text('{"model": {}}')
        (folder / "LICENSE").write_text("Do what you like.\n")
        (folder / "notes.md").write_text("Not part of a bundle.\n")
        return folder

    return write


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., tuple[Plan, Inventory]]:
    """Plans a policy, a bundled name or YAML text, for a checkpoint folder.

    imatrix, saliency: files of statistics of the model, for policies that need them.
    """

    def make(
        source: Path,
        policy: str = FOUR_BITS,
        *,
        imatrix: Path | None = None,
        saliency: Path | None = None,
        **overrides: str,
    ) -> tuple[Plan, Inventory]:
        reference: str | Path = policy
        if "\n" in policy:
            reference = tmp_path / "policy.yaml"
            reference.write_text(policy)
        inventory = open_source(str(source))
        read = load(reference, variables=overrides)
        named = {"imatrix": imatrix, "saliency": saliency}
        given = {name: str(path) for name, path in named.items() if path is not None}
        return plan_for(read, inventory, None, statistics=given), inventory

    return make


@pytest.fixture
def demo() -> Path:
    """The embedded model."""
    return ROOT / "examples" / "tiny-minimax-m2"


@pytest.fixture
def saliency() -> Path:
    """What ranks the experts of the embedded model."""
    return ROOT / "examples" / "tiny-minimax-m2-data" / "reap.safetensors"


@pytest.fixture
def imatrix() -> Path:
    """The importance matrix of the embedded model."""
    return ROOT / "examples" / "tiny-minimax-m2-data" / "imatrix.gguf"
