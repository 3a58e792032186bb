"""Packed bundles, read by code that did not write them: words, zero points, groups, blocks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from small_checkpoints import Array, bf16, digests, stored, widened

from emitters import FORMATS
from emitters.core.build import build
from emitters.core.verify import verify_bundle
from policy_dsl.diagnostics import PolicyError
from policy_dsl.formats import UnstorableError
from policy_dsl.inventory import Inventory
from policy_dsl.plan import Plan
from policy_dsl.sources.reference import open_source
from policy_dsl.treatments import Coded
from policyc.cli import main

# What plain rounding loses of values of a bell curve in groups of 64, |W - D| / |W|.
LOSS = {2: 0.75, 3: 0.25, 4: 0.12, 8: 0.008}
# In 258 MiB most matrices of the Llama below are several blocks.
SMALL = 258 * 2**20
SYM, ASYM = (Coded("int", 8, 32, sym, "rtn") for sym in (True, False))
SEARCHED = replace(SYM, method="opt-rtn")
Planned = Callable[..., tuple[Plan, Inventory]]
WriteLlama = Callable[..., Path]


def policy(treatment: str, more: str = "") -> str:
    """A policy that packs every linear like that."""
    rules = f"  all: {treatment}\n  embed, lm_head: keep\n"
    return f"name: packed\ntarget: gptq\n{more}rules: |\n{rules}"


def opened(bundle: Path) -> dict[str, Array]:
    """The tensors that numpy has types for."""
    with safetensors.safe_open(bundle / "model.safetensors", "np") as file:
        names = [name for name in file.keys() if not name.endswith(".weight")]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def unpacked(words: Array, bits: int) -> Array:
    """The numbers in the bits of each column, from the lowest bit of the first word on."""
    columns = np.ascontiguousarray(words.T).view(np.uint8)
    stream = np.unpackbits(columns, axis=1, bitorder="little")
    weights = 1 << np.arange(bits)
    return (stream.reshape(len(columns), -1, bits) * weights).sum(axis=2)


def values_of(tensors: dict[str, Array], module: str, bits: int, offset: int) -> Array:
    """float64 [out, in]: scale * (code - zero point), as the format's readers define it."""
    codes = unpacked(tensors[f"{module}.qweight"], bits)
    zeros = unpacked(tensors[f"{module}.qzeros"].T, bits) + offset
    scales = tensors[f"{module}.scales"].astype(np.float64)
    groups = tensors.get(f"{module}.g_idx")
    if groups is None:
        groups = np.arange(codes.shape[1]) * len(scales) // codes.shape[1]
    found: Array = scales[groups].T * (codes - zeros[groups].T)
    return found


def source_of(folder: Path, module: str) -> Array:
    dtype, shape, content = stored(folder)[f"{module}.weight"]
    assert dtype == "BF16"
    values: Array = widened(content).reshape(shape)
    return values


def lost(wanted: Array, found: Array) -> float:
    return float(np.linalg.norm(wanted - found) / np.linalg.norm(wanted))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("storage", ["int", "int-gidx", "int-v2", "int-v2-gidx"])
def test_words_mean_what_the_format_says(
    write_llama: WriteLlama, planned: Planned, tmp_path: Path, bits: int, storage: str
) -> None:
    source, out = write_llama(), tmp_path / "out"
    build(*planned(source, policy(f"{bits}bit {storage} g64")), out=out)
    tensors, module = opened(out), "model.layers.0.mlp.down_proj"
    offset = 0 if "v2" in storage else 1
    wanted = source_of(source, module)
    assert lost(wanted, values_of(tensors, module, bits, offset)) < LOSS[bits]
    kinds = {name.removeprefix(f"{module}.") for name in tensors if name.startswith(module)}
    assert ("g_idx" in kinds) == ("gidx" in storage)
    assert verify_bundle(out, open_source(str(source)), jobs=1).ok


@pytest.mark.parametrize("group", ["g128", "g64", "g32", "g-1"])
@pytest.mark.parametrize(
    "chosen", ["sym by rtn", "asym by rtn", "sym by opt-rtn", "sym by opt-rtn-0.12.2"]
)
def test_every_group_and_method_decodes_near_to_its_source(
    write_llama: WriteLlama, planned: Planned, tmp_path: Path, group: str, chosen: str
) -> None:
    source, out = write_llama(hidden=128, inner=256), tmp_path / "out"
    text = policy(f"4bit int-v2 {group} {chosen}")
    build(*planned(source, text), out=out)
    module = "model.layers.1.self_attn.q_proj"
    found = values_of(opened(out), module, 4, 0)
    assert lost(source_of(source, module), found) < LOSS[4] * 1.2


def test_workers_and_blocks_do_not_matter(
    write_llama: WriteLlama, planned: Planned, tmp_path: Path
) -> None:
    source = write_llama(layers=2, hidden=256, inner=1024, vocabulary=2048)
    plan, inventory = planned(source, policy("4bit int g64 sym by opt-rtn"))
    found = []
    for jobs, max_memory in ((1, None), (4, None), (2, SMALL)):
        out = tmp_path / str(jobs)
        build(plan, inventory, out=out, jobs=jobs, max_memory=max_memory)
        found.append(digests(out))
    assert found.count(found[0]) == 3


