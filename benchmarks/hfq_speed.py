"""Speed of the HFQ block codec, in relation to mx.quantize at 4 bits, on one core, in one run.

    python benchmarks/hfq_speed.py [--megabytes 16] [--repeats 25]

Each line is the best of several runs, in MB/s of bfloat16 source (MB = 1e6 bytes); 16 MiB are
a block of a build. Encoding includes the widening to float32. mx.quantize, groups of 64, only
measures the machine: hipfire's own encoders are no package. Needs mlx (`policyc[conformance]`)
and Linux.
"""

from __future__ import annotations

import argparse

from one_core import CORE, best_seconds

# mlx starts its threads when it is imported, so that comes later.
# isort: split

import mlx.core as mx
import numpy as np

from emitters.numerics.hfq import decode_blocks, encode_blocks
from emitters.numerics.rounding import cast
from policy_dsl.sources.hfq_container import code_name

CODES = (13, 15, 17, 18, 6, 7, 8, 3, 19, 20)


def measure(weights: np.ndarray, code: int, repeats: int) -> tuple[float, float]:
    """MB/s of encoding and of decoding."""

    def encode() -> np.ndarray:
        return encode_blocks(cast(weights, "BF16", "F32"), code)

    blocks = encode()
    megabytes = weights.nbytes / 1e6
    return (
        megabytes / best_seconds(encode, repeats),
        megabytes / best_seconds(lambda: decode_blocks(blocks, code, weights.size), repeats),
    )


def mlx_rate(weights: np.ndarray, repeats: int) -> float:
    """MB/s of mx.quantize."""
    mlx_weights = mx.array(weights.reshape(-1, 4096)).view(mx.bfloat16)
    mx.eval(mlx_weights)

    def quantize() -> None:
        mx.eval(mx.quantize(mlx_weights, group_size=64, bits=4))

    return weights.nbytes / 1e6 / best_seconds(quantize, repeats)


def main() -> None:
    """Print one line for each quant code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    normal = np.random.default_rng(0).standard_normal(options.megabytes * 2**19, np.float32)
    weights = cast(normal * np.float32(0.02), "F32", "BF16")
    theirs = mlx_rate(weights, options.repeats)
    print(f"{options.megabytes} MiB of bfloat16, core {CORE}, mlx {mx.__version__}")
    print(f"mx.quantize, 4 bits: {theirs:.0f} MB/s")
    print(f"{'quant code':15} {'MB/s':>6} ratio decoding MB/s")
    for code in CODES:
        ours, decoding = measure(weights, code, options.repeats)
        print(
            f"{code_name(code):12} {code:2} {ours:6.0f} {ours / theirs:5.2f} {decoding:13.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
