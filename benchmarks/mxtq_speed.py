"""Speed of MXTQ against jang's own converter functions, on one core, in one run.

    python benchmarks/mxtq_speed.py [--megabytes 32] [--repeats 7]

Each line is the best of several runs, in MB/s of bfloat16 source (MB = 1e6 bytes). jang gets
the weights as float32, which spares it a conversion, and is timed three times. Its bytes are
compared before anything is timed. 3 bits are its row-wise function: the other one refuses rows
that do not fill words. Decoding is timed alone, as jang has no function for it. Needs jang
(`policyc[conformance]`) and Linux.
"""

from __future__ import annotations

import argparse

from one_core import CORE, best_seconds

# mlx starts its threads when it is imported, so that comes later.
# isort: split

import mlx.core as mx
import numpy as np
from jang_tools.convert_zaya_common import tq_quantize_weight_rowwise
from jang_tools.turboquant.linear import tq_quantize_weight

from emitters.numerics.mxtq import mxtq_decode, mxtq_encode
from emitters.numerics.rounding import cast

CASES = [(columns, bits) for columns in (3072, 1536) for bits in (2, 3, 4)]
JANG_REPEATS = 3


def measure(weights: np.ndarray, bits: int, repeats: int) -> tuple[float, float, float]:
    """MB/s of encoding, of jang and of decoding, after checking that both give the same."""
    wide, columns = cast(weights, "BF16", "F32"), weights.shape[1]
    jang = tq_quantize_weight_rowwise if bits == 3 else tq_quantize_weight
    packed, norms = mxtq_encode(weights, "BF16", bits=bits)
    theirs = jang(wide, bits=bits, seed=42)
    same = [np.array_equal(a, b) for a, b in zip((packed, norms), theirs.values(), strict=True)]
    if not all(same):
        raise SystemExit(f"{columns} columns at {bits} bits: the results differ")
    seconds = (
        best_seconds(lambda: mxtq_encode(weights, "BF16", bits=bits), repeats),
        best_seconds(lambda: jang(wide, bits=bits, seed=42), JANG_REPEATS),
        best_seconds(lambda: mxtq_decode(packed, norms, columns=columns, bits=bits), repeats),
    )
    encode, peer, decode = (weights.nbytes / 1e6 / each for each in seconds)
    return encode, peer, decode


def main() -> None:
    """Print one line for each number of columns and width."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    print(f"{options.megabytes} MiB of bfloat16, core {CORE}, mlx {mx.__version__}")
    print("columns bits  policyc MB/s jang MB/s ratio decoding MB/s")
    for columns, bits in CASES:
        shape = options.megabytes * 2**20 // (2 * columns), columns
        normal = np.random.default_rng(0).standard_normal(shape, np.float32)
        weights = cast(normal * np.float32(0.02), "F32", "BF16")
        ours, theirs, decoding = measure(weights, bits, options.repeats)
        rates = f"{ours:13.0f} {theirs:9.0f} {ours / theirs:5.1f} {decoding:13.0f}"
        print(f"{columns:7} {bits:4} {rates}", flush=True)


if __name__ == "__main__":
    main()
