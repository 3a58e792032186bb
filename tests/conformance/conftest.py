"""Checkpoints made once a session, builds through the command line, and the peer."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from model_kinds import Checkpoint

from policy_dsl.cli import main

pytest.register_assert_rewrite("stock_mlx_lm", "jang_bundles")
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "tiny-minimax-m2"


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


@pytest.fixture(scope="session")
def jang() -> Iterator[Callable[..., Any]]:
    """Calls a function of `jang_peer.py` by its name, in an interpreter of its own.

    With `alone=True` that interpreter has loaded no bundle before and is not used again.
    """
    peer = pytest.importorskip("jang_peer")
    # What is forked would share the threads of mlx.
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as opened:
        shared = opened.enter_context(ProcessPoolExecutor(1, spawn))

        def call(name: str, *arguments: Any, alone: bool = False) -> Any:
            function = getattr(peer, name)
            if not alone:
                return shared.submit(function, *arguments).result()
            with ProcessPoolExecutor(1, spawn) as fresh:
                return fresh.submit(function, *arguments).result()

        yield call


@pytest.fixture(scope="session")
def jang_source(
    checkpoint: Callable[[str], Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """A checkpoint that jang's converter can read: the embedded model, or one of our kinds."""
    sources = pytest.importorskip("jang_sources")
    made = {"embedded_fp8": EXAMPLE}

    def get(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("jang_source") / name
            made[name] = (
                sources.widened(EXAMPLE, out)
                if name == "embedded_bf16"
                else sources.regrouped(checkpoint(name).published, out)
            )
        return made[name]

    return get


@pytest.fixture(scope="session")
def jangtq(
    jang_source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Builds a policy's text for a source of `jang_source`, each only once; the bundle."""
    pytest.importorskip("jang_tools")
    made: dict[tuple[str, str], Path] = {}

    def build_once(source: str, policy: str) -> Path:
        if (source, policy) not in made:
            folder = tmp_path_factory.mktemp("jangtq")
            (folder / "policy.qpol").write_text(f"target jangtq_prestack\n{policy}\n")
            words = ["build", str(folder / "policy.qpol"), "--model", str(jang_source(source))]
            assert main([*words, "-o", str(folder / "built"), "-q"]) == 0
            made[source, policy] = folder / "built"
        return made[source, policy]

    return build_once


@pytest.fixture
def jang_refusals(
    jang_source: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], list[str]]:
    """Why jang cannot load what a policy's text makes of a source, as its plan says."""

    def plan(source: str, policy: str) -> list[str]:
        path = tmp_path / "policy.qpol"
        path.write_text(f"target jangtq_prestack\n{policy}\n")
        capsys.readouterr()
        words = ["plan", str(path), "--model", str(jang_source(source)), "--format", "json"]
        assert main(words) == 0
        refusals = json.loads(capsys.readouterr().out)["refusals"]
        return [one["reason"] for one in refusals if one["runtime"] == "jang"]

    return plan
