"""Broken policies, checkpoints, bundles and documents, and what the commands make of them.

    python benchmarks/fuzz_trials.py                       the whole, some minutes
    python benchmarks/fuzz_trials.py --share 0.02 --seed 7  a part of each kind

Every input is a whole document with a few places changed. It goes through the real commands in
a child of a warm process. No command may end in a traceback or without a diagnostic, take more
than 2 s of the processor or 1 GiB, print what a terminal obeys, or write anywhere but where it
was told to.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
# Before it is imported: no trial asks the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import fuzz_mutations as change  # noqa: E402
from damage_trials import POLICIES  # noqa: E402
from fuzz_answers import Command, Trial, try_input  # noqa: E402
from fuzz_seeds import Seeds, make_seeds, silent  # noqa: E402

from policy_dsl.planning.record import record_digest  # noqa: E402
from policy_dsl.sources.recorded import expand_pattern  # noqa: E402
from policyc.cli import main as policyc  # noqa: E402

CHUNK = 10
LARGE = "minimax_m2.7.json"
TENSORS = ("lm_head.weight", "*", "model.layers.0.*", "**q_proj*", "a[", "*" * 60, "", "experts")
RULES = {
    "mlx_affine": "all: 4bit g32",
    "jangtq_prestack": "all: 8bit affine; experts: 2bit mxtq optional; router, norm: f16",
    "hipfire_hfq": "all: mq4; embed, lm_head, router: q8; norm, router_bias: f16 optional",
    "gptq": "attention, mlp, experts: 4bit g32 optional; embed, lm_head, router, norm: keep",
}


@dataclass(frozen=True)
class Case:
    """The commands that an input goes through, and what they may write in its folder."""

    commands: Sequence[Command]
    may_write: Sequence[str] = ()


def broken_policy(seeds: Seeds, random: Random, box: Path) -> Case:
    """A policy, sometimes of a chain."""
    others = [text for _, text in seeds.policies]
    suffix, text = random.choice(seeds.policies)
    made = change.changed_policy(random, text, others)
    name = f"p{suffix}"
    if random.random() < 0.2:
        base = random.choice(others)
        parent = f"base{random.choice(['.yaml', '.qpol'])}"
        line = f"extends: {parent}\n" if suffix == ".yaml" else f"extends {parent}\n"
        made = line + made
        if random.random() < 0.5:
            base = change.changed_policy(random, base, others)
        if random.random() < 0.2:
            base = f"extends: {name}\n{base}"
        _write(box / parent, base)
    _write(box / name, made)
    model = ["--model", str(seeds.source)]
    target = ["--target", random.choice(list(POLICIES))] if random.random() < 0.2 else []
    form = ["--format", random.choice(["text", "json", "markdown"])]
    commands = [
        ["check", name, *target],
        ["fmt", "--to", random.choice(["yaml", "dsl"]), name],
        ["plan", name, *model, *target, *form],
        ["explain", name, random.choice(TENSORS[:-3]), *model, *target, *form],
        random.choice([["fmt", "--check", name], ["check", name, *model], ["fmt", name]]),
    ]
    return Case(commands, [name])


def _write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def broken_checkpoint(seeds: Seeds, random: Random, box: Path) -> Case:
    """A checkpoint of any family with something wrong in its documents or files."""
    family = random.choice(list(seeds.checkpoints))
    # The files beside the tensors are read only where all else is well.
    beside = random.random() < 0.2
    if beside:
        family = random.choice(["llama", "qwen3_moe", "minimax_m2", "source", "llama_src"])
    folder = _linked(seeds.checkpoints[family], box / "model")
    for _ in range(random.choice([1, 1, 2])):
        kind = random.random()
        if beside:
            _change_beside(random, folder)
        elif kind < 0.5 and (folder / "config.json").is_file():
            _change_file(random, folder / "config.json")
        elif kind < 0.9:
            _change_any(random, folder)
        else:
            _odd_file(random, folder)
    target = random.choice(list(RULES))
    _write(box / "p.qpol", f"target {target}\n{RULES[target]}\n")
    commands = [
        ["inspect", "model", "--format", random.choice(["text", "json", "markdown"])],
        ["check", "p.qpol", "--model", "model"],
        ["plan", "p.qpol", "--model", "model", "--allow-requantize"],
    ]
    if beside or random.random() < 0.1:
        commands.append(["build", "p.qpol", "--model", "model", "-o", "out", "-q", "-j", "1"])
    return Case(commands, ["out"])


def _linked(folder: Path, to: Path) -> Path:
    """A copy whose files are hard links: what changes them would change their times."""
    shutil.copytree(folder, to, copy_function=os.link)
    return to


def _regular(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())


def _put(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def _change_file(random: Random, path: Path) -> None:
    content = path.read_bytes()
    if path.suffix == ".json":
        made = change.changed_json(random, content)
    elif path.suffix == ".safetensors":
        made = change.changed_safetensors(random, content)
    elif content.startswith(b"HFQM"):
        made = change.changed_hfq(random, content)
    else:
        made = change.changed_bytes(random, content)
    _put(path, made)


def _change_any(random: Random, folder: Path) -> None:
    # The first change may have left none.
    for path in random.sample(_regular(folder), k=min(1, len(_regular(folder)))):
        _change_file(random, path)


def _change_beside(random: Random, folder: Path) -> None:
    beside = [path for path in _regular(folder) if path.name not in ("config.json", "LICENSE")]
    _change_file(
        random, random.choice([path for path in beside if path.suffix in (".json", ".jinja")])
    )


def _odd_file(random: Random, folder: Path) -> None:
    """A pipe, a folder or a link where a file is expected, or a file of an odd name."""
    path = random.choice([*_regular(folder), folder / "notes.json"])
    if path.exists() and random.random() < 0.2:
        path.rename(folder / random.choice(["a\nb.json", "\x1b[31m.json", "é" * 100, "-x", "'"]))
        return
    if random.random() < 0.2:
        path = folder / random.choice(["notes.json", "merges.txt", "x.safetensors", "a.bin"])
    if path.is_dir() and not path.is_symlink():
        return
    path.unlink(missing_ok=True)
    kind = random.randrange(7)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 6:
        path.write_bytes(b"")
    else:
        outside = str(folder.parent.parent / "outside" / "secret.json")
        path.symlink_to([outside, "nowhere", path.name, "/dev/zero"][kind - 2])


def broken_bundle(target: str) -> Callable[[Seeds, Random, Path], Case]:
    """What makes a bundle of a target with something wrong in its documents or files."""

    def make(seeds: Seeds, random: Random, box: Path) -> Case:
        whole = random.choice([seeds.bundles[target], *seeds.bundles_of_others[target]])
        folder = _linked(whole, box / "bundle")
        for _ in range(random.choice([1, 1, 2])):
            _break_bundle(random, folder)
        source = ["--source", str(seeds.source)] if random.random() < 0.25 else []
        form = ["--format", random.choice(["text", "json", "markdown"])]
        commands = [
            ["verify", "bundle", "-j", "1", *source, *form],
            ["inspect", "bundle", *form],
            ["diff", "bundle", str(whole), *form],
        ]
        return Case(commands)

    return make


def _break_bundle(random: Random, folder: Path) -> None:
    kind = random.random()
    if kind < 0.3 and (folder / "policyc.json").is_file():
        _change_record(random, folder / "policyc.json")
    elif kind < 0.55 and (folder / "config.json").is_file():
        _change_file(random, folder / "config.json")
    elif kind < 0.92:
        _change_any(random, folder)
    else:
        _odd_file(random, folder)
    # Without its record, a bundle is read by what its metadata claim.
    record = folder / "policyc.json"
    if random.random() < 0.3 and not record.is_dir():
        record.unlink(missing_ok=True)


def _change_record(random: Random, path: Path) -> None:
    """Other values, half of the time with the digest that they have."""
    content = path.read_bytes()
    if random.random() < 0.5:
        _change_file(random, path)
        return
    try:
        text = change.json_of(change.changed_document(random, json.loads(content)))
        document = json.loads(text)
        made = json.dumps({**document, "digest": record_digest(document)}).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        made = change.changed_json(random, content)
    _put(path, made)


def broken_record(seeds: Seeds, random: Random, box: Path) -> Case:
    """A bundle whose record alone has something wrong."""
    folder = _linked(seeds.bundles[random.choice(list(POLICIES))], box / "bundle")
    _change_record(random, folder / "policyc.json")
    source = ["--source", str(seeds.source)] if random.random() < 0.2 else []
    form = ["--format", random.choice(["text", "json", "markdown"])]
    return Case([["verify", "bundle", "-j", "1", *source, *form], ["inspect", "bundle", *form]])


def broken_plan(seeds: Seeds, random: Random, box: Path) -> Case:
    """A saved plan, compared with a whole one."""
    whole = random.choice(seeds.plans)
    (box / "plan.json").write_bytes(change.changed_json(random, whole.read_bytes()))
    form = ["--format", random.choice(["text", "json", "markdown"])]
    sides = ["plan.json", str(whole)]
    random.shuffle(sides)
    return Case([["diff", *sides, *form]])


def broken_headers(seeds: Seeds, random: Random, box: Path) -> Case:
    """Recorded headers, sometimes compressed."""
    whole = random.choice(seeds.recorded)
    made, name = _changed_headers(random, whole.read_bytes()), "recorded.json"
    if random.random() < 0.2:
        made, name = gzip.compress(made, 1), "recorded.json.gz"
        made = change.changed_bytes(random, made) if random.random() < 0.3 else made
    (box / name).write_bytes(made)
    target = random.choice(list(RULES))
    _write(box / "p.qpol", f"target {target}\n{RULES[target]}\n")
    form = ["--format", random.choice(["text", "json", "markdown"])]
    commands = [["inspect", name, *form], ["plan", "p.qpol", "--model", name, *form]]
    # To plan for a whole MiniMax-M2.7, of 96,000 tensors, takes two seconds by itself.
    return Case(commands[: 1 if whole.name == LARGE else 2])


def _changed_headers(random: Random, content: bytes) -> bytes:
    kind = random.random()
    if kind < 0.4:
        return change.changed_json(random, content)
    document = json.loads(content)
    if kind < 0.6:
        document["config"] = change.changed_document(random, document["config"])
        return change.json_of(document).encode()
    document = change.changed_recorded(random, document)
    groups = [group for file in document["files"] for group in file["tensors"]]
    counts, nbytes = 0, 0
    for group in groups:
        count = 0
        for pattern in group["names"]:
            with contextlib.suppress(ValueError):
                count += len(expand_pattern(pattern, limit=10**5, letters=10**7))
        counts += count
        nbytes += count * prod(group["shape"]) * change.WIDTHS.get(group["dtype"], 2)
    document["totals"] = {"tensors": counts, "nbytes": nbytes}
    return json.dumps(document).encode()


def broken_statistics(seeds: Seeds, random: Random, box: Path) -> Case:
    """An importance matrix, of either form, or a ranking of experts."""
    if random.random() < 0.6:
        path = random.choice(seeds.imatrices)
        (box / path.name).write_bytes(change.changed_bytes(random, path.read_bytes()))
        rules = "target hipfire_hfq\nall: mq4; experts.gate_proj, experts.up_proj: mq4 by awq"
        _write(box / "p.qpol", f"{rules}\nembed, lm_head, router: q8; norm, router_bias: f16\n")
        model = ["--model", str(seeds.checkpoints["demo"])]
        return Case([["plan", "p.qpol", *model, "--imatrix", path.name]])
    path = random.choice(seeds.saliencies)
    content = path.read_bytes()
    is_json = path.suffix == ".json"
    made = (change.changed_json if is_json else change.changed_safetensors)(random, content)
    (box / path.name).write_bytes(made)
    _write(box / "p.qpol", "target mlx_affine\nprune experts to 2 by reap\nall: 4bit g32\n")
    model = seeds.source if is_json else seeds.checkpoints["demo"]
    given = ["--model", str(model), "--saliency", path.name]
    return Case([["plan", "p.qpol", *given], ["check", "p.qpol", *given]])


# What makes an input of each kind, and how many the whole has.
KINDS: dict[str, tuple[Callable[[Seeds, Random, Path], Case], int]] = {
    "policies": (broken_policy, 3000),
    "checkpoints": (broken_checkpoint, 2000),
    **{f"{target} bundles": (broken_bundle(target), 2000) for target in POLICIES},
    "records": (broken_record, 1000),
    "saved plans": (broken_plan, 1000),
    "recorded headers": (broken_headers, 1000),
    "imatrix, saliency": (broken_statistics, 1000),
}


@dataclass
class Counts:
    """What came of a kind's trials."""

    inputs: int = 0
    accepted: int = 0
    slowest: float = 0.0
    slowest_command: str = ""
    nbytes: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, trial: Trial, place: str) -> None:
        """Count a trial, which had this seed."""
        self.inputs += 1
        self.accepted += bool(trial.answers) and trial.answers[0].code == 0
        self.nbytes = max(self.nbytes, trial.nbytes)
        for answer in trial.answers:
            if answer.seconds > self.slowest:
                self.slowest = answer.seconds
                self.slowest_command = f"{place}: {' '.join(answer.command)}"
        for fault in trial.faults:
            self.faults[fault.partition(":")[0]] += 1
            self.examples.append(f"{place}: {fault}")


