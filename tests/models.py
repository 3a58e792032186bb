"""Models that many tests plan for; their headers are read once in a process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from policy_dsl.inventory import Inventory
from policy_dsl.roles.architecture import architecture, families
from policy_dsl.sources.reference import open_source

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-minimax-m2"
DATA = ROOT / "examples" / "tiny-minimax-m2-data"
IMATRIX = DATA / "imatrix.gguf"
REAP = DATA / "reap.safetensors"


@cache
def tiny() -> Inventory:
    """The embedded MiniMax-M2: 6 layers of 8 experts."""
    return open_source(str(TINY))


@cache
def minimax() -> Inventory:
    """MiniMax-M2.7 by its recorded headers: 62 layers of 256 experts."""
    return open_source("MiniMax-M2.7")


def families_of(target: str) -> Mapping[str, str | None]:
    """Every family -> None if a format takes it, else the reason why not."""
    return {family: architecture(family).refusal(target) for family in families()}
