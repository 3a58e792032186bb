"""A whole W4A16 build against AutoRound's flow without a model, on one core, in one run.

    python benchmarks/gptq_build_speed.py [--layers 2] [--experts 8] [--fp8] [--repeats 2]

Generates a checkpoint with MiniMax-M2.7's matrix shapes and a short vocabulary (0.6 GB unless
told otherwise) and one of a single layer and expert, packs both with both programs in turn and
prints the best run of each, as `build_speed.py` does. All tensors are compared. AutoRound takes
ten seconds to start, twice, as it has a second process; what more bytes take is the difference
between the sizes, and the last line compares that, in CPU time. It runs uncompiled, its quicker
way here. Only policyc hashes what it wrote and waits until it is on the disk. Needs auto-round
(`policyc[conformance]`), Linux, and twice the checkpoint's bytes on the disk of --folder;
everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from build_speed import ARGUMENTS, Run, digest, measure, report
from generated_checkpoint import Sizes, write_checkpoint
from one_core import CORE

# The rules of policies/w4a16.yaml without its tests, which are about models of full size.
POLICY = """
target gptq
fp8_dequant bf16_bf16
all: 4bit int g128 sym by rtn
embed, lm_head: keep
"""
FLOW = """
import sys
from auto_round import AutoRound
if __name__ == "__main__":
    flow = AutoRound(sys.argv[1], scheme="W4A16", model_free=True, enable_torch_compile=False)
    flow.quantize_and_save(sys.argv[2])
"""


def policyc(source: Path, out: Path) -> list[str]:
    """The command that builds `POLICY` with one worker."""
    policy = out.with_name("policy.qpol")
    policy.write_text(POLICY)
    program = [sys.executable, "-m", "policyc", "build", str(policy), "--jobs", "1"]
    return [*program, "--model", str(source), "-o", str(out), *ARGUMENTS]


def auto_round(source: Path, out: Path) -> list[str]:
    """The command of the peer that makes the same tensors."""
    # Its second process starts with the same file, so there has to be one.
    program = out.with_name("flow.py")
    program.write_text(FLOW)
    return [sys.executable, str(program), str(source), str(out)]


class Comparison(NamedTuple):
    """Bytes of the source, and what each program took at best."""

    nbytes: int
    ours: Run
    theirs: Run


def compared(folder: Path, sizes: Sizes, repeats: int) -> Comparison:
    """Both programs in turn on one checkpoint, their figures printed."""
    source = folder / "source"
    nbytes = write_checkpoint(source, sizes)
    os.sync()
    runs: tuple[list[Run], list[Run]] = ([], [])
    digests = set()
    for _ in range(repeats):
        for found, command in zip(runs, (policyc, auto_round), strict=True):
            found.append(measure(command(source, folder / "out")))
            # In a child: a parent's size counts as its later children's peak.
            with ProcessPoolExecutor(1) as apart:
                digests.add(apart.submit(digest, folder / "out").result())
            shutil.rmtree(folder / "out")
            os.sync()
    shutil.rmtree(source)
    ours, theirs = (best(some) for some in runs)
    same = "the same tensors" if len(digests) == 1 else "DIFFERENT TENSORS"
    print(f"{nbytes / 1e9:.2f} GB, {sizes}: {same}")
    report("policyc build", ours)
    report("AutoRound, model_free", theirs)
    print(f"AutoRound takes {theirs.seconds / ours.seconds:.1f} times as long", flush=True)
    return Comparison(nbytes, ours, theirs)


def best(runs: Sequence[Run]) -> Run:
    """The smallest of each figure."""
    return Run(*(min(figures) for figures in zip(*runs, strict=True)))


def main() -> None:
    """Generate, measure, print, delete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--fp8", action="store_true", help="layers as the original has them")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write; by default the temp folder")
    options = parser.parse_args()
    small = Sizes(1, 1, vocabulary=2048, fp8=options.fp8)
    large = Sizes(options.layers, options.experts, vocabulary=2048, fp8=options.fp8)
    print(f"on core {CORE}")
    print(f"{'':24} {'time':>9} {'CPU':>9} {'peak RSS':>12} {'read':>10} {'written':>10}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        few, many = (compared(Path(folder), one, options.repeats) for one in (small, large))
    more = (many.nbytes - few.nbytes) / 1e6
    ours, theirs = many.ours.cpu - few.ours.cpu, many.theirs.cpu - few.theirs.cpu
    print(
        f"beyond starting: policyc {more / ours:.0f} MB/s, AutoRound {more / theirs:.0f} MB/s"
        f" of CPU time, {theirs / ours:.1f} times as much"
    )


if __name__ == "__main__":
    main()
