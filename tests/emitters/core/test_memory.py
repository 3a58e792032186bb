"""Peak memory of a build in a child of its own, at two sizes of the model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import sys
from pathlib import Path
from policyc.cli import main
code = main(["build", "mlx_4bit", "--model", sys.argv[1], "-o", sys.argv[2], "-j", "1", "-q"])
print("code", code, Path("/proc/self/status").read_text())
"""


def peak(source: Path, out: Path) -> int:
    """Peak resident bytes of a build with one worker."""
    command = [sys.executable, "-c", CHILD, str(source), str(out)]
    root = Path(__file__).parents[3]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "code 0" in ran.stdout, ran.stderr
    found = re.search(r"VmHWM:\s+(\d+) kB", ran.stdout)
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_memory_does_not_depend_on_the_model(write_llama, tmp_path):
    sizes = {"layers": 1, "hidden": 1024, "inner": 2048}
    small = peak(write_llama(name="small", vocabulary=2048, **sizes), tmp_path / "small-out")
    large_source = write_llama(name="large", vocabulary=200_000, **sizes)
    assert (large_source / "model.safetensors").stat().st_size > 800 * 10**6
    large = peak(large_source, tmp_path / "large-out")
    assert large < 2**30
    assert large < small + 64 * 2**20
