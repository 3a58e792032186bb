"""Kernels compile once on a machine: a second run loads them from the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from emitters.numerics.jit import int64, kernel

ROOT = Path(__file__).parents[3]
COUNT_COMPILATIONS = """
import numpy as np
from numba.core import event
from emitters.numerics.rounding import cast

with event.install_recorder("numba:compile") as recorder:
    cast(np.zeros(4, np.uint16), "BF16", "F16")
    cast(np.zeros(4, np.float16), "F16", "BF16")
print(len(recorder.buffer))
"""
ADDING = """
import sys
from numba.core.caching import IndexDataCacheFile
from emitters.numerics.jit import int64, kernel

@kernel(int64, returns=int64)
def add(value, constant):
    return value + constant
"""
# A program that compiles while another one does: it has read the index before that one wrote
# it, and the index that stays is that one's.
AT_THE_SAME_TIME = """
IndexDataCacheFile._load_index = lambda self: {}
save = IndexDataCacheFile._save_index
IndexDataCacheFile._save_index = lambda self, index: (
    None if __import__("os").path.exists(self._index_path) else save(self, index)
)
"""
ADD = "\nprint(add(100, constant=int(sys.argv[1])))\n"
FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
"""
NO_FOLDER = """
from numba.core.caching import CacheImpl, FunctionCache
FunctionCache._impl_class._locator_classes = []
"""


def run(program: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program run by a fresh interpreter, with this folder as the cache."""
    program_file = cache.parent / "program.py"
    program_file.write_text(program)
    return subprocess.run(
        [sys.executable, str(program_file), *arguments],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )


def compilations(cache: Path) -> int:
    """How many compilations a fresh interpreter does for two casts."""
    return int(run(COUNT_COMPILATIONS, cache).stdout)


def test_a_second_process_does_not_compile(tmp_path: Path) -> None:
    assert compilations(tmp_path / "cache") > 0
    assert compilations(tmp_path / "cache") == 0


def test_programs_that_compile_at_the_same_time_do_not_mix_their_kernels(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert run(ADDING + ADD, cache, "1").stdout == "101\n"
    assert run(ADDING + AT_THE_SAME_TIME + ADD, cache, "2").stdout == "102\n"
    assert run(ADDING + ADD, cache, "1").stdout == "101\n"
    assert run(ADDING + ADD, cache, "2").stdout == "102\n"


@pytest.mark.parametrize("trouble", [FULL_DISK, NO_FOLDER])
def test_without_a_cache_kernels_work_and_it_is_said_once(trouble: str, tmp_path: Path) -> None:
    both = "\nprint(add(100, constant=1), add(100, constant=2))\n"
    ran = run(ADDING + trouble + both, tmp_path / "cache")
    assert ran.stdout == "101 102\n"
    (line,) = ran.stderr.splitlines()
    assert line.startswith("compiled kernels cannot be cached (")
    assert "Set NUMBA_CACHE_DIR to an empty folder" in line


@pytest.mark.parametrize("damage", ["empty", "zeros", "half"])
@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_damaged_cache_is_named_and_not_used(damage: str, ending: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    run(ADDING + ADD, cache, "1")
    for path in cache.rglob(f"*.{ending}"):
        whole = path.read_bytes()
        left = {"empty": b"", "zeros": bytes(len(whole)), "half": whole[: len(whole) // 2]}
        path.write_bytes(left[damage])
    ran = run(ADDING + ADD, cache, "1")
    assert ran.stdout == "101\n"
    assert "Set NUMBA_CACHE_DIR to an empty folder" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_errors_of_the_compiler_surface(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(*_: object, **__: object) -> None:
        calls.append(1)
        raise RuntimeError("the compiler broke")

    monkeypatch.setattr(numba.core.compiler, "compile_extra", failing)
    with pytest.raises(RuntimeError, match="the compiler broke"):
        kernel(int64, returns=int64)(lambda value: value)(1)
    assert calls == [1]
