"""The last steps of a build: killed at any of them, or raced by another build for the place."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
from child_builds import Planned
from small_checkpoints import digests
from test_resume import FIVE_BITS, interrupted

from emitters.core.build import build
from emitters.core.workspace import check_contents, claimed
from policy_dsl.diagnostics import PolicyError
from policy_dsl.planning.record import record_digest


@pytest.fixture
def both(write_llama, planned) -> tuple[Planned, Planned]:
    """Plans of two policies for one source."""
    source = write_llama()
    return planned(source), planned(source, FIVE_BITS)


# What is done, one after the other, once a bundle is complete and takes another one's place.
def displace(out: Path, partial: Path) -> None:
    out.rename(partial / "replaced")


def name(out: Path, partial: Path) -> None:
    (partial / "bundle").rename(out)


def set_aside(out: Path, partial: Path) -> None:
    (partial / "replaced").rename(partial / "deleted")


def end_the_journal(out: Path, partial: Path) -> None:
    (partial / "journal").unlink()


def delete_some(out: Path, partial: Path) -> None:
    (partial / "deleted" / "config.json").unlink()
    (partial / "deleted" / "model.safetensors").unlink()


def delete_all_but_the_record(out: Path, partial: Path) -> None:
    for path in (partial / "deleted").iterdir():
        if path.name != "policyc.json":
            path.unlink()


def delete_the_record(out: Path, partial: Path) -> None:
    (partial / "deleted" / "policyc.json").unlink()


def delete_the_folder(out: Path, partial: Path) -> None:
    (partial / "deleted").rmdir()


def delete_the_lock(out: Path, partial: Path) -> None:
    (partial / "lock").unlink()


STEPS: list[Callable[[Path, Path], None]] = [
    *(displace, name, set_aside, end_the_journal, delete_some, delete_all_but_the_record),
    *(delete_the_record, delete_the_folder, delete_the_lock),
]


@pytest.fixture(params=range(len(STEPS)), ids=lambda at: STEPS[at].__name__)
def killed_after(request, both, tmp_path) -> str:
    """A build with `force` that was killed after one of its last steps; the step's name."""
    new, old = both
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    build(*old, out=tmp_path / "old")
    build(*new, out=tmp_path / "new")
    interrupted(new, out)
    shutil.rmtree(partial / "bundle")
    shutil.copytree(tmp_path / "new", partial / "bundle")
    shutil.copytree(tmp_path / "old", out)
    for step in STEPS[: request.param + 1]:
        step(out, partial)
    return STEPS[request.param].__name__


def test_a_build_that_was_killed_at_its_end_loses_nothing(killed_after, both, tmp_path):
    out = tmp_path / "out"
    # Without force nothing is lost, whichever of both has the name.
    with pytest.raises(PolicyError, match="output-exists"):
        build(*both[0], out=out)
    there = "old" if killed_after == "displace" else "new"
    assert digests(out) == digests(tmp_path / there)
    build(*both[0], out=out, force=True)
    assert digests(out) == digests(tmp_path / "new")
    assert not (tmp_path / "out.partial").exists()


def test_a_build_that_was_killed_at_its_end_stops_no_other(killed_after, both, tmp_path):
    out = tmp_path / "out"
    if out.exists():
        out.rename(tmp_path / "moved away")
    if killed_after in ("displace", "name"):
        # The bundle that was to be replaced is whole, and has its name again.
        with pytest.raises(PolicyError, match="output-exists"):
            build(*both[1], out=out)
        assert digests(out) == digests(tmp_path / "old")
    build(*both[1], out=out, force=killed_after in ("displace", "name"))
    assert digests(out) == digests(tmp_path / "old")
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_that_somebody_made_meanwhile_takes_no_bundle_with_it(both, tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    build(*both[1], out=out)
    before = digests(out)
    interrupted(both[0], tmp_path / "out2")
    (tmp_path / "out2.partial").rename(partial)
    displace(out, partial)
    out.mkdir()
    with pytest.raises(PolicyError, match="output-exists"):
        build(*both[0], out=out)
    assert digests(out) == before


def write_bundle(folder: Path, text: str) -> None:
    """The smallest bundle: one file and its record."""
    content = text.encode()
    entry = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record = {"schema_version": 2, "kind": "bundle", "files": {"a": entry}}
    (folder / "a").write_bytes(content)
    text = json.dumps({**record, "digest": record_digest(record)})
    (folder / "policyc.json").write_text(text)


def loop(out: Path, number: int, seconds: float, answers: Queue[Counter[str]]) -> None:
    """Builds again and again, as retry loops do; counts what came of it."""
    found: Counter[str] = Counter()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with claimed(out) as workspace:
                workspace.recover()
                check_contents(out, force=True)
                workspace.clear(())
                workspace.journal.write_text("{}\n")
                write_bundle(workspace.bundle, str(number))
                workspace.finish()
            found["finished"] += 1
            found["left"] += len(workspace.left)
        except PolicyError as error:
            found[error.diagnostics[0].code] += 1
        except OSError as error:
            found[type(error).__name__] += 1
    answers.put(found)


@pytest.mark.parametrize("seconds", [1.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_builds_that_take_turns_never_see_each_other_s_work(tmp_path, seconds):
    context = multiprocessing.get_context("spawn")
    answers: Queue[Counter[str]] = context.Queue()
    rivals = [
        context.Process(target=loop, args=(tmp_path / "out", number, seconds, answers))
        for number in range(2)
    ]
    for rival in rivals:
        rival.start()
    counted = [answers.get(timeout=120) for _ in rivals]
    for rival in rivals:
        rival.join()
    # What is finished may be said, and that another one is at work; nothing else.
    assert [found.keys() <= {"finished", "left", "output-in-use"} for found in counted] == [
        *(True, True)
    ], counted
    assert sum(found["finished"] for found in counted) > 10
    assert sum(found["left"] for found in counted) == 0
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "policyc.json"]


LINES = [
    *('{"done": 5}', '{"done": [5]}', '{"done": [[0, 0]]}', '{"done": [[0, 0, "8"]]}'),
    *('{"done": [[0, 9, 8]]}', '{"done": [[0, -8, 8]]}', '{"done": [[0, 0, true]]}', "[]"),
    *('{"done": ' + "[" * 100_000, '{"done": [[0, 0, ' + "9" * 5000 + "]]}", "\udcff\0"),
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:24])
def test_lines_of_a_journal_that_no_build_writes_count_for_nothing(both, tmp_path, line):
    interrupted(both[0], tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal"
    identity = journal.read_text().splitlines()[0]
    journal.write_bytes(f"{identity}\n{line}\n".encode("utf-8", "surrogateescape"))
    assert build(*both[0], out=tmp_path / "out").resumed_nbytes == 0


@pytest.mark.parametrize("line", [*LINES, "", '{"identity": 5}'], ids=lambda line: line[:24])
def test_a_journal_that_begins_as_none_does_is_none(both, tmp_path, line):
    interrupted(both[0], tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal"
    journal.write_bytes(f"{line}\n".encode("utf-8", "surrogateescape"))
    build(*both[1], out=tmp_path / "out")
