"""The wheel: what it holds, and that it works far from any checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGED = ("architectures", "catalog", "document_schemas", "findings", "readers")
pytestmark = pytest.mark.slow


def _run(command: Sequence[str | Path], cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT], folder)
    (built,) = folder.glob("policyc-*.whl")
    return built


@pytest.fixture(scope="module")
def policyc(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console script in an environment of its own, which borrows our dependencies."""
    folder = tmp_path_factory.mktemp("fresh")
    _run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    _run([*pip, "install", "-q", "--no-deps", "--no-index", wheel], folder)
    # A path file inside a borrowed folder is not read: an editable install stays out of sight.
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own_packages = Path(_run([python, "-c", ask], folder).strip())
    (own_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return folder / "bin" / "policyc"


def test_wheel_holds_the_packages_and_their_rooms(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/", maxsplit=1)[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "policyc",
        "policy_dsl",
        "emitters",
    }
    rooms = {"grammar": "policy_dsl/_data", "policies": "policy_dsl/_data"}
    rooms |= dict.fromkeys([f"policy_dsl/{room}" for room in PACKAGED], ".")
    kept = [
        (Path(place) / path.relative_to(ROOT)).as_posix()
        for room, place in rooms.items()
        for path in (ROOT / room).iterdir()
    ]
    assert sorted(set(kept) - set(names)) == []


def test_installed_program_knows_its_formats(policyc: Path, tmp_path: Path) -> None:
    assert "mlx_affine" in _run([policyc, "formats"], tmp_path)


def test_installed_program_plans_a_bundled_policy(policyc: Path, tmp_path: Path) -> None:
    assert "3.2488" in _run([policyc, "plan", "config_i"], tmp_path)
