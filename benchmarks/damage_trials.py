"""Single damages to bundles of each target, and what `verify --source` says about them.

    python benchmarks/damage_trials.py --trials 500 --seed 0

A bundle is damaged in one place: a bit, a tensor of zeros, two tensors, modules or experts that
change places, rows that move on, a width in its metadata; with its record, without it, or held
against another model. Whether the damage leaves its bound is decided by `float64_bounds`.
Damages that do and were missed, and damages that do not and were reported, must both be 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from float64_bounds import IN, NEAR, OUT, floats, judged
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from emitters.core.verify import verify_bundle  # noqa: E402
from policy_dsl.sources.reference import open_source  # noqa: E402
from policyc.cli import main as policyc  # noqa: E402

Array = NDArray[Any]
DEMO = ROOT / "examples" / "tiny-minimax-m2"
HIDDEN, INNER, EXPERTS, LAYERS, HEADS = 256, 256, 3, 2, 4
POLICIES = {
    "mlx_affine": """
        all: 4bit g32
        experts.gate_proj: 2bit g64; experts.up_proj: 3bit g32; experts.down_proj: 6bit g32
        q_proj: 4bit mxfp4; k_proj: 8bit mxfp8; v_proj: 4bit nvfp4; o_proj: 5bit g64
        embed, lm_head: 8bit g64; router, norm: bf16""",
    "jangtq_prestack": """
        output pad_experts false
        all: 8bit affine; experts: 2bit mxtq; experts in layers 1: 3bit mxtq
        down_proj: 4bit mxtq; v_proj: 4bit affine g32; router, norm: f16""",
    "hipfire_hfq": """
        all: mq4; experts.gate_proj, experts.up_proj: mq2-lloyd; experts.down_proj: mq3-lloyd
        experts in layers 1: mq4; q_proj: hfq4; k_proj: hfq6; v_proj: mq6; o_proj: q8
        embed, router, lm_head: q8; norm, router_bias: f16""",
    "gptq": """
        experts.gate_proj: 2bit g32; experts.up_proj: 3bit g128; experts.down_proj: 4bit g64
        q_proj: 4bit g32 asym; k_proj: 8bit g64; v_proj: 4bit g128 by opt-rtn; o_proj: 8bit g128
        embed, lm_head, router, norm: keep""",
}
SETTINGS = ("no record", "no record", "with record", "another model")


def write_model(folder: Path, seed: int) -> dict[str, Array]:
    """A MiniMax-M2 of heavy-tailed random weights; its values, float64, by name."""
    random, tensors = np.random.default_rng(seed), {}

    def add(name: str, *shape: int, of: str = "BF16", mean: float = 0.0) -> None:
        values = (mean + 0.02 * random.standard_t(4, shape)).astype(np.float32)
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        tensors[name] = (of, bits if of == "BF16" else values)

    config = json.loads((DEMO / "config.json").read_text())
    vocabulary = config["vocab_size"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        add(name, vocabulary, HIDDEN)
    add("model.norm.weight", HIDDEN, mean=1)
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for name, rows in (("q", 256), ("k", 128), ("v", 128), ("o", HIDDEN)):
            add(f"{block}.self_attn.{name}_proj.weight", rows, 256)
        add(f"{block}.self_attn.q_norm.weight", 256, mean=1)
        add(f"{block}.self_attn.k_norm.weight", 128, mean=1)
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"{block}.{name}.weight", HIDDEN, mean=1)
        moe = f"{block}.block_sparse_moe"
        add(f"{moe}.gate.weight", EXPERTS, HIDDEN, of="F32")
        add(f"{moe}.e_score_correction_bias", EXPERTS, of="F32")
        for expert in range(EXPERTS):
            for name in ("w1", "w2", "w3"):
                add(f"{moe}.experts.{expert}.{name}.weight", 256, 256)
    config |= {
        "num_hidden_layers": LAYERS,
        "num_local_experts": EXPERTS,
        "attn_type_list": [1] * LAYERS,
        "torch_dtype": "bfloat16",
    }
    del config["quantization_config"]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for path in DEMO.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.startswith(("config", "model")):
            shutil.copy(path, folder / path.name)
    _write_safetensors(folder / "model.safetensors", tensors)
    return {name: floats(values.view(np.uint8), dtype) for name, (dtype, values) in tensors.items()}


def _write_safetensors(path: Path, tensors: Mapping[str, tuple[str, Array]]) -> None:
    header, at = {}, 0
    for name, (dtype, values) in tensors.items():
        stop = at + values.nbytes
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    with path.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for _, values in tensors.values():
            opened.write(values.tobytes())


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are. shape: as stored."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Subject:
    """A bundle to be damaged: its folder, where its tensors are, its modules by its record."""

    target: str
    folder: Path
    source: Path
    other: Path
    values: Mapping[str, Array]
    places: Mapping[str, Place]
    modules: Mapping[str, Any]

    def content(self, folder: Path, name: str) -> Array:
        """uint8: the bytes of a tensor in a copy of the bundle."""
        place = self.places[name]
        with (folder / place.file).open("rb") as opened:
            opened.seek(place.start)
            return np.frombuffer(opened.read(place.nbytes), np.uint8).copy()

    def put(self, folder: Path, name: str, content: Array) -> None:
        """Other bytes for a tensor."""
        place = self.places[name]
        with (folder / place.file).open("r+b") as opened:
            opened.seek(place.start)
            opened.write(content.tobytes())


def make_subject(work: Path, target: str) -> Subject:
    """The bundle of a target; checked to be right with and without its record."""
    source, other = work / "source", work / "other"
    values = write_model(source, 1) if not source.exists() else {}
    if not other.exists():
        write_model(other, 2)
    values = values or _read_values(source)
    policy = work / f"{target}.qpol"
    policy.write_text(f"target {target}\n{POLICIES[target]}\n")
    folder = work / target
    if policyc(["build", str(policy), "--model", str(source), "-o", str(folder), "-q"]):
        raise SystemExit(f"{target}: the bundle cannot be built")
    record = json.loads((folder / "policyc.json").read_text())
    places = {place.name: place for path in folder.iterdir() for place in _places(path)}
    return Subject(target, folder, source, other, values, places, _modules(record))


def _modules(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The modules of a record by name, each with what its form says and its tensors."""
    modules = {}
    for name, _, number, *_ in record["modules"]["rows"]:
        form = record["forms"][number]
        tensors = [f"{name}.{part}" if part else name for part in form["parts"]]
        modules[name] = {**form, "tensors": tensors}
    return modules


