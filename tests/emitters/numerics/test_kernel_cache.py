"""Kernels compile once on a machine: a second run loads them from the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def compilations(cache: Path) -> int:
    """How many compilations a fresh interpreter does for two casts."""
    result = subprocess.run(
        [sys.executable, "-c", COUNT_COMPILATIONS],
        cwd=ROOT,
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout)


def test_a_second_process_does_not_compile(tmp_path: Path) -> None:
    assert compilations(tmp_path) > 0
    assert compilations(tmp_path) == 0
