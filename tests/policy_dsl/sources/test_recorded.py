"""Recorded headers: the same inventory comes back, small, and nothing hostile gets in."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory, TensorInfo, source_digest
from policy_dsl.sources.recorded import expand_pattern, name_patterns, write_recorded
from policy_dsl.sources.reference import open_source
from tests.models import tiny

SMALL: dict[str, Any] = {
    "policyc_headers": 1,
    "id": "org/small",
    "config": {"model_type": "llama"},
    "side_files": {"LICENSE": 3},
    "totals": {"tensors": 4, "nbytes": 10},
    "files": [
        {
            "file": "model.safetensors",
            "nbytes": 110,
            "tensors": [
                {"dtype": "U8", "shape": [2], "names": ["a.{0-1}.w"]},
                {"dtype": "I8", "shape": [3], "names": ["b", "c"]},
            ],
        }
    ],
}


def opened(tmp_path: Path, text: str | bytes, name: str = "headers.json") -> Inventory:
    """The inventory of a recorded headers file with this text."""
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return open_source(str(path))


def refused(tmp_path: Path, text: str | bytes) -> str:
    """The message for a text that is refused."""
    with pytest.raises(PolicyError) as caught:
        opened(tmp_path, text)
    [found] = caught.value.diagnostics
    assert found.code == "bad-recorded-headers"
    assert str(tmp_path) in found.message
    return found.message


def test_a_folder_comes_back_whole(tmp_path: Path) -> None:
    found = tiny()
    again = opened(tmp_path, write_recorded(found))
    assert again == replace(found, root=None)
    assert source_digest(again) == source_digest(found)
    assert len(write_recorded(found)) < 12_000


def test_gzip_is_read(tmp_path: Path) -> None:
    found = tiny()
    text = gzip.compress(write_recorded(found).encode())
    assert opened(tmp_path, text, "h.json.gz") == replace(found, root=None)


def test_places_follow_from_dtype_and_name(tmp_path: Path) -> None:
    found = opened(tmp_path, json.dumps(SMALL))
    places = {name: (info.start, info.stop) for name, info in found.tensors.items()}
    assert places == {"a.0.w": (100, 102), "a.1.w": (102, 104), "b": (104, 107), "c": (107, 110)}
    assert found.file_nbytes == {"model.safetensors": 110}
    assert found.side_files == {"LICENSE": 3}
    assert found.root is None


def test_unusual_order_in_a_file_is_kept(tmp_path: Path) -> None:
    found = opened(tmp_path, json.dumps(SMALL))
    turned, place = {}, 100
    for name in ("c", "a.1.w", "b", "a.0.w"):
        info = found.tensors[name]
        turned[name] = info._replace(start=place, stop=place + info.nbytes)
        place += info.nbytes
    wanted = replace(found, tensors=turned)
    assert opened(tmp_path, write_recorded(wanted)) == wanted


def test_without_a_shard_map(tmp_path: Path) -> None:
    tensors = {
        name: TensorInfo(name, "F4", (2, 2), 2) for name in ("x.{0}", "x.07.y", "x.7.y", "}{")
    }
    found = Inventory("some", {"a": [1, None]}, tensors)
    assert opened(tmp_path, write_recorded(found)) == found


def test_holes_are_a_mistake_of_the_program() -> None:
    info = TensorInfo("a", "U8", (1,), 1, "m.safetensors", 10, 11)
    with pytest.raises(ValueError, match="without holes"):
        write_recorded(Inventory("x", {}, {"a": info}, file_nbytes={"m.safetensors": 99}))


Change = Callable[[dict[str, Any]], Any]


def _group(record: dict[str, Any]) -> dict[str, Any]:
    return record["files"][0]["tensors"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("config"), "config: missing"),
        (lambda r: r.update(policyc_headers=2), "policyc_headers"),
        (lambda r: r.update(extra=1), "extra"),
        (lambda r: r["totals"].update(tensors=5), "totals"),
        (lambda r: r["totals"].update(nbytes=True), "totals.nbytes"),
        (lambda r: r["side_files"].update({"../x": 1}), '"../x" is not the plain name'),
        (lambda r: r["side_files"].update(x=-1), "side_files.x: out of range"),
        (lambda r: r["files"].append({**r["files"][0], "file": None}), "is in two files"),
        (lambda r: r["files"].append({**r["files"][0], "tensors": []}), "a file is listed twice"),
        (lambda r: r["files"][0].update(file="../m.safetensors"), "is not the plain name"),
        (lambda r: r["files"][0].update(file="m.bin"), "is not the plain name"),
        (lambda r: r["files"][0].update(nbytes=19), "too few for its tensors"),
        (lambda r: r["files"][0].update(order=["a.0.w"]), "does not name each"),
        (lambda r: r["files"][0].update(order=["b", "b", "c", "a.0.w"]), "does not name each"),
        (lambda r: _group(r).update(dtype="F3"), '"F3" is not known'),
        (lambda r: _group(r).update(shape=[-1]), "shape"),
        (lambda r: _group(r).update(shape=[1.0]), "shape"),
        (lambda r: _group(r).update(shape=[1 << 63]), "shape"),
        (lambda r: _group(r).update(dtype="F4", shape=[3]), "inside a byte"),
        (lambda r: _group(r).update(names=["a.{0-1}.w", "a.1.w"]), "the same tensor"),
        (lambda r: _group(r).update(names=["a.{0-999999999}"]), "expands to 1,000,000,000 names"),
        (lambda r: _group(r).update(names=["{0-99999}.{0-99999}"]), "10,000,000,000 names"),
        (lambda r: _group(r).update(names=["{0-999999999999}"]), "malformed at 0"),
        (lambda r: _group(r).update(names=["a.{3-1}"]), "malformed"),
        (lambda r: _group(r).update(names=["a.{}"]), "malformed at 2"),
        (lambda r: _group(r).update(names=["a.}"]), "malformed at 2"),
        (lambda r: _group(r).update(names=["a" * 3000]), "3000 characters"),
        (lambda r: _group(r).update(names=["a\x1b"]), "cannot be printed"),
    ],
)
def test_records_that_contradict_themselves(tmp_path: Path, change: Change, said: str) -> None:
    record = json.loads(json.dumps(SMALL))
    change(record)
    assert said in refused(tmp_path, json.dumps(record))


def test_names_of_all_groups_count_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policy_dsl.sources.recorded.MAX_TENSORS", 10)
    record = json.loads(json.dumps(SMALL))
    _group(record).update(names=["{0-8}", "{0-1}"])
    assert "expands to 2 names" in refused(tmp_path, json.dumps(record))


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"3", b"\xff", b"[" * 100_000, b"\x1f\x8b", b"\x1f\x8bxxxxxxxxxxxx"]
)
def test_texts_that_are_no_record(tmp_path: Path, text: bytes) -> None:
    refused(tmp_path, text)


def test_an_index_or_config_is_no_record(tmp_path: Path) -> None:
    assert "policyc_headers: missing" in refused(tmp_path, b'{"weight_map": {}}')


def test_gzip_that_would_fill_the_memory(tmp_path: Path) -> None:
    zeros = gzip.compress(bytes(34_000_000))
    assert "more than 33554432 bytes" in refused(tmp_path, zeros)
    short = gzip.compress(json.dumps(SMALL).encode())[:-9]
    assert "compression is broken" in refused(tmp_path, short)


def test_patterns_of_products_are_few() -> None:
    names = [f"l.{i}.e.{j}.w1" for i in range(62) for j in range(256)]
    assert name_patterns(names) == ["l.{0-61}.e.{0-255}.w1"]
    ragged = [name for name in names if not name.startswith(("l.3.", "l.4."))]
    ragged += [f"l.3.e.{j}.w1" for j in range(8)]
    assert name_patterns(ragged) == ["l.{0-2,5-61}.e.{0-255}.w1", "l.3.e.{0-7}.w1"]


_PART = st.sampled_from(["0", "1", "2", "3", "10", "01", "w1", "{", "}}", "-", ""])


@given(st.sets(st.lists(_PART, min_size=1, max_size=4).map(".".join), max_size=40))
def test_patterns_stand_for_exactly_their_names(names: set[str]) -> None:
    found = [
        name
        for pattern in name_patterns(names)
        for name in expand_pattern(pattern, limit=100, letters=100_000)
    ]
    assert sorted(found) == sorted(names)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_corrupted_record_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray(json.dumps(SMALL).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        opened(tmp_path, bytes(text))
    except PolicyError as error:
        str(error).encode()
