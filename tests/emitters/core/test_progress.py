"""How a build tells how far it is, without a terminal."""

from __future__ import annotations

import io
import json

from emitters.core.build import Silent, build
from policyc.cli.bundles import Lines, clock


class Recorder(Silent):
    """Sums what it is told."""

    def __init__(self) -> None:
        self.stages: list[list[object]] = []

    def begin(self, stage: str, total: int, done: int) -> None:
        self.stages.append([stage, total, done])

    def advance(self, nbytes: int) -> None:
        self.stages[-1][2] += nbytes


def test_every_stage_ends_where_it_said(write_llama, planned, tmp_path):
    plan, inventory = planned(write_llama())
    told = Recorder()
    report = build(plan, inventory, out=tmp_path / "out", progress=told)
    assert [stage for stage, _, _ in told.stages] == ["encode", "hash"]
    assert all(total == done for _, total, done in told.stages)
    assert told.stages[0][1] == inventory.nbytes
    record = (tmp_path / "out" / "policyc.json").stat().st_size
    assert told.stages[1][1] == report.nbytes - record


def test_lines_say_stage_share_and_bytes():
    stream = io.StringIO()
    lines = Lines(stream, every=0)
    lines.begin("encode", 4_000_000_000, 1_000_000_000)
    lines.advance(1_000_000_000)
    lines.end()
    first, second, last = stream.getvalue().splitlines()
    assert first == "encode  25 %  1.00 of 4.00 GB"
    assert second.startswith("encode  50 %  2.00 of 4.00 GB  ")
    assert second.endswith(" left")
    assert last.startswith("encode  50 %")


def test_json_lines_are_documents():
    stream = io.StringIO()
    lines = Lines(stream, as_json=True, every=0)
    lines.begin("hash", 10, 0)
    lines.advance(10)
    documents = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [document["done"] for document in documents] == [0, 10]
    assert documents[0]["schema_version"] == 1
    assert documents[0]["seconds_left"] is None
    assert documents[1]["seconds_left"] == 0


def test_clock():
    assert [clock(7), clock(754), clock(3723)] == ["0:07", "12:34", "1:02:03"]
