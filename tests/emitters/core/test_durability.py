"""The order in which a build asks for writes, syncs and renames: what a crash can harm.

Held against a log of all that a build asks for, and against what a disk may have kept of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from child_builds import Planned
from event_log import Event, EventLog
from lost_writes import Node, after_power_loss, every_luck, everything, nothing
from small_checkpoints import Array, digests

from emitters.core import journal as journals
from emitters.core.build import Silent, build
from policy_dsl.diagnostics import PolicyError
from policy_dsl.plan import Module, PlannedTensor

TARGETS = ["mlx_affine", "jangtq_prestack", "hipfire_hfq", "gptq"]
# Other files than those of the build that is tried.
EIGHT_BITS = """
name: eight_bits
target: mlx_affine
output: {shard_size: 20KiB}
rules: 'all: 8bit; norm: keep'
"""
RULES = {
    "mlx_affine": "output shard_size 2MiB; all: 4bit; experts: 3bit; norm: keep",
    "jangtq_prestack": "all: 8bit affine; experts: 2bit mxtq; norm: f16",
    "hipfire_hfq": "all: q8; experts: mq4; norm: f16; router: q8; router_bias: f16",
    "gptq": "output shard_size 2MiB; experts: 4bit g32",
}


class Recorded:
    """A build that was recorded: its log, the folder before it, its plan."""

    def __init__(self, planned: Planned, work: Path, *, jobs: int, force: bool) -> None:
        self.plan = planned[0]
        self.out, self.root = work / "out", work / "out.partial"
        self.bundle, self.journal = self.root / "bundle", self.root / "journal"
        self.work, self.before = work, Node.read(work)
        log = EventLog(work)
        with log.recording():
            build(*planned, out=self.out, jobs=jobs, force=force)
        self.events = log.events

    def disk(self, stop: int) -> Node:
        """What power loss leaves of the folder just before an event, at the least."""
        return after_power_loss(self.before, self.work, self.events[:stop], nothing)

    def seen(self, stop: int) -> Node:
        """What the program sees just before an event."""
        return after_power_loss(self.before, self.work, self.events[:stop], everything)

    def held(self, node: Node, path: Path) -> Node:
        """What is there by a path. Raises: KeyError if nothing is."""
        return node.at(path.relative_to(self.work))

    def numbers(self, what: str, path: Path) -> list[int]:
        """The places in the log of what was asked for a path."""
        pairs = enumerate(self.events)
        return [number for number, one in pairs if (one.what, one.path) == (what, path)]

    def lines(self) -> Iterator[tuple[int, dict[str, list[list[int]]]]]:
        """The journal's lines, each with its place in the log."""
        for number in self.numbers("write", self.journal):
            yield number, json.loads(self.events[number].content)


@pytest.fixture
def record(demo, write_llama, planned, tmp_path, monkeypatch):
    """Records a build of the embedded model for a target; force: over a bundle of a Llama."""
    # A line for every few units, so that there are many.
    monkeypatch.setattr(journals, "SAVE_SECONDS", 0)

    def recorded(target: str = "mlx_affine", *, jobs: int = 2, force: bool = False) -> Recorded:
        work = tmp_path / "work"
        work.mkdir()
        if force:
            build(*planned(write_llama()), out=work / "out")
        policy = tmp_path / "policy.qpol"
        policy.write_text(f"target {target}\n{RULES[target]}\n")
        found = planned(demo, str(policy))
        return Recorded(found, work, jobs=jobs, force=force)

    return recorded


