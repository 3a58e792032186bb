"""Whole documents of every kind, from which fuzz trials make broken ones."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import damage_trials
import gguf
from damage_trials import DEMO, POLICIES, ROOT

from policy_dsl.language.load import parse_policy
from policy_dsl.language.print_policy import print_dsl
from policyc.cli import main as policyc

GOLDEN = ROOT / "tests" / "golden"
DATA = ROOT / "examples" / "tiny-minimax-m2-data"
# Keys that published configs have beside those of the recorded ones.
USUAL = {
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "eos_token_id": [1, 2],
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32},
    "rope_parameters": {"full_attention": {"rope_theta": 10000.0, "rope_type": "default"}},
    "sliding_window": None,
    "transformers_version": "5.23.0",
    "auto_map": {"AutoConfig": "configuration_x.X"},
}
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "gate"],
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 2, "content": "</s>", "special": True, "normalized": False}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": ["a b"]},
}
SIDE_FILES = {
    "tokenizer.json": json.dumps(TOKENIZER),
    "tokenizer_config.json": json.dumps({"eos_token": "</s>", "chat_template": "{{ x }}"}),
    "generation_config.json": json.dumps({"eos_token_id": [1, 2], "temperature": 0.7}),
    "special_tokens_map.json": json.dumps({"eos_token": {"content": "</s>"}}),
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "LICENSE": "Do what you like.\n",
}


@dataclass(frozen=True)
class Seeds:
    """What trials start from. checkpoints: folders, families and recorded ones by name."""

    source: Path
    policies: Sequence[tuple[str, str]]
    checkpoints: Mapping[str, Path]
    bundles: Mapping[str, Path]
    bundles_of_others: Mapping[str, Sequence[Path]]
    plans: Sequence[Path]
    recorded: Sequence[Path]
    imatrices: Sequence[Path]
    saliencies: Sequence[Path]


def make_seeds(work: Path) -> Seeds:
    """Every seed, written below `work`."""
    bundles = {name: damage_trials.make_subject(work, name).folder for name in POLICIES}
    source = work / "source"
    checkpoints = dict(_checkpoints(work))
    plans, recorded = [], []
    for target in POLICIES:
        plans.append(work / f"{target}.plan.json")
        policy = str(work / f"{target}.qpol")
        _run("plan", policy, "--model", str(source), "--save", str(plans[-1]))
    for name in ("minimax_m2", "qwen3_5", "gpt_oss", "source_fp8"):
        recorded.append(work / f"{name}.recorded.json")
        _run("inspect", str(checkpoints[name]), "--save-headers", str(recorded[-1]))
    recorded.append(ROOT / "policy_dsl" / "catalog" / "minimax_m2.7.json")
    return Seeds(
        source,
        list(_policies(work)),
        checkpoints,
        bundles,
        {
            "mlx_affine": [],
            "jangtq_prestack": [checkpoints["jang"], checkpoints["jang_apart"]],
            "hipfire_hfq": [checkpoints["container"]],
            "gptq": [checkpoints["autoround"]],
        },
        plans,
        recorded,
        [DATA / "imatrix.gguf", _legacy_imatrix(work)],
        [DATA / "reap.safetensors", _json_saliency(work)],
    )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What commands print goes nowhere, errors too."""
    held = [os.dup(1), os.dup(2)]
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout.flush()
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            for number, kept in enumerate(held, 1):
                os.dup2(kept, number)
                os.close(kept)


def _run(*command: str) -> None:
    """Raises: SystemExit if the command fails on a whole document."""
    code = policyc(list(command))
    if code:
        raise SystemExit(f"{' '.join(command)}: {code}")


