"""The CPU time of a build beside encoding, measured with a model's names and tiny shapes.

    python benchmarks/bookkeeping.py
    python benchmarks/bookkeeping.py --profile

The source has the names and dtypes of MiniMax-M2.7 (96,103 tensors, 43 shards); the policy is
`w4a16` in groups of 32 (143,967 tensors written). A runner times the reading, encoding and writing
of every unit; all else is bookkeeping: checks of the plan, headers and journal, units and their
receipts, self-check, hashes, record, rename. The limit is 3 s of CPU.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import tempfile
from collections.abc import Iterable
from math import prod
from pathlib import Path
from time import process_time

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from emitters.core.build import Receipts, build  # noqa: E402
from emitters.core.run_unit import Work  # noqa: E402
from emitters.core.work_units import Unit  # noqa: E402
from policy_dsl.inventory import DTYPE_BITS, Inventory  # noqa: E402
from policy_dsl.language.load import load  # noqa: E402
from policy_dsl.sources.reference import open_source  # noqa: E402
from policyc.workflow import plan_for  # noqa: E402

SHARDS = 43
SIZES = {3072: 32, 1536: 32, 6144: 64, 1024: 32, 200064: 64, 256: 256}
CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rotary_dim": 16,
    "vocab_size": 64,
}


class Timed:
    """Runs all units at once, and counts the CPU seconds that this takes."""

    def __init__(self, profile: cProfile.Profile | None) -> None:
        self.seconds = 0.0
        self._profile = profile

    def run(self, units: Iterable[Unit], work: Work) -> Receipts:
        """The receipts of all units."""
        taken = list(units)
        if self._profile:
            self._profile.disable()
        start = process_time()
        receipts = [work(unit) for unit in taken]
        self.seconds += process_time() - start
        if self._profile:
            self._profile.enable()
        yield from zip(taken, receipts, strict=True)


def write_source(folder: Path) -> None:
    """The model with small sizes; its weights are a hole."""
    model = open_source("minimax-m2.7")
    tensors = [*model.tensors.values()]
    share = -(-len(tensors) // SHARDS)
    index = {}
    for number in range(SHARDS):
        name, at = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors", 0
        header = {}
        for tensor in tensors[number * share :][:share]:
            is_scale = tensor.name.endswith("_scale_inv")
            shape = [1 if is_scale else SIZES[size] for size in tensor.shape]
            nbytes = prod(shape) * DTYPE_BITS[tensor.dtype] // 8
            offsets = [at, at + nbytes]
            header[tensor.name] = {"dtype": tensor.dtype, "shape": shape, "data_offsets": offsets}
            index[tensor.name] = name
            at += nbytes
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + at)
    (folder / "config.json").write_text(json.dumps({**model.config, **CONFIG}))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    document = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))


def measured(folder: Path, profile: cProfile.Profile | None) -> None:
    """Plan and build once, and print the CPU seconds of each."""
    policy = folder / "w4a16.yaml"
    policy.write_text((ROOT / "policies" / "w4a16.yaml").read_text().replace("g128", "g32"))
    inventory: Inventory = open_source(str(folder / "source"))
    start = process_time()
    plan = plan_for(load(policy), inventory, None)
    planned = process_time()
    runner = Timed(profile)
    if profile:
        profile.enable()
    report = build(plan, inventory, out=folder / "out", jobs=1, runner=runner)
    if profile:
        profile.disable()
    beside = process_time() - planned - runner.seconds
    print(f"tensors {report.tensors:,}; CPU seconds: plan {planned - start:.2f}, ", end="")
    print(f"units {runner.seconds:.2f}, build beside them {beside:.2f} (limit 3)")


def main() -> None:
    """Measure one build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    profile = cProfile.Profile() if parser.parse_args().profile else None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "source").mkdir()
        write_source(Path(folder) / "source")
        measured(Path(folder), profile)
    if profile:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(60)


if __name__ == "__main__":
    main()