def rows_of(content: bytes, tensor: PlannedTensor, module: Module, span: list[int]) -> bytes:
    """The bytes of some rows of a module in one of its tensors; content: of the whole file."""
    held = np.frombuffer(content, np.uint8, tensor.nbytes, tensor.start)
    lines = tensor.shape[0] if tensor.by_columns else 1
    # Rows that are coded as one may share bytes.
    coded = held.reshape(lines, prod(module.shape[:-1]) // module.together, -1)
    first, stop = (row // module.together for row in span)
    assert [first * module.together, stop * module.together] == span
    return coded[:, first:stop].tobytes()


def test_the_log_is_all_that_happened(record):
    build_ = record(force=True)
    after = build_.seen(len(build_.events))
    now = Node.read(build_.work)
    assert (after.files(), after.folders()) == (now.files(), now.folders())


@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_on_the_disk_before_the_journal_names_them(record, target):
    recorded = record(target)
    (_, first), *others = recorded.lines()
    assert [*first] == ["identity"]
    assert len(others) > 5
    for number, line in others:
        disk = recorded.disk(number)
        for at, *span in line["done"]:
            module = recorded.plan.modules[at]
            for tensor in filter(lambda one: not one.is_constant, module.tensors):
                kept = recorded.held(disk, recorded.bundle / tensor.file).content
                whole = (recorded.out / tensor.file).read_bytes()
                rows = [rows_of(one, tensor, module, span) for one in (kept, whole)]
                assert rows[0] == rows[1]


@pytest.mark.parametrize("target", TARGETS)
def test_headers_are_on_the_disk_before_the_journal_begins(record, target):
    recorded = record(target)
    number = recorded.numbers("create", recorded.journal)[0]
    disk = recorded.disk(number)
    for file in recorded.plan.files:
        if file.kind != "tensors":
            continue
        whole = (recorded.out / file.name).read_bytes()
        kept = recorded.held(disk, recorded.bundle / file.name).content
        starts = [
            tensor.start
            for module in recorded.plan.modules
            for tensor in module.tensors
            if tensor.file == file.name
        ]
        assert len(kept) == len(whole)
        assert kept[: min(starts)] == whole[: min(starts)]


def test_every_line_of_the_journal_is_synced_before_what_comes_next(record):
    recorded = record()
    for number, _ in recorded.lines():
        on = [one for one in recorded.events[number + 1 :] if one.path == recorded.journal]
        assert on[0].what == "sync"


def renames(recorded: Recorded) -> list[tuple[int, Event]]:
    """The renames of a build, with their places in the log."""
    return [pair for pair in enumerate(recorded.events) if pair[1].what == "rename"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_is_on_the_disk_whole_before_it_gets_its_name(record, target, force):
    recorded = record(target, force=force)
    (number,) = (at for at, one in renames(recorded) if one.target == recorded.out)
    disk = recorded.held(recorded.disk(number), recorded.bundle)
    assert disk.files() == Node.read(recorded.out).files()


def test_so_are_side_files_in_folders_of_their_own(write_llama, planned, tmp_path):
    work, templates = tmp_path / "work", write_llama() / "additional_chat_templates"
    work.mkdir()
    templates.mkdir()
    (templates / "tool.jinja").write_text("{{ messages }}")
    recorded = Recorded(planned(templates.parent), work, jobs=1, force=False)
    (number,) = (at for at, one in renames(recorded) if one.target == recorded.out)
    disk = recorded.held(recorded.disk(number), recorded.bundle)
    assert disk.files()["additional_chat_templates/tool.jinja"] == b"{{ messages }}"


@pytest.mark.parametrize("force", [False, True])
def test_names_are_on_the_disk_before_anything_is_deleted(record, force):
    recorded = record(force=force)
    last = next(at for at, one in renames(recorded) if one.target == recorded.out)
    later = recorded.events[last:]
    first = last + next(at for at, one in enumerate(later) if one.what in ("unlink", "rmdir"))
    disk = recorded.held(recorded.disk(first), recorded.out)
    assert disk.files() == Node.read(recorded.out).files()


def test_a_replaced_bundle_is_on_the_disk_until_the_new_one_has_its_name(record):
    recorded = record(force=True)
    old = recorded.held(recorded.before, recorded.out).files()
    new = Node.read(recorded.out).files()
    first = renames(recorded)[0][0]
    places = [recorded.out, recorded.root / "replaced"]
    for number in range(first, len(recorded.events)):
        # Whatever is lost, one of both is there whole.
        for node in (recorded.disk(number), recorded.seen(number)):
            kept = []
            for place in places:
                try:
                    kept.append(recorded.held(node, place).files())
                except KeyError:
                    continue
            assert old in kept or new in kept


def test_the_record_is_written_after_all_that_it_speaks_of(record):
    recorded = record()
    own = recorded.bundle / "policyc.json"
    begun = recorded.numbers("create", own)[0]
    assert {one.path for one in recorded.events[begun:] if one.what == "write"} == {own}


@pytest.mark.parametrize("target", TARGETS)
def test_a_shard_that_somebody_deleted_does_not_come_back(demo, planned, tmp_path, target):
    policy = tmp_path / "policy.qpol"
    policy.write_text(f"target {target}\n{RULES[target]}\n")
    given = planned(demo, str(policy))
    files = [one.name for one in given[0].files if one.kind == "tensors"]
    path = tmp_path / "out.partial" / "bundle" / files[-1]

    class Deletes(Silent):
        def begin(self, stage: str, total: int, done: int) -> None:
            path.unlink(missing_ok=stage != "encode")

    with pytest.raises(PolicyError, match="No such file"):
        build(*given, out=tmp_path / "out", progress=Deletes())
    assert not path.exists()
    build(*given, out=tmp_path / "out", force=True)
    build(*given, out=tmp_path / "undisturbed")
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def power_losses(recorded: Recorded) -> Iterator[tuple[str, Node]]:
    """What power loss may leave at any moment of a build, each state once, with its history."""
    seen: set[int] = set()
    for number in range(len(recorded.events) + 1):
        events = recorded.events[:number]
        # Rows are many, and alike.
        if events and events[-1].path.suffix == ".safetensors" and number % 6:
            continue
        for kind, luck in every_luck(recorded.events).items():
            node = after_power_loss(recorded.before, recorded.work, events, luck)
            state = hash((frozenset(node.files().items()), frozenset(node.folders())))
            if state not in seen:
                seen.add(state)
                yield f"{', '.join(map(str, events[-1:]))}, {kind}", node


@contextmanager
def unsynced() -> Iterator[None]:
    """A context in which nothing waits for the disk: what is tried again is thrown away."""
    nothing_done = {name: lambda _: None for name in ("fsync", "fdatasync")}
    with patch.multiple(os, **nothing_done):
        yield


@pytest.mark.parametrize("over", ["nothing", "a bundle", "unfinished work"])
def test_whatever_power_loss_leaves_the_same_command_ends_as_ever(
    write_llama, planned, tmp_path, over
):
    work, lost = tmp_path / "work", tmp_path / "lost"
    work.mkdir()
    given, other = planned(write_llama()), planned(tmp_path / "source", EIGHT_BITS)
    if over == "a bundle":
        build(*other, out=work / "out")
    elif over == "unfinished work":
        interrupt(other, work / "out")
    force = over != "nothing"
    recorded = Recorded(given, work, jobs=1, force=force)
    whole, states = Node.read(recorded.out).files(), 0
    old = recorded.before.names["out"].files() if over == "a bundle" else {}
    for what, node in power_losses(recorded):
        shutil.rmtree(lost, ignore_errors=True)
        node.write_to(lost)
        left = node.names["out"].files() if "out" in node.names else {}
        assert left in ({}, old, whole), what
        # Its bundle has its name: the command would end with "output-exists".
        with unsynced():
            build(*given, out=lost / "out", jobs=1, force=force or left == whole)
        assert Node.read(lost / "out").files() == whole, what
        assert [path.name for path in lost.iterdir()] == ["out"], what
        states += 1
    assert states > 50


def turn_round(tensors: dict[str, tuple[str, Array]]) -> None:
    """Other values for each tensor of a model."""
    for name, (dtype, array) in tensors.items():
        tensors[name] = dtype, np.ascontiguousarray(array[::-1])


def interrupt(given: Planned, out: Path) -> None:
    """Leaves unfinished work behind, all rows of which are written."""

    class Interrupted(Silent):
        def begin(self, stage: str, total: int, done: int) -> None:
            if stage == "hash":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(*given, out=out, progress=Interrupted())


def refusals(given: Planned, out: Path) -> list[str]:
    """What a build is refused for; nothing if it is made."""
    try:
        build(*given, out=out, jobs=1)
    except PolicyError as error:
        return [finding.code for finding in error.diagnostics]
    return []


def test_work_that_was_thrown_away_does_not_come_back_half(write_llama, planned, tmp_path):
    work, lost = tmp_path / "work", tmp_path / "lost"
    work.mkdir()
    thrown, other = planned(write_llama()), planned(write_llama(turn_round, name="other"))
    build(*thrown, out=tmp_path / "undisturbed")
    whole, resumed = Node.read(tmp_path / "undisturbed").files(), 0
    interrupt(thrown, work / "out")
    recorded = Recorded(other, work, jobs=1, force=True)
    for what, node in power_losses(recorded):
        if "out" in node.names:
            continue
        shutil.rmtree(lost, ignore_errors=True)
        node.write_to(lost)
        with unsynced():
            refused = refusals(thrown, lost / "out")
        # Where rows of the other build are done, it is refused, as ever.
        assert refused in ([], ["other-build"]), what
        assert refused or Node.read(lost / "out").files() == whole, what
        resumed += not refused
    assert resumed > 0


def test_folders_above_the_output_are_on_the_disk(write_llama, planned, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    before, log, out = Node.read(work), EventLog(work), work / "some" / "where" / "out"
    with log.recording():
        build(*planned(write_llama()), out=out)
    disk = after_power_loss(before, work, log.events, nothing)
    assert disk.at(out.relative_to(work)).files() == Node.read(out).files()
