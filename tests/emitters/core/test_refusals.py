"""What stops a build: each with one clear error, the source and older bundles as they were."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from child_builds import FullDisk, refusals_of_build
from small_checkpoints import Array, bf16, digests

from emitters.core.build import Silent, build
from policy_dsl.diagnostics import PolicyError
from policy_dsl.sources.reference import open_source

NORM_KEPT = "name: other\ntarget: mlx_affine\nrules: |\n"
GATE = "model.layers.1.mlp.gate_proj.weight"
# BF16 bits that F16 cannot hold, an infinity -> what becomes of their tensor instead.
CURES = {0x7F00: "bf16", 0x7F80: "drop"}


def refusal(*arguments: object, **options: object) -> str:
    """The rendered errors of a build that must fail, and leave nothing by the output's name."""
    with pytest.raises(PolicyError) as caught:
        build(*arguments, **options)
    return str(caught.value)


def poke(name: str, row: int, column: int, bits: int) -> Callable[[dict], None]:
    """A change of one value of a checkpoint."""

    def change(tensors: dict[str, tuple[str, Array]]) -> None:
        tensors[name][1][row, column] = bits

    return change


def widen(tensors: dict[str, tuple[str, Array]]) -> None:
    """Two values of a group: both are finite, their distance is more than float32 can hold."""
    tensors[GATE][1][100, 7:9] = 0x7F7F, 0xFF7F


@pytest.mark.parametrize(("bits", "value"), [(0x7F80, "inf"), (0xFF80, "-inf"), (0x7FC1, "nan")])
def test_a_value_that_is_not_finite_is_named(write_llama, planned, tmp_path, bits, value):
    plan, inventory = planned(write_llama(poke(GATE, 100, 7, bits)))
    told = refusal(plan, inventory, out=tmp_path / "out")
    assert told.startswith(f'error[non-finite-source]: tensor "{GATE}" holds {value} at [100, 7]')
    assert not (tmp_path / "out").exists()


def test_fp8_codes_and_scales_that_are_not_finite_are_named(demo, planned, tmp_path):
    for name, content, place in (
        ("weight", b"\x7f", "[1, 3]"),
        ("weight_scale_inv", np.float32(np.inf).tobytes(), "[0, 1]"),
    ):
        source = tmp_path / name
        shutil.copytree(demo, source)
        inventory = open_source(str(source))
        tensor = inventory.tensors[f"model.layers.2.self_attn.q_proj.{name}"]
        at = int(place[1]) * tensor.shape[-1] + int(place[4])
        with (source / str(tensor.file)).open("r+b") as opened:
            opened.seek(tensor.start + at * len(content))
            opened.write(content)
        told = refusal(*planned(source, "config_i"), out=tmp_path / f"{name}-built")
        assert f'tensor "{tensor.name}" holds' in told
        assert place in told


def test_a_value_too_large_for_its_dtype_is_named(write_llama, planned, tmp_path):
    source = write_llama(poke("lm_head.weight", 5, 6, 0x7F00))
    rules = "  all: 4bit\n  norm: keep\n  lm_head: f16\n"
    told = refusal(*planned(source, NORM_KEPT + rules), out=tmp_path / "out")
    assert 'tensor "lm_head.weight": 1.701e+38 at [5, 6] is too large for F16' in told
    assert "6 |   lm_head: f16\n  |            ^^^ bf16 or f32 would hold it" in told


def test_a_group_too_wide_for_its_scale_is_named(write_llama, planned, tmp_path):
    told = refusal(*planned(write_llama(widen)), out=tmp_path / "out")
    assert told.startswith("error[value-overflow]")
    where = f'tensor "{GATE}": a group of row [100, 0] is too large for 4bit affine g64'
    assert f"{where}, whose scales are BF16" in told
    assert "^^^^ bf16 or f32 would hold it" in told


def test_what_would_hold_a_value_does(write_llama, planned, tmp_path):
    rules = NORM_KEPT + "  all: 4bit\n  norm: keep\n  lm_head: f16\n"
    source = write_llama(poke("lm_head.weight", 5, 6, 0x7F00))
    told = refusal(*planned(source, rules), out=tmp_path / "out")
    cure = re.search(r"\^ (.*) would hold it", told)
    assert cure is not None
    for dtype in cure[1].split(" or "):
        cured = f"{rules}  lm_head: {dtype}\n"
        build(*planned(source, cured), out=tmp_path / dtype)


def test_where_no_plain_dtype_holds_a_value_none_is_named(write_llama, planned, tmp_path):
    """hipfire has no matrices of F32; another of its schemes holds the value."""

    def enlarge(tensors: dict[str, tuple[str, Array]]) -> None:
        tensors["lm_head.weight"][1][77, :2] = bf16(np.array([1e8, -1e8], np.float32))

    source = write_llama(enlarge, hidden=256, inner=256)
    policy = "name: q\ntarget: hipfire_hfq\nrules: |\n  all: q8\n  norm: f16\n"
    told = refusal(*planned(source, policy), out=tmp_path / "out")
    assert "no plain dtype of hipfire_hfq holds it; try another scheme" in told
    build(*planned(source, f"{policy}  lm_head: mq6\n"), out=tmp_path / "cured")