def _policies(work: Path) -> Iterator[tuple[str, str]]:
    """(suffix, text) of bundled policies in both forms, and of the language page."""
    for path in sorted((ROOT / "policies").glob("*.yaml")):
        text = path.read_text()
        yield ".yaml", text
        yield ".qpol", print_dsl(parse_policy(text, path.name)[0])
    for target in POLICIES:
        yield ".qpol", (work / f"{target}.qpol").read_text()
    page = (ROOT / "docs" / "language.md").read_text()
    for text in re.findall(r"^```\w*\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        yield (".yaml" if re.match(r"(#.*\n)*\w+:(\s|$)", text) else ".qpol"), text


def _checkpoints(work: Path) -> Iterator[tuple[str, Path]]:
    for number, path in enumerate(sorted((GOLDEN / "architectures").glob("*.json"))):
        document = json.loads(path.read_text())
        config = {**USUAL, **document["config"]}
        if number % 3 == 0:
            config["quantization_config"] = FP8
        folder = work / "families" / path.stem
        tensors = dict(_tensors(document.get("saved") or document["memory"]))
        yield path.stem, write_headers(folder, config, tensors, shards=1 + number % 2)
    for name, folder in {
        "source": work / "source",
        "demo": DEMO,
        "source_fp8": GOLDEN / "gptq_e2e" / "source_fp8",
        "autoround": GOLDEN / "gptq_e2e" / "autoround_w4g32_mixed",
        "jang": GOLDEN / "jangtq" / "micro_JANGTQ_K",
        "jang_apart": GOLDEN / "jangtq" / "micro_JANGTQ2_perexpert",
        "llama_src": GOLDEN / "hipfire" / "tiny-llama-src",
        "mlx_fp8": GOLDEN / "mlx" / "tiny_minimax_fp8" / "source",
    }.items():
        yield name, folder
    container = work / "container"
    container.mkdir()
    shutil.copy(GOLDEN / "hipfire" / "tiny-llama.mq4", container / "model.hfq")
    yield "container", container


def _tensors(entries: Mapping[str, str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as tests/golden/architectures/README.md has them."""
    for entry, role in entries.items():
        pattern, _, shape = entry.rpartition(" ")
        lengths = tuple(map(int, shape.split("x"))) if shape else ()
        for numbers in role.partition(": ")[2].split() or [""]:
            parts = iter(numbers.split("."))
            yield re.sub("#", lambda _, parts=parts: next(parts), pattern), lengths


def write_headers(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], *, shards: int
) -> Path:
    """A checkpoint of BF16 zeros, sparse on the disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name, text in SIDE_FILES.items():
        (folder / name).write_text(text)
    weight_map, names = {}, sorted(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        file = "model.safetensors" if shards == 1 else file
        header, at = {}, 0
        for name in names[shard::shards]:
            shape = tensors[name]
            nbytes = 2
            for length in shape:
                nbytes *= length
            place = [at, at + nbytes]
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": place}
            at += nbytes
            weight_map[name] = file
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + at)
    if shards > 1:
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _legacy_imatrix(work: Path) -> Path:
    """The demo's statistics in the form of older versions of llama.cpp."""
    entries: dict[str, dict[str, Any]] = {}
    for tensor in gguf.GGUFReader(DATA / "imatrix.gguf").tensors:
        name, _, part = tensor.name.rpartition(".")
        entries.setdefault(name, {})[part] = tensor.data.ravel()
    content = struct.pack("<i", len(entries))
    for name, parts in entries.items():
        sums, calls = parts["in_sum2"], int(parts["counts"].max())
        content += struct.pack("<i", len(name)) + name.encode()
        content += struct.pack("<ii", calls, len(sums)) + sums.tobytes()
    path = work / "legacy.dat"
    path.write_bytes(content + struct.pack("<ii", 8, 4) + b"text")
    return path


def _json_saliency(work: Path) -> Path:
    path = work / "saliency.json"
    rows = [[0.5, 2.0, 1.0], [3.0, 2.0, 1.0]]
    path.write_text(json.dumps({"model": "org/name", "tokens": 32768, "reap": rows}))
    return path