SEEDS: list[Seeds] = []


def run_chunk(kind: str, numbers: Sequence[int], seed: int, work: Path) -> list[tuple[str, Trial]]:
    """The trials of some inputs; each input depends on seed, kind and number alone."""
    found = []
    for number in numbers:
        trial = _tried(kind, number, seed, work)
        # The first to need a kernel compiles it for all: what is slow is slow twice.
        if any(fault.startswith("slow") for fault in trial.faults):
            trial = _tried(kind, number, seed, work)
        found.append((f"{kind} {number}", trial))
    return found


def _tried(kind: str, number: int, seed: int, work: Path) -> Trial:
    place = work / f"trial-{os.getpid()}"
    box = place / "box"
    box.mkdir(parents=True)
    (place / "outside").mkdir()
    (place / "outside" / "secret.json").write_text('{"secret": "of another folder"}')
    case = KINDS[kind][0](SEEDS[0], Random(f"{seed} {kind} {number}"), box)
    trial = try_input(box, case.commands, may_write=case.may_write)
    shutil.rmtree(place)
    return trial


def run_kinds(
    work: Path, kinds: dict[str, Sequence[int]], *, seed: int, workers: int
) -> Iterator[tuple[str, Counts]]:
    """The counts of each kind, in turn. work: an empty folder."""
    with silent():
        SEEDS[:] = [make_seeds(work)]
        _warm(work)
    gc.freeze()
    context: Any = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for kind, numbers in kinds.items():
            counts = Counts()
            chunks = [numbers[at : at + CHUNK] for at in range(0, len(numbers), CHUNK)]
            jobs = [pool.submit(run_chunk, kind, chunk, seed, work) for chunk in chunks]
            for job in jobs:
                for place, trial in job.result():
                    counts.add(trial, place)
            yield kind, counts