def _read_values(source: Path) -> dict[str, Array]:
    path = source / "model.safetensors"
    content = path.read_bytes()
    return {
        place.name: floats(
            np.frombuffer(content, np.uint8, place.nbytes, place.start), place.dtype
        ).reshape(place.shape)
        for place in _places(path)
    }


def _places(path: Path) -> Iterator[Place]:
    content = path.read_bytes() if path.is_file() else b""
    if content.startswith(b"HFQM"):
        for name, info in open_source(str(path)).tensors.items():
            yield Place(name, path.name, info.dtype, info.shape, info.start, info.nbytes)
    elif path.suffix == ".safetensors" and path.name.startswith("model"):
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name == "__metadata__":
                continue
            first, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            yield Place(name, path.name, entry["dtype"], shape, start + first, stop - first)


Random = np.random.Generator
# Changes a copy of the bundle; whether it must be reported whatever the values are.
Damage = Callable[[Subject, Path, Random], bool]


def flip_bit(subject: Subject, folder: Path, random: Random) -> bool:
    """One bit of a tensor's data."""
    # By names first: else nearly all would be codes of large matrices.
    name = random.choice(sorted(subject.places))
    content = subject.content(folder, name)
    content[random.integers(content.size)] ^= 1 << random.integers(8)
    subject.put(folder, name, content)
    return False


def zero_tensor(subject: Subject, folder: Path, random: Random) -> bool:
    """All bytes of a tensor become 0."""
    name = random.choice(sorted(subject.places))
    subject.put(folder, name, 0 * subject.content(folder, name))
    return False


