"""Speed of encoding against mx.quantize, both on one core, on the same weights in one run.

    python benchmarks/encode_speed.py [--megabytes 64] [--repeats 7]

Each line is the best of several runs, in MB/s of bfloat16 source (MB = 1e6 bytes). The process
is bound to one core before mlx starts its threads, so neither side can use a second one. Both
results are compared bit for bit before they are timed. Needs mlx (`policyc[conformance]`) and
Linux.
"""

from __future__ import annotations

import argparse

from one_core import CORE, best_seconds

# mlx starts its threads when it is imported, so that comes later.
# isort: split

import mlx.core as mx
import numpy as np

from emitters.mlx_affine.codec import encode
from emitters.numerics.rounding import cast
from policy_dsl.treatments import Coded

COLUMNS = 4096
CASES = [("affine", bits, 64) for bits in (2, 3, 4, 5, 6, 8)]
CASES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def measure(weights: np.ndarray, case: tuple[str, int, int], repeats: int) -> tuple[float, float]:
    """MB/s of encode and of mx.quantize, after checking that they agree."""
    scheme, bits, group_size = case
    treatment = Coded(scheme, bits, group_size, scheme != "affine", "rtn")
    mlx_weights = mx.array(weights).view(mx.bfloat16)
    mx.eval(mlx_weights)

    def ours() -> dict[str, np.ndarray]:
        return encode(weights, "BF16", treatment)

    def theirs() -> list[mx.array]:
        parts = mx.quantize(mlx_weights, group_size=group_size, bits=bits, mode=scheme)
        mx.eval(parts)
        return list(parts)

    for mine, other in zip(ours().values(), theirs(), strict=True):
        stored = other.view(mx.uint16) if other.dtype == mx.bfloat16 else other
        if not np.array_equal(mine, np.array(stored)):
            raise SystemExit(f"{case}: the results differ")
    megabytes = weights.nbytes / 1e6
    # The composed operations behind mlx's 4-bit fp modes take seconds; two runs tell enough.
    slow = scheme in ("mxfp4", "nvfp4")
    return (
        megabytes / best_seconds(ours, repeats),
        megabytes / best_seconds(theirs, 2 if slow else repeats),
    )


def main() -> None:
    """Print one line for each width and mode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    rows = options.megabytes * 2**20 // (2 * COLUMNS)
    normal = np.random.default_rng(0).standard_normal((rows, COLUMNS), np.float32)
    weights = cast(normal * np.float32(0.02), "F32", "BF16")
    print(f"{rows} x {COLUMNS} bfloat16, core {CORE}, mlx {mx.__version__}")
    print(f"{'scheme':8} {'bits':>4} {'group':>5} {'policyc MB/s':>13} {'mlx MB/s':>9} ratio")
    for case in CASES:
        ours, theirs = measure(weights, case, options.repeats)
        rates = f"{ours:13.0f} {theirs:9.0f} {ours / theirs:5.1f}"
        print("{:8} {:4} {:5}".format(*case), rates, flush=True)


if __name__ == "__main__":
    main()
