"""A whole build against mlx_lm.convert, both as children with the same cores, in one run.

    python benchmarks/build_speed.py [--layers 2] [--experts 16] [--fp8] [--repeats 2]

Generates a checkpoint with MiniMax-M2.7's matrix shapes (3.5 GB unless told otherwise),
converts it to uniform 4 bit with both programs in turn and prints the best run of each: time,
CPU time, peak resident memory, bytes read and written. Both outputs are compared tensor by
tensor. Then builds two sizes with one worker, the larger one with a single tensor of 1.2 GB,
and prints their peaks: memory does not depend on the model. Only policyc hashes what it wrote
and waits until it is on the disk. Needs mlx-lm (`policyc[conformance]`), Linux, and 1.5 times
the checkpoint's bytes on the disk of --folder; everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from generated_checkpoint import Sizes, write_checkpoint
from safetensors import deserialize

ROOT = Path(__file__).parents[1]
ARGUMENTS = ["--progress", "none", "--quiet"]


class Run(NamedTuple):
    """What a child took: seconds, of CPU too, peak resident bytes, bytes read and written."""

    seconds: float
    cpu: float
    peak: int
    read: int
    written: int


def measure(command: list[str]) -> Run:
    """Run a command as a child and measure it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    child = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    seconds = time.perf_counter() - start
    # The counts of a child that has ended are there until it is waited for.
    lines = Path(f"/proc/{child.pid}/io").read_text().splitlines()
    counts = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{child.stderr and child.stderr.read()}")
    cpu = usage.ru_utime + usage.ru_stime
    return Run(seconds, cpu, usage.ru_maxrss * 1024, counts["rchar"], counts["wchar"])


def policyc(source: Path, out: Path, *options: str) -> list[str]:
    """The command that builds `mlx_4bit`."""
    program = [sys.executable, "-m", "policyc", "build", "mlx_4bit"]
    return [*program, "--model", str(source), "-o", str(out), *ARGUMENTS, *options]


def convert(source: Path, out: Path) -> list[str]:
    """The command of the peer that makes the same tensors."""
    program = [sys.executable, "-m", "mlx_lm", "convert", "-q"]
    return [*program, "--hf-path", str(source), "--mlx-path", str(out)]


def digest(bundle: Path) -> str:
    """A hash over all tensors of a bundle, in the order of their names."""
    hashes = {}
    for path in sorted(bundle.glob("model*.safetensors")):
        for name, entry in deserialize(path.read_bytes()):
            facts = f"{name} {entry['dtype']} {entry['shape']}".encode()
            hashes[name] = hashlib.sha256(facts + bytes(entry["data"])).hexdigest()
    return hashlib.sha256("".join(hashes[name] for name in sorted(hashes)).encode()).hexdigest()


def report(name: str, run: Run) -> None:
    """One line."""
    sizes = f"{run.peak / 2**20:8.0f} MiB {run.read / 1e9:7.2f} GB {run.written / 1e9:7.2f} GB"
    print(f"{name:24} {run.seconds:7.1f} s {run.cpu:7.1f} s {sizes}", flush=True)


def against_mlx_lm(folder: Path, sizes: Sizes, repeats: int) -> None:
    """Both programs in turn; their best runs and the ratio."""
    source = folder / "source"
    nbytes = write_checkpoint(source, sizes)
    os.sync()
    print(f"source: {nbytes / 1e9:.2f} GB, {sizes}, {len(os.sched_getaffinity(0))} cores")
    runs: dict[str, list[Run]] = {"policyc build": [], "mlx_lm.convert": []}
    digests = set()
    for _ in range(repeats):
        for name, command in (("policyc build", policyc), ("mlx_lm.convert", convert)):
            runs[name].append(measure(command(source, folder / "out")))
            # In a child: a parent's size counts as its later children's peak.
            with ProcessPoolExecutor(1) as apart:
                digests.add(apart.submit(digest, folder / "out").result())
            shutil.rmtree(folder / "out")
            os.sync()
    best = {name: min(some) for name, some in runs.items()}
    for name, run in best.items():
        report(name, run)
    ours, theirs = best.values()
    ratios = {
        "time": ours.seconds / theirs.seconds,
        "CPU time": ours.cpu / theirs.cpu,
        "memory": ours.peak / theirs.peak,
    }
    told = ", ".join(f"{ratio:.2f} of the {name}" for name, ratio in ratios.items())
    same = "the same tensors" if len(digests) == 1 else "DIFFERENT TENSORS"
    print(f"policyc takes {told}; {same}")
    shutil.rmtree(source)


def one_worker(folder: Path) -> None:
    """Peaks of two sizes with one worker."""
    for name, sizes in (
        ("one worker, small", Sizes(layers=1, experts=2, vocabulary=2048)),
        ("one worker, 1.2 GB tensor", Sizes(layers=1, experts=16)),
    ):
        nbytes = write_checkpoint(folder / "source", sizes)
        os.sync()
        run = measure(policyc(folder / "source", folder / "out", "--jobs", "1"))
        report(name, run)
        print(f"    {nbytes / 1e9:.2f} GB of source")
        shutil.rmtree(folder / "source")
        shutil.rmtree(folder / "out")


def main() -> None:
    """Generate, measure, print, delete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--fp8", action="store_true", help="layers as the original has them")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; by default the temp folder")
    options = parser.parse_args()
    sizes = Sizes(options.layers, options.experts, fp8=options.fp8)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(f"{'':24} {'time':>9} {'CPU':>9} {'peak RSS':>12} {'read':>10} {'written':>10}")
        against_mlx_lm(Path(folder), sizes, options.repeats)
        one_worker(Path(folder))


if __name__ == "__main__":
    main()
