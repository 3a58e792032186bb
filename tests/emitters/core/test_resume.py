"""A build that is killed, anywhere, goes on where it stopped and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from child_builds import KilledAt, Planned, Slow, start_build
from small_checkpoints import digests

from emitters.core.build import BuildReport, Silent, build
from emitters.core.work_units import fit, plan_units, total_source_nbytes
from policy_dsl.diagnostics import PolicyError

# So little that most matrices are several blocks.
SMALL = 258 * 2**20
FIVE_BITS = "name: five_bits\ntarget: mlx_affine\nrules: |\n  all: 5bit\n  norm: keep\n"


@pytest.fixture
def several_blocks(write_llama, planned) -> Planned:
    """A plan of some hundred blocks where memory is small, and its inventory."""
    found = planned(write_llama(layers=6, hidden=256, inner=1024, vocabulary=2048))
    _, block_values = fit(2, SMALL)
    assert len(list(plan_units(found[0], None, block_values))) > 100
    return found


@pytest.fixture
def expected(several_blocks: Planned, tmp_path: Path) -> dict[str, str]:
    """The files of an undisturbed build."""
    build(*several_blocks, out=tmp_path / "undisturbed")
    return digests(tmp_path / "undisturbed")


def resumed(planned: Planned, out: Path) -> BuildReport:
    """The report of a build that is left alone."""
    return build(*planned, out=out, jobs=2, max_memory=SMALL)


def kill_and_resume(planned: Planned, out: Path, moments: list[float]) -> int:
    """Kills so many children, each its seconds after something is saved; how many it hit."""
    hits, slow = 0, Slow(0.05)
    journal = out.with_name("out.partial") / "journal"
    for seconds in moments:
        started = start_build(planned, out=out, jobs=2, max_memory=SMALL, progress=slow)
        while started.is_alive() and not _has_saved(journal):
            time.sleep(0.01)
        time.sleep(seconds)
        started.kill()
        started.join()
        hits += started.exitcode == -signal.SIGKILL and out.with_name("out.partial").exists()
    return hits


def _has_saved(journal: Path) -> bool:
    """Whether it names rows, after the line that says what it is a journal of."""
    return journal.is_file() and journal.read_bytes().count(b"\n") > 1


def test_killed_builds_end_with_the_same_bytes(several_blocks, expected, tmp_path):
    out = tmp_path / "out"
    assert kill_and_resume(several_blocks, out, [0.3, 0.4, 0.2]) == 3
    assert resumed(several_blocks, out).resumed_nbytes > 0
    assert digests(out) == expected
    assert not out.with_name("out.partial").exists()


@pytest.mark.slow
def test_twenty_random_moments(several_blocks, expected, tmp_path):
    moments = [random.Random(3).uniform(0.01, 1.6) for _ in range(20)]
    hits = 0
    for number, moment in enumerate(moments):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        hits += kill_and_resume(several_blocks, out, [moment, moment / 3])
        resumed(several_blocks, out)
        assert digests(out) == expected
    assert hits > 20


@pytest.mark.parametrize("stage", ["encode", "hash"])
@pytest.mark.parametrize("end", [False, True])
def test_killed_between_stages(several_blocks, expected, tmp_path, stage, end):
    out, at = tmp_path / "out", KilledAt(stage, end=end)
    started = start_build(several_blocks, out=out, jobs=2, progress=at)
    started.join()
    assert started.exitcode == -signal.SIGKILL
    assert not out.exists()
    report = resumed(several_blocks, out)
    assert (report.resumed_nbytes > 0) == ((stage, end) != ("encode", False))
    assert digests(out) == expected


@pytest.mark.parametrize(("layout", "end"), [("prestacked", False), ("per_expert", True)])
def test_what_no_source_has_outlives_a_crash(demo, planned, tmp_path, layout, end):
    """Widths, router corrections and zeros of added experts are in the files from the start."""
    rules = "rules: 'all: f16; experts: 2bit'\n"
    policy = f"target: jangtq_prestack\noutput: {{layout: {layout}}}\n{rules}"
    padded = planned(demo, policy)
    at = KilledAt("encode", end=end)
    started = start_build(padded, out=tmp_path / "out", progress=at)
    started.join()
    assert started.exitcode == -signal.SIGKILL
    build(*padded, out=tmp_path / "undisturbed")
    assert (build(*padded, out=tmp_path / "out").resumed_nbytes > 0) == end
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def test_ctrl_c_keeps_what_is_finished(several_blocks, expected, tmp_path):
    class Interrupted(Silent):
        def advance(self, nbytes: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(*several_blocks, out=tmp_path / "out", progress=Interrupted(), max_memory=SMALL)
    assert resumed(several_blocks, tmp_path / "out").resumed_nbytes > 0
    assert digests(tmp_path / "out") == expected


def interrupted(planned: Planned, out: Path) -> None:
    """Leaves an unfinished build behind, all rows of which are written."""

    class Stop(Silent):
        def begin(self, stage: str, total: int, done: int) -> None:
            if stage == "hash":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(*planned, out=out, progress=Stop())


def test_a_torn_journal_is_read_to_its_last_whole_line(several_blocks, expected, tmp_path):
    interrupted(several_blocks, tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal"
    journal.write_bytes(journal.read_bytes() + b'{"done":[[0,0')
    assert resumed(several_blocks, tmp_path / "out").resumed_nbytes > 0
    assert digests(tmp_path / "out") == expected


def test_another_policy_is_refused_and_force_starts_over(
    several_blocks, planned, write_llama, tmp_path
):
    interrupted(several_blocks, tmp_path / "out")
    other = planned(tmp_path / "source", FIVE_BITS)
    with pytest.raises(PolicyError) as caught:
        build(*other, out=tmp_path / "out")
    assert [found.code for found in caught.value.diagnostics] == ["other-build"]
    assert "another policy" in str(caught.value)
    assert build(*other, out=tmp_path / "out", force=True).resumed_nbytes == 0
    build(*other, out=tmp_path / "fresh")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_another_policy_starts_over_where_nothing_is_done(several_blocks, planned, tmp_path):
    at = KilledAt("encode", end=False)
    started = start_build(several_blocks, out=tmp_path / "out", progress=at)
    started.join()
    assert (tmp_path / "out.partial" / "journal").exists()
    build(*planned(tmp_path / "source", FIVE_BITS), out=tmp_path / "out")


def test_a_source_that_was_written_again_is_refused(several_blocks, planned, tmp_path):
    interrupted(several_blocks, tmp_path / "out")
    os.utime(tmp_path / "source" / "model.safetensors")
    again = planned(tmp_path / "source")
    with pytest.raises(PolicyError, match="another source, or of another state of it"):
        build(*again, out=tmp_path / "out")


def test_what_is_written_after_a_torn_line_is_not_lost_with_it(several_blocks, tmp_path):
    interrupted(several_blocks, tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal"
    identity = journal.read_text().splitlines()[0]
    journal.write_text(f'{identity}\n{{"done":[[0,0')
    interrupted(several_blocks, tmp_path / "out")
    plan, _ = several_blocks
    again = resumed(several_blocks, tmp_path / "out")
    assert again.resumed_nbytes == total_source_nbytes(plan)


@pytest.mark.parametrize(
    ("part", "told"), [("policyc", "another version of policyc"), ("plan", "another plan")]
)
def test_another_version_or_plan_is_refused(several_blocks, tmp_path, part, told):
    interrupted(several_blocks, tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal"
    journal.write_text(journal.read_text().replace(f'"{part}":"', f'"{part}":"9.', 1))
    with pytest.raises(PolicyError, match=told):
        build(*several_blocks, out=tmp_path / "out")


def test_rows_are_redone_where_the_journal_has_gaps(several_blocks, expected, tmp_path):
    interrupted(several_blocks, tmp_path / "out")
    partial = tmp_path / "out.partial"
    shard = partial / "bundle" / "model.safetensors"
    plan, whole = several_blocks[0], shard.read_bytes()
    start = min(tensor.start for module in plan.modules for tensor in module.tensors)
    # Workers end in any order: here only rows 100 to 199 of every module were done in time.
    shard.write_bytes(whole[:start] + bytes(len(whole) - start))
    kept = {}
    for at, module in enumerate(plan.modules):
        n_rows = module.sources[0].n_rows
        if n_rows < 200:
            continue
        kept[at] = (100, 200)
        with shard.open("r+b") as opened:
            for tensor in module.tensors:
                width = tensor.nbytes // n_rows
                first, last = (tensor.start + row * width for row in kept[at])
                opened.seek(first)
                opened.write(whole[first:last])
    identity = (partial / "journal").read_text().splitlines()[0]
    done = json.dumps({"done": [[at, *span] for at, span in kept.items()]})
    (partial / "journal").write_text(f"{identity}\n{done}\n")
    assert resumed(several_blocks, tmp_path / "out").resumed_nbytes > 0
    assert digests(tmp_path / "out") == expected


def test_a_partial_that_lost_a_file_is_refused(several_blocks, expected, tmp_path):
    interrupted(several_blocks, tmp_path / "out")
    (tmp_path / "out.partial" / "bundle" / "model.safetensors").unlink()
    with pytest.raises(PolicyError, match="damaged-partial"):
        build(*several_blocks, out=tmp_path / "out")
    build(*several_blocks, out=tmp_path / "out", force=True)
    assert digests(tmp_path / "out") == expected


def test_one_build_at_a_time(several_blocks, tmp_path):
    out = tmp_path / "out"

    class Rival(Silent):
        def begin(self, stage: str, total: int, done: int) -> None:
            with pytest.raises(PolicyError, match="output-in-use"):
                build(*several_blocks, out=out, force=True)

    build(*several_blocks, out=out, progress=Rival())
    assert out.exists()


def test_a_crash_between_the_last_two_renames_loses_nothing(several_blocks, expected, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    shutil.copytree(tmp_path / "undisturbed", out)
    # What a file browser leaves is no reason to refuse, and marks the old bundle here.
    (out / ".DS_Store").write_text("of the old bundle")
    at = KilledAt("hash", end=True)
    started = start_build(several_blocks, out=out, force=True, progress=at)
    started.join()
    out.rename(partial / "replaced")
    with pytest.raises(PolicyError, match="output-exists"):
        build(*several_blocks, out=out)
    assert (out / ".DS_Store").exists()
    build(*several_blocks, out=out, force=True)
    assert digests(out) == expected


def test_a_crash_after_the_last_rename_does_not_stop_later_builds(
    several_blocks, expected, tmp_path
):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    shutil.copytree(tmp_path / "undisturbed", out)
    # The new bundle has its name, and the old one was not deleted yet.
    shutil.copytree(out, partial / "replaced")
    build(*several_blocks, out=out, force=True)
    assert digests(out) == expected
    assert not partial.exists()