@pytest.mark.parametrize("value", [0x7F00, 0x7F80])
def test_a_value_that_stops_a_build_leaves_nothing_in_the_way(
    write_llama, planned, tmp_path, value
):
    """Neither the same policy nor another one can go on with that work."""
    source = write_llama(poke("lm_head.weight", 5, 6, value))
    rules = "  all: 4bit\n  norm: keep\n"
    refusal(*planned(source, f"{NORM_KEPT}{rules}  lm_head: f16\n"), out=tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    cured = planned(source, f"{NORM_KEPT}{rules}  lm_head: {CURES[value]}\n")
    build(*cured, out=tmp_path / "out")


def test_headers_alone_cannot_be_built(planned, tmp_path):
    told = refusal(*planned(Path("minimax-m2.7"), "config_i"), out=tmp_path / "out")
    assert told.startswith("error[source-without-files]")


def test_an_existing_output_stays_unless_forced(write_llama, planned, tmp_path):
    plan, inventory = planned(write_llama())
    out = tmp_path / "out"
    build(plan, inventory, out=out)
    before = digests(out)
    assert refusal(plan, inventory, out=out).startswith("error[output-exists]")
    changed = planned(tmp_path / "source", NORM_KEPT + "  all: 8bit\n  norm: keep\n")
    build(*changed, out=out, force=True)
    assert digests(out).keys() == before.keys()
    assert digests(out) != before


def test_a_failed_forced_build_leaves_the_old_bundle(write_llama, planned, tmp_path):
    out = tmp_path / "out"
    build(*planned(write_llama()), out=out)
    before = digests(out)
    broken = write_llama(poke(GATE, 0, 0, 0x7F80), name="broken")
    refusal(*planned(broken), out=out, force=True)
    assert digests(out) == before


def test_force_replaces_nothing_but_bundles(write_llama, planned, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    told = refusal(*planned(write_llama(name="one")), out=tmp_path / "out")
    # What is no cure is not offered as one.
    assert told.startswith("error[output-exists]")
    assert "--force" not in told
    told = refusal(*planned(write_llama()), out=tmp_path / "out", force=True)
    assert told.startswith("error[output-not-a-bundle]")
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_force_does_not_delete_what_stands_beside_a_bundle(write_llama, planned, tmp_path):
    out = tmp_path / "out"
    build(*planned(write_llama()), out=out)
    (out / "notes.txt").write_text("mine")
    told = refusal(*planned(write_llama(name="other")), out=out, force=True)
    assert told.startswith("error[output-has-other-files]")
    assert "notes.txt" in told
    assert (out / "notes.txt").read_text() == "mine"


def test_a_folder_that_only_has_the_name_of_unfinished_work_stays(write_llama, planned, tmp_path):
    notes = tmp_path / "out.partial" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    told = refusal(*planned(write_llama()), out=tmp_path / "out", force=True)
    assert told.startswith("error[output-has-other-files]")
    assert os.listdir(notes.parent) == ["notes.txt"]
    assert notes.read_text() == "mine"


@pytest.mark.parametrize("place", ["source", "source/out", "."])
def test_the_source_is_never_an_output(write_llama, planned, tmp_path, place):
    source = write_llama()
    before = digests(source)
    told = refusal(*planned(source), out=tmp_path / place, force=True)
    assert told.startswith("error[output-in-source]")
    assert digests(source) == before


def test_a_source_that_goes_away_or_changes_is_told(write_llama, planned, tmp_path):
    source = write_llama()
    shard = source / "model.safetensors"
    content = shard.read_bytes()

    class Meddler(Silent):
        def __init__(self, meddle: Callable[[], object]) -> None:
            self.meddle = meddle

        def begin(self, stage: str, total: int, done: int) -> None:
            self.meddle()

    for meddle, code in (
        (lambda: os.truncate(shard, len(content) // 2), "source-changed"),
        (lambda: os.utime(shard, ns=(1, 1)), "source-changed"),
        (shard.unlink, "unreadable-file"),
    ):
        shard.write_bytes(content)
        made = planned(source)
        told = refusal(*made, out=tmp_path / "out", progress=Meddler(meddle), force=True)
        assert told.startswith(f"error[{code}]")
    assert refusal(*made, out=tmp_path / "out").startswith("error[unreadable-file]")


def test_too_little_memory_is_told(write_llama, planned, tmp_path):
    told = refusal(*planned(write_llama()), out=tmp_path / "out", max_memory=10**8)
    assert told.startswith("error[too-little-memory]")


def test_a_full_disk_is_told_and_the_build_goes_on_later(write_llama, planned, tmp_path):
    plan, inventory = planned(write_llama())

    told = refusals_of_build((plan, inventory), out=tmp_path / "out", progress=FullDisk())
    assert told == ["disk-full"]
    assert not (tmp_path / "out").exists()
    build(plan, inventory, out=tmp_path / "out")
    build(plan, inventory, out=tmp_path / "other")
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with these options; skips where that is not permitted."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounted = []

    def make(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    yield make
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    write_llama, planned, tmp_path, mount
):
    small = mount("size=1m")
    told = refusal(*planned(write_llama()), out=small / "out")
    assert told.startswith("error[disk-full]")
    assert list(small.iterdir()) == []


def test_a_disk_that_fills_up_is_told(write_llama, planned, tmp_path, mount):
    plan, inventory = planned(write_llama())
    small = mount("size=18m")

    class Filling(Silent):
        def begin(self, stage: str, total: int, done: int) -> None:
            with pytest.raises(OSError, match="No space left"):
                (small / "ballast").write_bytes(bytes(18 * 2**20))

    told = refusal(plan, inventory, out=small / "out", progress=Filling())
    assert told.startswith("error[disk-full]")
    (small / "ballast").unlink()
    build(plan, inventory, out=small / "out")
    build(plan, inventory, out=tmp_path / "other")
    assert digests(small / "out") == digests(tmp_path / "other")


def test_an_output_that_cannot_be_written_is_told(write_llama, planned, mount):
    read_only = mount("ro")
    told = refusal(*planned(write_llama()), out=read_only / "out")
    assert told.startswith("error[unwritable-output]")
