"""Checkpoints made once a session, builds through the command line, and the peer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from model_kinds import Checkpoint

from policy_dsl.cli import main

pytest.register_assert_rewrite("stock_mlx_lm")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def stock() -> ModuleType:
    """Stock mlx-lm, as `stock_mlx_lm.py` shows it. Imported late: it is heavy."""
    return pytest.importorskip("stock_mlx_lm")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The checkpoint of a kind of `model_kinds.KINDS`, made when first asked for."""
    checkpoints = pytest.importorskip("checkpoints")
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = checkpoints.make_checkpoint(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def build(tmp_path: Path) -> Callable[[str, Path], Path]:
    """Builds a policy, the name of a bundled one or a text, for a source; the bundle."""

    def run(policy: str, source: Path) -> Path:
        path = ROOT / "policies" / f"{policy}.yaml"
        if "\n" in policy:
            path = tmp_path / "policy.qpol"
            path.write_text(policy)
        out = tmp_path / "built"
        code = main(["build", str(path), "--model", str(source), "-o", str(out), "-q"])
        assert code == 0
        return out

    return run