def _warm(work: Path) -> None:
    """Import and compile all that commands need."""
    for target, folder in SEEDS[0].bundles.items():
        policyc(["verify", str(folder), "--source", str(SEEDS[0].source), "-j", "1"])
        policyc(["diff", str(folder), str(work / f"{target}.plan.json"), "--format", "json"])
        policyc(["inspect", str(folder), "--format", "markdown"])
        policyc(["check", str(work / f"{target}.qpol"), "--model", str(SEEDS[0].source)])
    policyc(["fmt", "--check", "--", str(ROOT / "policies" / "config_i.yaml")])


def main() -> None:
    """Run the trials that the command line asks for; exit with 1 if one went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=[*KINDS], action="append")
    parser.add_argument("--number", type=int, action="append", help="one input, and its output")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ignore", action="append", default=[], help="a fault not to count")
    asked = parser.parse_args()
    chosen: dict[str, Sequence[int]] = {
        kind: asked.number or range(round(KINDS[kind][1] * asked.share) or 1)
        for kind in asked.kind or KINDS
    }
    columns = f"{'traceback':>10}{'slow':>6}{'hang':>6}{'memory':>8}{'files':>7}{'control':>9}"
    print(f"{'kind':24}{'inputs':>7}{'accepted':>9}{columns}{'slowest':>9}{'peak':>9}")
    wrong, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = run_kinds(Path(folder), chosen, seed=asked.seed, workers=asked.workers)
        for kind, counts in found:
            wrong += _show(kind, counts, asked.ignore)
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(1 if wrong else 0)


def _show(kind: str, counts: Counts, ignored: Sequence[str]) -> int:
    """Print a kind's line, and what went wrong; the number of faults."""
    names = {"traceback": 10, "slow": 6, "hang": 6, "memory": 8, "files": 7, "control": 9}
    columns = "".join(f"{counts.faults[name]:{width}}" for name, width in names.items())
    peak = f"{counts.nbytes / 2**20:.0f} MiB"
    line = f"{kind:24}{counts.inputs:7}{counts.accepted:9}{columns}"
    print(f"{line}{counts.slowest:7.2f} s{peak:>9}", flush=True)
    print(f"  slowest: {counts.slowest_command}")
    shown = [one for one in counts.examples if one.split(": ")[1] not in ignored]
    for example in shown:
        print(f"  {example}")
    return len(shown)


if __name__ == "__main__":
    main()
