"""Settings in the environment and the current folder: an error in words, or the same result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from policyc.cli import main
from tests.models import TINY

ROOT = Path(__file__).parents[3]
PROGRAM = "from policyc.cli import main; exit(main())"
POLICY = "target mlx_affine\nall: 8bit\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surroundings")
    policy = folder / "p.qpol"
    policy.write_text(POLICY, encoding="utf-8")
    out = folder / "bundle"
    assert main(["build", str(policy), "--model", str(TINY), "-o", str(out), "-q"]) == 0
    return out


def python(
    program: str, *words: str, cwd: Path, **settings: str | None
) -> subprocess.CompletedProcess[str]:
    """What a program did with these settings in its environment; None takes one away."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=cwd,
        env={name: value for name, value in env.items() if value is not None},
        capture_output=True,
        text=True,
        check=False,
    )


def policyc(*words: object, cwd: Path, **settings: str | None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command with these settings; None takes one away."""
    ran = python(PROGRAM, *map(str, words), cwd=cwd, **settings)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.returncode, ran.stdout, ran.stderr


@pytest.mark.parametrize(
    "settings", [{"NUMBA_NUM_THREADS": "0"}, {"NUMBA_DISABLE_JIT": "1"}], ids=str
)
def test_settings_under_which_numba_cannot_work(settings: dict[str, str], bundle: Path) -> None:
    code, _, said = policyc("verify", bundle, cwd=bundle.parent, **settings)
    assert code == 2
    assert said.startswith("error[numba-unusable]: ")
    assert f"unset or correct {next(iter(settings))} in the environment\n" in said
    # No kernel is needed to plan.
    code, _, _ = policyc("plan", "p.qpol", "--model", TINY, cwd=bundle.parent, **settings)
    assert code == 0


@pytest.mark.slow
def test_settings_that_change_nothing(bundle: Path, tmp_path: Path) -> None:
    settings = {
        "NUMBA_NUM_THREADS": "abc",
        "NUMBA_THREADING_LAYER": "nonsense",
        "NUMBA_CPU_NAME": "nonsense",
        "NUMBA_CACHE_DIR": str(bundle / "config.json"),
        "OMP_NUM_THREADS": "junk",
        "COLUMNS": "-5",
        "LINES": "x",
        "TERM": "",
        "TMPDIR": str(tmp_path / "missing"),
        "HOME": None,
        "LANG": "C",
        "PYTHONIOENCODING": "ascii:strict",
    }
    words = ["build", bundle.parent / "p.qpol", "--model", TINY, "-o", tmp_path / "b", "-q"]
    code, _, said = policyc(*words, cwd=tmp_path, **settings)
    assert code == 0, said
    built = {path.name: path.read_bytes() for path in bundle.glob("*.safetensors")}
    assert built == {name: (tmp_path / "b" / name).read_bytes() for name in built}


def test_numba_settings_in_a_folder_of_strangers_are_not_taken(
    bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / ".numba_config.yaml").write_text("cache_dir: .\n", encoding="utf-8")
    code, _, said = policyc("verify", bundle, cwd=tmp_path)
    assert code == 2
    assert ".numba_config.yaml" in said
    assert list(tmp_path.iterdir()) == [tmp_path / ".numba_config.yaml"]


def test_a_broken_numba(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise RuntimeError('a\\nb\\x1b')\n")
    path = os.pathsep.join((str(tmp_path), str(ROOT)))
    code, _, said = policyc("verify", bundle, cwd=tmp_path, PYTHONPATH=path)
    assert code == 2
    assert r"RuntimeError: a\nb\x1b" in said
    assert "install it again" in said


@pytest.mark.parametrize(
    ("name", "value"), [("HF_ENDPOINT", "http://x:abc"), ("HF_HUB_DOWNLOAD_TIMEOUT", "abc")]
)
def test_settings_of_the_hub_that_cannot_be_read(name: str, value: str, tmp_path: Path) -> None:
    hub = dict.fromkeys(word for word in os.environ if word.startswith("HF_"))
    code, _, said = policyc("inspect", "org/name", cwd=tmp_path, **{**hub, name: value})
    assert code == 2
    assert f"error[hub-failed]: {name}: " in said


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be deleted there")
def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    program = (
        "import os, sys; os.rmdir(os.getcwd()); from policyc.cli import main;"
        f"print([main(words.split()) for words in ('check config_i', 'fmt x.yaml', "
        f"'verify b', 'build config_i --model {TINY} -o b')])"
    )
    gone = tmp_path / "gone"
    gone.mkdir()
    ran = python(program, cwd=gone)
    assert ran.stdout.splitlines()[-1] == "[0, 2, 2, 2]", ran.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and limits what is mapped")
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_system_without_memory(form: str, tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from policyc.cli import main\n"
        # Once without the limit: what is imported is there, and the rest is Python's own.
        f"main(['plan', 'config_i', '--model', '{TINY}', '--format', '{form}'])\n"
        "mapped = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "hard = resource.getrlimit(resource.RLIMIT_AS)[1]\n"
        "resource.setrlimit(resource.RLIMIT_AS, (mapped + 8 * 2**20, hard))\n"
        "words = ['plan', 'config_i', '--model', 'minimax_m2.7', '--format']\n"
        f"sys.exit(main([*words, '{form}']))\n"
    )
    ran = python(program, cwd=tmp_path)
    assert ran.returncode == 2, ran.stderr
    assert "system-refused" in ran.stderr
    assert "memory: the system gives no more" in ran.stderr
    assert "Traceback" not in ran.stderr