def test_what_a_search_weighs_comes_from_an_importance_matrix(
    demo: Path, imatrix: Path, planned: Planned, tmp_path: Path
) -> None:
    text = policy("4bit int g64 sym by opt-rtn")
    build(*planned(demo, text), out=tmp_path / "even")
    plan, inventory = planned(demo, text, imatrix=imatrix)
    assert [one.name for one in plan.statistics] == ["imatrix"]
    build(plan, inventory, out=tmp_path / "weighed")
    even, weighed = opened(tmp_path / "even"), opened(tmp_path / "weighed")
    for module in ("self_attn.o_proj", "block_sparse_moe.experts.3.w2"):
        name = f"model.layers.2.{module}.scales"
        assert (even[name] != weighed[name]).any()


def test_a_zero_point_that_version_1_lacks_stops_the_build(
    write_llama: WriteLlama, planned: Planned, tmp_path: Path
) -> None:
    def rise(tensors: dict[str, Any]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        dtype, values = tensors[name]
        raised = widened(values.tobytes()).reshape(values.shape).copy()
        raised[5] = np.abs(raised[5]) + 0.01
        tensors[name] = dtype, bf16(raised)

    source, out = write_llama(rise), tmp_path / "out"
    plan, inventory = planned(source, policy("4bit int g64 asym"))
    with pytest.raises(PolicyError) as caught:
        build(plan, inventory, out=out)
    told = str(caught.value)
    assert 'tensor "model.layers.1.mlp.up_proj.weight": a group of row [5, 0]' in told
    assert "zero point 0" in told
    assert "int-v2" in told
    assert not out.exists()
    build(*planned(source, policy("4bit int-v2 g64 asym")), out=out, force=True)
    found = values_of(opened(out), "model.layers.1.mlp.up_proj", 4, 0)
    assert lost(source_of(source, "model.layers.1.mlp.up_proj"), found) < LOSS[4]


def refused(rows: list[Array], treatment: Coded) -> UnstorableError:
    """What stops 32 rows of 64 values, of which these are the last ones, the others even."""
    values = np.full((32, 64), 0.5, np.float32)
    values[:, ::2] *= -1
    values[32 - len(rows) :] = rows
    with pytest.raises(UnstorableError) as caught:
        FORMATS["gptq"].codec().encode(values, "F32", treatment)
    return caught.value


@pytest.mark.parametrize("treatment", [SYM, ASYM, SEARCHED])
@pytest.mark.parametrize("largest", [7e4, 3e7, 1e38])
def test_what_readers_would_see_as_infinite_is_too_large(treatment: Coded, largest: float) -> None:
    found = refused([np.linspace(0, largest, 64), np.linspace(-1, 1, 64)], treatment)
    # Not that it has no zero point: another one would not help.
    assert (found.row, found.reason) == (30, "")


@pytest.mark.parametrize("treatment", [SYM, ASYM, SEARCHED])
def test_what_is_nearly_too_large_is_packed(treatment: Coded) -> None:
    values = np.tile(np.linspace(-65000, 65000, 64, dtype=np.float32), (32, 1))
    treatment = replace(treatment, scheme="int-v2")
    parts = FORMATS["gptq"].codec().encode(values, "F32", treatment)
    seen = FORMATS["gptq"].codec().decode(parts, "F32", treatment, 64)
    assert np.abs(seen - values).max() < 1000


@pytest.mark.parametrize("storage", ["int", "int-gidx"])
def test_a_zero_point_that_is_missing_is_told_with_what_has_it(storage: str) -> None:
    found = refused([np.linspace(1, 2, 64)], replace(ASYM, scheme=storage))
    assert found.row == 31
    assert "the zero point 0; quantize it sym, or as int-v2" in found.reason
    assert (storage.replace("int", "int-v2") + " for readers") in found.reason
    # The smallest scales are rounded so much that codes do not reach the other extreme.
    beyond = refused([np.linspace(-0.0025609105, 0, 64)], replace(ASYM, scheme=storage))
    assert beyond.reason == "it has the zero point 256; quantize it sym"


def test_what_was_damaged_is_found(
    write_llama: WriteLlama, planned: Planned, tmp_path: Path
) -> None:
    source, out = write_llama(), tmp_path / "out"
    build(*planned(source, policy("4bit int-gidx g64")), out=out)
    plan, _ = planned(source, policy("4bit int-gidx g64"))
    groups = next(t for m in plan.modules for t in m.tensors if t.part == "g_idx")
    with (out / groups.file).open("r+b") as file:
        file.seek(groups.start)
        file.write(b"\1")
    (out / "policyc.json").unlink()
    assert not verify_bundle(out, open_source(str(source)), jobs=1).ok


def test_all_commands_know_the_target(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", os.fspath(demo)]
    assert main(["plan", "w4a16", *arguments]) == 0
    assert "4bit int g128 sym" in capsys.readouterr().out
    assert main(["build", "w4a16", *arguments, "-o", str(out)]) == 0
    capsys.readouterr()
    name = "model.layers.3.block_sparse_moe.experts.2.w3.qweight"
    assert main(["explain", "w4a16", name, *arguments]) == 0
    assert "4bit int g128 sym" in capsys.readouterr().out
    assert main(["inspect", str(out)]) == 0
    assert "4bit int g128 sym" in capsys.readouterr().out
    assert main(["verify", str(out), "--source", str(demo)]) == 0
    assert "all is well" in capsys.readouterr().out
    assert main(["diff", str(out), "mlx_4bit", *arguments]) == 0
