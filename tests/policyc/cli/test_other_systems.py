"""The commands where the system lacks what Linux and macOS have, as Windows does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from policy_dsl.escaping import is_plain_name, name_defect
from policyc.cli import main
from tests.models import TINY

ROOT = Path(__file__).parents[3]
# Several commands in one interpreter: each would take a second to start.
WITHOUT = """
import os, sys
for name in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[name] = None
for name in (
    "pwrite", "pread", "sched_getaffinity", "fdatasync", "getuid", "geteuid", "getgid", "fork",
    "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY", "O_SYNC", "statvfs",
    "posix_fallocate", "fchmod", "fchdir", "pathconf", "chown",
):
    if hasattr(os, name):
        delattr(os, name)
from policyc.cli import main
for line in sys.stdin.read().splitlines():
    print("$", main(line.split("\\t")), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    policy = folder / "p.qpol"
    policy.write_text("target mlx_affine\nall: 8bit\n", encoding="utf-8")
    words = ["build", str(policy), "--model", str(TINY), "-o", str(folder / "bundle"), "-q"]
    assert main(words) == 0
    return folder


def without(folder: Path, *commands: str) -> tuple[list[str], str]:
    """The exit codes of commands on such a system, and what they said on stderr."""
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        input="\n".join(command.replace(" ", "\t") for command in commands),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in ran.stderr, ran.stderr
    return [line[2:] for line in ran.stdout.splitlines() if line.startswith("$ ")], ran.stderr


def test_what_only_reads_works(folder: Path) -> None:
    commands = [
        "check p.qpol",
        f"check p.qpol --model {TINY}",
        f"plan p.qpol --model {TINY} --save plan.json",
        f"diff plan.json p.qpol --model {TINY}",
        f"explain p.qpol lm_head.weight --model {TINY}",
        f"inspect {TINY}",
        "inspect bundle",
        "fmt --check p.qpol",
        "formats",
        "models",
        "schema",
        "verify bundle",
        f"verify bundle --source {TINY}",
    ]
    codes, said = without(folder, *commands)
    assert codes == ["0"] * len(commands), said


def test_a_build_says_where_it_runs_and_writes_nothing(folder: Path) -> None:
    codes, said = without(folder, f"build p.qpol --model {TINY} -o other")
    assert codes == ["2"]
    assert said.startswith("error[unsupported-system]: bundles are not built on ")
    assert "WSL" in said
    assert not list(folder.glob("other*"))


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "a/b", "a\\b", "C:model.safetensors", "model.safetensors:stream"),
        *("NUL", "nul.safetensors", "Con", "COM1.json", "lpt9", "com\u00b9", "CONIN$"),
        *("a\x00b", "a\nb", "a\u202eb", "\u200b", "\udcff", "aux .x"),
    ],
)
def test_a_name_in_a_file_of_strangers_is_a_file_in_the_folder(name: str) -> None:
    assert not is_plain_name(name)


@pytest.mark.parametrize(
    "name", ["console", "com10", "nullable.json", "model-00001-of-00002.safetensors", "größer"]
)
def test_other_names_are_plain(name: str) -> None:
    assert is_plain_name(name)
    assert name_defect(name) is None


@pytest.mark.parametrize("name", ["con", "a:b", "what?", "a*", "a.", 'a"b', "<a>", "NUL.x"])
def test_a_bundle_has_a_name_on_every_system(name: str, tmp_path: Path) -> None:
    assert name_defect(name) is not None
    policy = tmp_path / "p.qpol"
    text = f"name {json.dumps(name)}\ntarget mlx_affine\nall: 8bit\n"
    policy.write_text(text, encoding="utf-8")
    assert main(["check", str(policy)]) == 1
