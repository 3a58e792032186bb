"""This process on one core, from the import on, and the best time of several runs.

To be imported before anything that starts threads, such as mlx. Also makes this checkout's
packages importable, installed or not. Linux only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

CORE = max(os.sched_getaffinity(0))
os.sched_setaffinity(0, {CORE})
sys.path.insert(0, str(Path(__file__).parents[1]))


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """The shortest of `repeats` runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
