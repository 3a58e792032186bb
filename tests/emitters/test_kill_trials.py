"""A slice of `benchmarks/kill_trials.py`: kills and power losses at moments of fixed seeds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


TRIALS = [("mlx_affine", 1), ("jangtq_prestack", 2), ("hipfire_hfq", 3), ("gptq", 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "seed"), TRIALS)
def test_killed_builds_end_with_the_same_bytes(target: str, seed: int) -> None:
    # A program of its own: it copies itself, which only one without threads may do.
    command = [sys.executable, "benchmarks/kill_trials.py", "--target", target]
    command += ["--sample", "2", "--seed", str(seed)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = re.findall(r"(\d+) +(\d+) +(\d+) +[\d.]+$", ran.stdout, re.MULTILINE)
    assert len(figures) == 8
    assert sum(int(hits) for _, hits, _ in figures) > 25
    assert [wrong for _, _, wrong in figures if wrong != "0"] == []
