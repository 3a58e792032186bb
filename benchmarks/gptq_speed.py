"""Speed of GPTQ encoding against mx.quantize and AutoRound's search, on one core, in one run.

    python benchmarks/gptq_speed.py [--repeats 25]

Each line is the best of several runs, taken in turns with the peer, in MB/s of bfloat16 source
(MB = 1e6 bytes). The matrices are those of MiniMax-M2's experts, which are the blocks of a
build. Zero points are packed too. mx.quantize at 4 bits in groups of 128 only measures the
machine. The search is compared with `opt_rtn_int_sym` of auto-round 0.16.1 without packing;
its scales are compared before it is timed, three times. More than half of its time goes to
memory that malloc takes from the system anew in every step: how much depends on what else lies
in the process, and MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ can take it away. Without
auto-round there is only the first table. Needs mlx (`policyc[conformance]`) and Linux.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from one_core import CORE, best_seconds

# mlx starts its threads when it is imported, so that comes later.
# isort: split

import mlx.core as mx
import numpy as np

from emitters.numerics.column_weights import search_weights
from emitters.numerics.gptq import GptqParts, gptq_rtn, pack_columns, pack_zeros
from emitters.numerics.gptq_search import gptq_search
from emitters.numerics.rounding import cast

SHAPES = ((1536, 3072), (3072, 1536))
# bits, group size, symmetric
ROUNDING = [(4, 128, True), (4, 128, False), (4, 64, True), (4, 32, True), (4, -1, True)]
ROUNDING += [(bits, 128, symmetric) for bits in (8, 3, 2) for symmetric in (True, False)]
# bits, group size, with an importance matrix
SEARCHES = [(4, 128, False), (4, 128, True), (4, 32, False), (2, 128, False), (8, 128, False)]
PEER_REPEATS = 3


def rates(
    megabytes: float, ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> tuple[float, float]:
    """MB/s of both, run in turns."""
    seconds = [(best_seconds(ours, 2), best_seconds(theirs, 1)) for _ in range(repeats)]
    return megabytes / min(a for a, _ in seconds), megabytes / min(b for _, b in seconds)


def normal_weights(rows: int, columns: int) -> np.ndarray:
    """Weights as trained ones are, as bfloat16."""
    normal = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    return cast(normal * np.float32(0.02), "F32", "BF16")


def time_rounding(
    weights: np.ndarray, bits: int, size: int, symmetric: bool, repeats: int
) -> tuple[float, float]:
    """MB/s of rounding to nearest and of mx.quantize."""
    mlx_weights = mx.array(weights).view(mx.bfloat16)
    mx.eval(mlx_weights)

    def ours() -> None:
        parts = gptq_rtn(weights, "BF16", bits=bits, group_size=size, symmetric=symmetric)
        pack_columns(parts.codes, bits=bits)
        pack_zeros(parts.zeros, bits=bits, version="gptq")

    def theirs() -> None:
        mx.eval(mx.quantize(mlx_weights, group_size=128, bits=4))

    return rates(weights.nbytes / 1e6, ours, theirs, repeats)


def time_search(
    weights: np.ndarray, bits: int, size: int, weighted: bool, torch: Any, search: Any
) -> tuple[float, float]:
    """MB/s of the search and of AutoRound's, after checking that both give the same."""
    imatrix = np.random.default_rng(1).random(weights.shape[1], np.float32) + np.float32(0.1)
    tensor = torch.from_numpy(weights).view(torch.bfloat16)
    given = torch.from_numpy(imatrix) if weighted else None
    options = {"bits": bits, "group_size": size}

    def ours() -> GptqParts:
        chosen = search_weights(imatrix, **options) if weighted else None
        parts = gptq_search(weights, "BF16", weights=chosen, **options)
        pack_columns(parts.codes, bits=bits)
        pack_zeros(parts.zeros, bits=bits, version="gptq")
        return parts

    def theirs() -> Any:
        with torch.inference_mode():
            return search(tensor, imatrix=given, **options)

    scales = theirs()[1].reshape(len(weights), -1).half().numpy().T
    if not np.array_equal(scales, ours().scales):
        raise SystemExit(f"{weights.shape} at {bits} bits: the results differ")
    return rates(weights.nbytes / 1e6, ours, theirs, PEER_REPEATS)


def compare_rounding(repeats: int) -> None:
    """Print one line for each shape, width, group size and kind of zero point."""
    print("rows columns bits group      policyc MB/s mx.quantize MB/s ratio")
    for rows, columns in SHAPES:
        weights = normal_weights(rows, columns)
        for bits, size, symmetric in ROUNDING:
            ours, theirs = time_rounding(weights, bits, size, symmetric, repeats)
            case = f"{rows:4} {columns:7} {bits:4} {size:5} {'sym' if symmetric else 'asym':4}"
            print(f"{case} {ours:13.0f} {theirs:16.0f} {ours / theirs:5.2f}", flush=True)


def compare_searches() -> None:
    """Print one line for each shape, width, group size and kind of weights."""
    torch = import_module("torch")
    torch.set_num_threads(1)
    search = import_module("auto_round.data_type.int").quant_tensor_opt_rtn_sym
    print("rows columns bits group imatrix policyc MB/s auto-round MB/s ratio")
    for rows, columns in SHAPES:
        weights = normal_weights(rows, columns)
        for bits, size, weighted in SEARCHES:
            ours, theirs = time_search(weights, bits, size, weighted, torch, search)
            case = f"{rows:4} {columns:7} {bits:4} {size:5} {'yes' if weighted else 'no':7}"
            print(f"{case} {ours:12.1f} {theirs:15.2f} {ours / theirs:5.1f}", flush=True)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    print(f"bfloat16 matrices, core {CORE}, mlx {mx.__version__}")
    compare_rounding(options.repeats)
    if find_spec("auto_round") is None:
        print("auto-round is not installed: its search is not compared")
    else:
        compare_searches()


if __name__ == "__main__":
    main()