def swap_tensors(subject: Subject, folder: Path, random: Random) -> bool:
    """Two tensors of one form change places."""
    forms: dict[Any, list[str]] = {}
    for name, place in subject.places.items():
        forms.setdefault((place.dtype, place.shape, place.nbytes), []).append(name)
    pairs = [names for names in forms.values() if len(names) > 1]
    one, two = random.choice(pairs[random.integers(len(pairs))], 2, replace=False)
    _exchange(subject, folder, [(one, two)])
    return False


def swap_modules(subject: Subject, folder: Path, random: Random) -> bool:
    """Two modules of one form change places with all their tensors."""
    forms: dict[str, list[list[str]]] = {}
    for known in subject.modules.values():
        held = [subject.places[name] for name in known["tensors"]]
        form = str([[one.dtype, one.shape, known["treatment"]] for one in held])
        forms.setdefault(form, []).append(known["tensors"])
    pairs = [modules for modules in forms.values() if len(modules) > 1]
    chosen = pairs[random.integers(len(pairs))]
    one, two = random.choice(len(chosen), 2, replace=False)
    _exchange(subject, folder, list(zip(chosen[one], chosen[two], strict=True)))
    return False


def _exchange(subject: Subject, folder: Path, pairs: list[tuple[str, str]]) -> None:
    for one, two in pairs:
        first, second = subject.content(folder, one), subject.content(folder, two)
        subject.put(folder, one, second)
        subject.put(folder, two, first)


def swap_experts(subject: Subject, folder: Path, random: Random) -> bool:
    """Two experts of a stack change places; of modules, where experts are apart."""
    stacks = [one for one in subject.modules.values() if len(one["shape"]) == 3]
    if not stacks:
        return swap_modules(subject, folder, random)
    chosen = stacks[random.integers(len(stacks))]
    one, two = random.choice(EXPERTS, 2, replace=False)
    for name in chosen["tensors"]:
        content = subject.content(folder, name)
        if content.size > 1:
            experts = content.reshape(EXPERTS, -1)
            experts[[one, two]] = experts[[two, one]]
            subject.put(folder, name, experts)
    return False


