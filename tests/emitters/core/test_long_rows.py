"""Vectors and matrices of very long rows: memory stays bounded, and bytes are the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import numpy as np
import pytest
from child_builds import StoppedAt
from small_checkpoints import digests, stored

from emitters.core.build import build
from emitters.core.verify import verify_bundle
from policy_dsl.diagnostics import PolicyError
from policy_dsl.sources.reference import open_source

MIB = 2**20
needs_peaks = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peaks are read from /proc"
)
KEEP = "name: kept\ntarget: mlx_affine\nrules: |\n  all: keep\n"
CAST = "name: cast\ntarget: mlx_affine\nrules: |\n  all: f16\n"
EIGHT = 'name: eight\ntarget: mlx_affine\nrules: |\n  all: keep\n  "*.o_proj*": 8bit\n'
BIAS = "model.layers.0.self_attn.q_proj.bias"
ROW = "model.layers.0.self_attn.o_proj.weight"
# So little that a long row is several blocks.
SMALL = 257 * MIB
CHILD = """
import sys
from pathlib import Path
from policyc.cli import main
code = main(sys.argv[1:])
print("code", code, Path("/proc/self/status").read_text())
"""


def shapes(n: int) -> dict[str, list[int]]:
    """A Llama of hidden size 1 whose attention has n values: vectors and rows of n."""
    block, head = "model.layers.0.", n // 64
    found = {"model.embed_tokens.weight": [96, 1], "lm_head.weight": [96, 1]}
    found |= {"model.norm.weight": [1]}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        found[f"{block}{norm}.weight"] = [1]
    for name, length in (("q_proj", n), ("k_proj", head), ("v_proj", head)):
        found[f"{block}self_attn.{name}.weight"] = [length, 1]
        found[f"{block}self_attn.{name}.bias"] = [length]
    found |= {ROW: [1, n], ROW.replace("weight", "bias"): [1]}
    found |= {f"{block}mlp.{name}.weight": [128, 1] for name in ("gate_proj", "up_proj")}
    found[f"{block}mlp.down_proj.weight"] = [1, 128]
    return found


def write(
    folder: Path, n: int, values: np.ndarray | None = None, dtype: str = "F16", width: int = 2
) -> Path:
    """The model on disk: a file without blocks, or with these values, again and again."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "num_hidden_layers": 1,
        "hidden_size": 1,
        "intermediate_size": 128,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": n // 64,
        "vocab_size": 96,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    header, at = {}, 0
    for name, shape in shapes(n).items():
        nbytes = prod(shape) * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        if values is not None:
            for _ in range(at // values.nbytes + 1):
                file.write(values.tobytes())
        file.truncate(8 + len(text) + at)
    return folder


def tensor_offset(file: Path, name: str) -> int:
    """The first byte of a tensor in its file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return int(8 + length + json.loads(opened.read(length))[name]["data_offsets"][0])


def peak(*arguments: object) -> int:
    """Peak resident bytes of a command that succeeds."""
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    root = Path(__file__).parents[3]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "code 0" in ran.stdout, ran.stdout + ran.stderr
    found = re.search(r"VmHWM:\s+(\d+) kB", ran.stdout)
    assert found is not None
    return 1024 * int(found[1])


def numbers(count: int) -> np.ndarray:
    """So many float16 values, none of them small."""
    return (1 + np.random.default_rng(0).random(count)).astype(np.float16)


@pytest.fixture
def long_rows(tmp_path: Path) -> Path:
    """A model whose long rows are three of the smallest blocks, and not whole ones."""
    return write(tmp_path / "source", 64 * 3100, numbers(99_991))


@needs_peaks
@pytest.mark.parametrize(
    "bits", [25, pytest.param(29, marks=pytest.mark.slow)], ids=["64MiB", "1GiB"]
)
def test_a_vector_is_built_and_verified_within_the_memory_that_is_allowed(
    tmp_path: Path, bits: int
) -> None:
    # Of zeros: whether anything is lost is then looked at value by value.
    source = write(tmp_path / "source", 2**bits)
    (tmp_path / "keep.yaml").write_text(KEEP)
    policy, out = tmp_path / "keep.yaml", tmp_path / "out"
    model = ("--model", source, "-o", out)
    assert peak("build", policy, *model, "--max-memory", "300MiB", "-q") < 300 * MIB
    assert peak("verify", out) < 300 * MIB
    assert peak("verify", out, "--source", source) < 300 * MIB


@pytest.mark.parametrize("policy", [KEEP, CAST])
def test_blocks_inside_a_row_do_not_change_the_bytes(
    long_rows: Path, tmp_path: Path, planned, policy: str
) -> None:
    build(*planned(long_rows, policy), out=tmp_path / "whole", jobs=1)
    build(*planned(long_rows, policy), out=tmp_path / "split", jobs=2, max_memory=SMALL)
    assert digests(tmp_path / "split") == digests(tmp_path / "whole")
    source, made = stored(long_rows), stored(tmp_path / "split")
    assert made[BIAS] == source[BIAS]
    assert made[ROW] == source[ROW]


@pytest.mark.parametrize("blocks", range(1, 14, 2))
def test_a_build_interrupted_inside_a_row_goes_on_with_other_blocks(
    long_rows: Path, tmp_path: Path, planned, blocks: int
) -> None:
    made, out = planned(long_rows, KEEP), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(*made, out=out, jobs=1, max_memory=SMALL, progress=StoppedAt(blocks))
    report = build(*made, out=out, jobs=2, max_memory=SMALL + MIB)
    assert report.resumed_nbytes > 0
    build(*made, out=tmp_path / "undisturbed")
    assert digests(out) == digests(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("name", "place"), [(BIAS, "[150000]"), (ROW, "[0, 150000]")], ids=["vector", "row"]
)
def test_a_value_that_stops_the_build_is_named_with_its_place(
    long_rows: Path, tmp_path: Path, planned, name: str, place: str
) -> None:
    file = long_rows / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(tensor_offset(file, name) + 2 * 150_000)
        opened.write(np.float16(np.nan).tobytes())
    with pytest.raises(PolicyError) as caught:
        build(*planned(long_rows, KEEP), out=tmp_path / "out", max_memory=SMALL)
    (found,) = caught.value.diagnostics
    assert (found.code, name in found.message, place in found.message) == (
        "non-finite-source",
        True,
        True,
    )


def test_a_value_too_large_for_its_dtype_is_named_with_its_place(tmp_path, planned) -> None:
    source = write(tmp_path / "source", 64 * 3100, np.ones(1, np.float32), "F32", 4)
    file = source / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(tensor_offset(file, ROW) + 4 * 150_000)
        opened.write(np.float32(1e6).tobytes())
    with pytest.raises(PolicyError) as caught:
        build(*planned(source, CAST), out=tmp_path / "out", max_memory=SMALL)
    (found,) = caught.value.diagnostics
    assert found.code == "value-overflow"
    assert "1e+06 at [0, 150000]" in found.message
    assert "f32 would hold it" in (found.suggestion or "")


def test_a_row_of_which_nothing_would_be_left_stops_the_build(tmp_path, planned) -> None:
    source = write(tmp_path / "source", 64 * 3100, np.ones(1, np.float32), "F32", 4)
    file = source / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(tensor_offset(file, ROW))
        opened.write(np.full(64 * 3100, 1e-12, np.float32).tobytes())
    with pytest.raises(PolicyError) as caught:
        build(*planned(source, CAST), out=tmp_path / "out", max_memory=SMALL)
    assert [found.code for found in caught.value.diagnostics] == ["value-underflow"]


@pytest.mark.parametrize(
    ("name", "place"),
    [(BIAS, "row 0, column 150000"), (ROW, "row 0, column 150000")],
    ids=["vector", "row"],
)
def test_a_wrong_value_of_a_bundle_is_named_with_its_place(
    long_rows: Path, tmp_path: Path, planned, name: str, place: str
) -> None:
    build(*planned(long_rows, KEEP), out=tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.safetensors")
    with file.open("r+b") as opened:
        opened.seek(tensor_offset(file, name) + 2 * 150_000)
        opened.write(np.float16(7).tobytes())
    report = verify_bundle(tmp_path / "out", open_source(str(long_rows)), jobs=2)
    notes = [note for found in report.findings for note in found.notes]
    assert any(place in note and "1 value" in note for note in notes)


def test_a_row_that_is_coded_needs_memory_for_all_of_it_and_says_how_much(
    tmp_path: Path, planned
) -> None:
    made = planned(write(tmp_path / "source", 2**23), EIGHT)
    with pytest.raises(PolicyError) as caught:
        build(*made, out=tmp_path / "out", jobs=1, max_memory=300 * MIB)
    (found,) = caught.value.diagnostics
    assert found.code == "too-little-memory"
    assert "at least 369 MB = 352 MiB" in found.message.replace(".10", "").replace(".00", "")
    assert found.notes == (
        "model.layers.0.self_attn.o_proj: 8bit affine g64 takes a row, 8388608 values, at once",
    )
    assert not list(tmp_path.glob("out*"))


@needs_peaks
def test_what_is_said_to_be_enough_for_a_coded_row_is_enough(tmp_path: Path) -> None:
    source = write(tmp_path / "source", 2**23)
    (tmp_path / "eight.yaml").write_text(EIGHT)
    model = ("--model", source, "-o", tmp_path / "out")
    options = ("--max-memory", "352MiB", "-j", "2", "-q")
    assert peak("build", tmp_path / "eight.yaml", *model, *options) < 352 * MIB
