"""Slices of `benchmarks/fuzz_trials.py`: no broken input ends in a traceback or a hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parents[1] / "benchmarks" / "fuzz_trials.py"


def try_share(*options: str) -> None:
    """Runs a part of the trials; what went wrong is in the output."""
    command = [sys.executable, str(COMMAND), "--workers", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_some_broken_inputs_of_each_kind_are_answered() -> None:
    try_share("--share", "0.002", "--seed", "7")


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
def test_many_broken_inputs_of_each_kind_are_answered(seed: str) -> None:
    try_share("--share", "0.03", "--seed", seed)
