"""Time from the command to its answer for `check` and `plan`, as a user waits for it.

    python benchmarks/planning_speed.py [--repeats 5]

Each line is the best of several runs of a fresh process, in seconds, and as a ratio to the
start of the bare interpreter in the same run. The plan is of MiniMax-M2.7, 96,103 tensors.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
POLICYC = [sys.executable, "-m", "policyc"]
CASES = {
    "interpreter": [sys.executable, "-c", "pass"],
    "policyc --version": [*POLICYC, "--version"],
    "check config_i": [*POLICYC, "check", "config_i"],
    "check config_i --model": [*POLICYC, "check", "config_i", "--model", "MiniMax-M2.7"],
    "plan config_i": [*POLICYC, "plan", "config_i"],
    "plan config_i --tensors, JSON": [
        *POLICYC, "plan", "config_i", "--tensors", "--format", "json",
    ],
}  # fmt: skip


def best_seconds(command: list[str], repeats: int) -> float:
    """The shortest of `repeats` runs of a command that must succeed."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Print one line for each command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    bare = best_seconds(CASES["interpreter"], repeats)
    print(f"{'command':32} {'seconds':>8} {'ratio':>8}")
    for name, command in CASES.items():
        spent = best_seconds(command, repeats)
        print(f"{name:32} {spent:8.3f} {spent / bare:8.1f}")


if __name__ == "__main__":
    main()
