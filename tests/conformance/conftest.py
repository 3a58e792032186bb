"""Checkpoints made once a session, builds through the command line, and the peer."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gptq_peers import interpreter
from model_kinds import Checkpoint

from policyc.cli import main

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


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A model of `config_forms.MODELS` in every form, made when first asked for."""
    config_forms = pytest.importorskip("config_forms")
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = config_forms.make_forms(name, tmp_path_factory.mktemp(name))
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


@pytest.fixture(scope="session")
def auto_round() -> Iterator[Callable[..., Any]]:
    """Calls a function of `gptq_auto_round.py` by its name, in an interpreter of its own."""
    if find_spec("auto_round") is None:
        pytest.skip("auto-round is not installed")
    with interpreter("gptq_auto_round") as call:
        yield call


@pytest.fixture(scope="session")
def gptqmodel() -> Iterator[Callable[..., Any]]:
    """Calls a function of `gptq_gptqmodel.py` by its name, in an interpreter of its own.

    With `alone=True` in one where transformers loads nothing: GPTQModel replaces its experts.
    """
    for package in ("gptqmodel", "optimum"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: it wants a newer torch, see .ci/run")
    # Its pool of threads fails on few cores, and compiling takes longer than all the rest.
    quick = {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}
    with ExitStack() as opened:
        module = "gptq_gptqmodel"
        first, second = (
            opened.enter_context(interpreter(module, **quick)) for _ in ("shared", "alone")
        )

        def call(name: str, *arguments: Any, alone: bool = False) -> Any:
            return (second if alone else first)(name, *arguments)

        yield call


@pytest.fixture(scope="session")
def stock_transformers() -> Iterator[Callable[..., Any]]:
    """Calls a function of `gptq_transformers.py`, in an interpreter with no other package."""
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    with interpreter("gptq_transformers") as call:
        yield call


@pytest.fixture(scope="session")
def gptq(
    checkpoint: Callable[[str], Checkpoint], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Builds a policy's text for a kind or a folder, each only once; the bundle."""
    made: dict[tuple[str | Path, str], Path] = {}

    def build_once(source: str | Path, policy: str) -> Path:
        if (source, policy) not in made:
            found = checkpoint(source).published if isinstance(source, str) else source
            folder = tmp_path_factory.mktemp("gptq")
            (folder / "policy.qpol").write_text(f"target gptq\n{policy}\n")
            words = ["build", str(folder / "policy.qpol"), "--model", str(found)]
            assert main([*words, "-o", str(folder / "built"), "-q"]) == 0
            made[source, policy] = folder / "built"
        return made[source, policy]

    return build_once


@pytest.fixture
def gptq_refusals(
    checkpoint: Callable[[str], Checkpoint], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], dict[str, str]]:
    """Readers that cannot load what a policy's text makes of a kind, with their reasons."""

    def plan(kind: str, policy: str) -> dict[str, str]:
        path, source = tmp_path / "planned.qpol", checkpoint(kind).published
        path.write_text(f"target gptq\n{policy}\n")
        capsys.readouterr()
        assert main(["plan", str(path), "--model", str(source), "--format", "json"]) == 0
        found: dict[str, str] = {}
        for one in json.loads(capsys.readouterr().out)["refusals"]:
            found[one["runtime"]] = "\n".join([found.get(one["runtime"], ""), one["reason"]])
        return found

    return plan