def move_rows(subject: Subject, folder: Path, random: Random) -> bool:
    """The rows of a tensor move on by one."""
    name = random.choice(sorted(subject.places))
    shape = subject.places[name].shape
    content = subject.content(folder, name)
    rows = shape[-2] if len(shape) > 1 else 1
    subject.put(folder, name, np.roll(content, content.size // (rows or 1)))
    return False


def change_width(subject: Subject, folder: Path, random: Random) -> bool:
    """A width that the metadata give for a module."""
    path = folder / "config.json"
    if not path.exists():
        return flip_bit(subject, folder, random)
    config = json.loads(path.read_text())
    # What mlx-lm does not read beside it changes nothing.
    read = {"quantization": config["quantization"]} if "quantization" in config else config
    entries = list(_entries(read))
    if not entries:
        return flip_bit(subject, folder, random)
    entry = entries[random.integers(len(entries))]
    entry["bits"] = 4 if entry["bits"] != 4 else 8
    path.write_text(json.dumps(config))
    return True


def _entries(config: Any) -> Iterator[dict[str, Any]]:
    """The widths of single modules: a default may be one that no module takes."""
    if isinstance(config, dict):
        is_default = any(isinstance(value, dict) for value in config.values())
        if type(config.get("bits")) is int and not is_default:
            yield config
        for value in config.values():
            yield from _entries(value)


DAMAGES: Mapping[Damage, float] = {
    flip_bit: 0.55,
    zero_tensor: 0.08,
    swap_tensors: 0.1,
    swap_modules: 0.07,
    swap_experts: 0.08,
    move_rows: 0.07,
    change_width: 0.05,
}


def bound_side(subject: Subject, folder: Path) -> str:
    """Whether some value of the damaged copy left its bound, without its record."""
    sides = {IN}
    for name, known in subject.modules.items():
        before = {one: subject.content(subject.folder, one) for one in known["tensors"]}
        after = {one: subject.content(folder, one) for one in known["tensors"]}
        if any((before[one] != after[one]).any() for one in before):
            sides.update(_module_sides(subject, name, known, before, after))
    return max(sides, key=(IN, NEAR, OUT).index)


def _module_sides(
    subject: Subject,
    name: str,
    known: Mapping[str, Any],
    before: Mapping[str, Array],
    after: Mapping[str, Array],
) -> Iterator[str]:
    treatment, shape = known["treatment"], known["shape"]
    if treatment["action"] != "quantize":
        yield OUT
        return
    stacked = len(shape) == 3
    for number in range(shape[0] if stacked else 1):
        parts, changed = {}, False
        for tensor in known["tensors"]:
            part = tensor.rpartition(".")[2]
            new, old = after[tensor], before[tensor]
            if part in ("tq_bits", "g_idx"):
                yield OUT if (new != old).any() else IN
                continue
            if stacked:
                new, old = new.reshape(shape[0], -1)[number], old.reshape(shape[0], -1)[number]
            lines = subject.places[tensor].shape[-2]
            parts[part] = new.reshape(-1, 2) if part == "tq_norms" else new.reshape(lines, -1)
            changed = changed or bool((new != old).any())
        if changed:
            values = subject.values[_source_name(name, number)]
            yield judged(values.reshape(shape[-2:]), parts, treatment, known["dtype"])


def _source_name(module: str, expert: int) -> str:
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    path, _, stack = module.rpartition(".switch_mlp.")
    return f"{path}.experts.{expert}.{names[stack]}.weight" if path else f"{module}.weight"


@dataclass
class Counts:
    """What came of the trials: by what was right and what was said."""

    found: int = 0
    passed: int = 0
    missed: int = 0
    false: int = 0
    undecided: int = 0
    examples: tuple[str, ...] = ()


def run_trials(subject: Subject, work: Path, trials: int, seed: int) -> Counts:
    """Damage the bundle so many times."""
    random, counts = np.random.default_rng(seed), Counts()
    source, other = open_source(str(subject.source)), open_source(str(subject.other))
    chances = np.array(list(DAMAGES.values()))
    for number in range(trials):
        setting = SETTINGS[number % len(SETTINGS)]
        folder = work / "damaged"
        shutil.copytree(subject.folder, folder)
        damage = list(DAMAGES)[random.choice(len(DAMAGES), p=chances / chances.sum())]
        must = damage(subject, folder, random)
        if setting != "with record":
            (folder / "policyc.json").unlink()
        given = other if setting == "another model" else source
        right = _truth(subject, folder, setting, must=must)
        report = verify_bundle(folder, given, jobs=1)
        _count(counts, right, report.ok, f"{damage.__name__}, {setting}, trial {number}")
        shutil.rmtree(folder)
    return counts


def _truth(subject: Subject, folder: Path, setting: str, *, must: bool) -> str:
    """The side on which a damaged copy is."""
    if must or setting == "another model":
        return OUT
    if setting == "with record":
        names = [path.name for path in subject.folder.iterdir() if path.is_file()]
        pairs = [((subject.folder / one), (folder / one)) for one in names]
        return IN if all(a.read_bytes() == b.read_bytes() for a, b in pairs) else OUT
    return bound_side(subject, folder)


def _count(counts: Counts, right: str, ok: bool, what: str) -> None:
    if right == NEAR:
        counts.undecided += 1
    elif right == OUT and ok:
        counts.missed += 1
        counts.examples += (f"missed: {what}",)
    elif right == IN and not ok:
        counts.false += 1
        counts.examples += (f"reported for nothing: {what}",)
    elif right == OUT:
        counts.found += 1
    else:
        counts.passed += 1


def main() -> None:
    """Run the trials that the command line asks for; exit with 1 if one went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=500, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=[*POLICIES], action="append")
    asked = parser.parse_args()
    wrong = Counter[str]()
    print(f"{'target':17}{'found':>8}{'passed':>8}{'missed':>8}{'false':>8}{'undecided':>11}")
    with tempfile.TemporaryDirectory() as folder:
        for target in asked.target or POLICIES:
            subject = make_subject(Path(folder), target)
            counts = run_trials(subject, Path(folder), asked.trials, asked.seed)
            print(
                f"{target:17}{counts.found:8}{counts.passed:8}{counts.missed:8}{counts.false:8}"
                f"{counts.undecided:11}"
            )
            for example in counts.examples:
                print(f"  {example}")
            wrong["all"] += counts.missed + counts.false
    sys.exit(1 if wrong["all"] else 0)


if __name__ == "__main__":
    main()
