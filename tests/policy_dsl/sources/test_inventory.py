"""Checkpoint folders: what is read, what is refused, and that messages name file and cure."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory, source_digest
from policy_dsl.sources.reference import open_source
from tests.models import TINY

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(folder: Path, shards: Mapping[str, tuple[str, ...]], index: object = None) -> Path:
    """A checkpoint whose shards hold four bytes under each of these names."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for file, names in shards.items():
        save_file({name: np.zeros(4, np.uint8) for name in names}, folder / file)
    if index is not None:
        (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and the index that belongs to them."""
    weight_map = {"a": FIRST, "b": FIRST, "c": SECOND}
    shards = {FIRST: ("a", "b"), SECOND: ("c",)}
    return write(tmp_path / "model", shards, {"metadata": {}, "weight_map": weight_map})


def opened(folder: Path) -> Inventory:
    """The inventory of a folder."""
    return open_source(str(folder))


def refused(folder: Path) -> list[str]:
    """`code: message` of every defect of a folder."""
    with pytest.raises(PolicyError) as caught:
        opened(folder)
    return [f"{found.code}: {found.message}" for found in caught.value.diagnostics]


def noted(folder: Path, code: str) -> list[str]:
    """The notes of the defects of this code in a folder."""
    with pytest.raises(PolicyError) as caught:
        opened(folder)
    found = (one for one in caught.value.diagnostics if one.code == code)
    return [note for one in found for note in one.notes]


def test_embedded_model_equals_what_the_reference_library_reads() -> None:
    found = opened(TINY)
    seen = 0
    for path in sorted(TINY.glob("*.safetensors")):
        whole = path.read_bytes()
        assert found.file_nbytes[path.name] == len(whole)
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                info, part = found.tensors[name], file.get_slice(name)
                assert (info.file, info.dtype) == (path.name, part.get_dtype())
                assert info.shape == tuple(part.get_shape())
                seen += 1
                if info.dtype == "F32":
                    bytes_there = file.get_tensor(name).tobytes()
                    assert whole[info.start : info.stop] == bytes_there
    assert len(found.tensors) == seen == 375
    assert found.id == "tiny-minimax-m2"
    assert found.root == TINY
    assert found.config["model_type"] == "minimax_m2"
    assert found.side_files == {
        path.name: path.stat().st_size
        for path in TINY.iterdir()
        if path.suffix != ".safetensors" and path.name not in ("config.json", INDEX)
    }


def test_sharded_folder_with_its_index(sharded: Path) -> None:
    found = opened(sharded)
    assert {name: info.file for name, info in found.tensors.items()} == {
        "a": FIRST,
        "b": FIRST,
        "c": SECOND,
    }
    assert found.findings == ()
    assert found.nbytes == 12


def test_without_index_a_whole_numbered_set_is_clear(sharded: Path) -> None:
    with_index = opened(sharded)
    (sharded / INDEX).unlink()
    assert opened(sharded) == with_index


def test_numbers_may_count_from_zero(tmp_path: Path) -> None:
    shards = {f"model-{i}-of-2.safetensors": (f"t{i}",) for i in range(2)}
    assert len(opened(write(tmp_path / "m", shards)).tensors) == 2


def test_without_index_a_gap_is_a_missing_shard(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / SECOND).unlink()
    [said] = refused(sharded)
    assert said.startswith(f"missing-shard: {SECOND} is not there; 1 of 00002")


def test_single_file_by_folder_and_by_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"model.safetensors": ("a",)})
    (folder / "LICENSE").write_text("free")
    found = opened(folder)
    by_name = opened(folder / "model.safetensors")
    assert by_name == found
    assert found.side_files == {"LICENSE": 4}
    odd = write(tmp_path / "odd", {"weights.safetensors": ("a",)})
    assert list(opened(odd).tensors) == ["a"]


def test_one_shard_is_not_the_model(sharded: Path) -> None:
    [said] = refused(sharded / FIRST)
    assert said == f"one-shard: {FIRST} is one of 2 shards"


def test_unclear_which_files_are_the_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"x.safetensors": ("a",), "y.safetensors": ("b",)})
    [said] = refused(folder)
    assert said.startswith("ambiguous-weights")
    assert "x.safetensors, y.safetensors" in said
    assert list(opened(folder / "x.safetensors").tensors) == ["a"]


def test_more_numbered_files_than_their_names_say(tmp_path: Path) -> None:
    shards = {f"model-{i}-of-2.safetensors": (f"t{i}",) for i in range(3)}
    [said] = refused(write(tmp_path / "m", shards))
    assert said.startswith("ambiguous-weights")


def test_stray_files_are_not_mixed_in_and_not_silent(sharded: Path) -> None:
    plain = opened(sharded)
    stray = {"adapter_model.safetensors": ("lora",), "consolidated.safetensors": ("a", "b")}
    write(sharded, stray)
    found = opened(sharded)
    assert found == plain
    [finding] = found.findings
    assert (finding.code, finding.severity) == ("stray-safetensors", "warning")
    assert "adapter_model.safetensors, consolidated.safetensors are not" in finding.message


def test_links_to_files_elsewhere_are_followed(sharded: Path, tmp_path: Path) -> None:
    plain = opened(sharded)
    cached = tmp_path / "snapshot"
    cached.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        if path.suffix == ".safetensors":
            path.rename(tmp_path / str(number))
            (cached / path.name).symlink_to(tmp_path / str(number))
        else:
            path.rename(cached / path.name)
    found = opened(cached)
    assert replace(found, id=plain.id, root=plain.root) == plain
    assert found.links.keys() == found.file_nbytes.keys()


def test_names_that_cannot_be_printed(sharded: Path) -> None:
    (sharded / "a\nb").write_text("")
    os.mkdir(os.fsencode(sharded) + b"/\xff")
    said = refused(sharded)
    assert [text.partition(":")[0] for text in said] == ["unreadable-file"]
    assert all(text.isprintable() for text in said)


def test_link_that_leads_nowhere(sharded: Path) -> None:
    (sharded / "tokenizer.json").symlink_to("gone")
    [said] = refused(sharded)
    assert said.startswith(f"unreadable-file: cannot read {sharded / 'tokenizer.json'}")


def test_pipes_and_folders_are_not_files(sharded: Path) -> None:
    os.mkfifo(sharded / "notes.json")
    (sharded / "original").mkdir()
    assert opened(sharded).side_files == {}
    os.mkfifo(sharded / "model-00003-of-00003.safetensors")
    [said] = refused(sharded)
    assert said.endswith("it is a pipe, not a file")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/x.safetensors", "..", "", "sub/x.safetensors", "a\\b.safetensors"],
)
def test_shards_outside_the_folder(sharded: Path, shard: str) -> None:
    write(sharded, {}, {"weight_map": {"a": shard, "b": FIRST}})
    [said] = refused(sharded)
    assert said.startswith("shard-outside: ")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ({}, "no weight_map"),
        ([], "not a JSON object"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {"a": 3}}, "no file names"),
        ({"weight_map": {"a": ["x.safetensors"]}}, "no file names"),
    ],
)
def test_index_that_is_none(sharded: Path, index: object, said: str) -> None:
    write(sharded, {}, index)
    [found] = refused(sharded)
    assert found.startswith(f"bad-source-json: {INDEX}: ")
    assert said in found


def test_index_and_shards_disagree(sharded: Path) -> None:
    third = "model-00003-of-00002.safetensors"
    write(sharded, {}, {"weight_map": {"a": SECOND, "b": FIRST, "x": FIRST, "y": third}})
    assert set(refused(sharded)) == {
        f"missing-shard: {third} is not there; the index puts 1 tensors in it",
        f'index-mismatch: tensor "a": the index puts it in {SECOND}, which does not hold it',
        f'index-mismatch: tensor "c": {SECOND} holds it, but the index does not name it',
    }
    assert noted(sharded, "index-mismatch") == ["in all 2: a, x"]


def test_what_is_wrong_with_every_shard_is_one_finding(sharded: Path) -> None:
    for file in (FIRST, SECOND):
        (sharded / file).write_bytes(b"version https://git")
    assert [text.partition(":")[0] for text in refused(sharded)] == ["not-safetensors"]
    assert noted(sharded, "not-safetensors") == [f"in all 2: {FIRST}, {SECOND}"]


def test_tensor_in_two_shards(sharded: Path) -> None:
    write(sharded, {SECOND: ("c", "a")})
    assert f'duplicate-tensor: tensor "a" is in {FIRST} and in {SECOND}' in refused(sharded)


def test_defects_of_all_files_come_at_once(sharded: Path) -> None:
    (sharded / "config.json").write_text("[]")
    (sharded / FIRST).write_bytes(b"")
    (sharded / SECOND).write_bytes(b"\0" * 9)
    codes = [said.partition(":")[0] for said in refused(sharded)]
    assert codes == ["bad-source-json", "not-the-file", "not-safetensors"]


def test_truncated_shard_names_the_file_and_the_numbers(sharded: Path) -> None:
    whole = (sharded / FIRST).read_bytes()
    (sharded / FIRST).write_bytes(whole[:-1])
    [said] = refused(sharded)
    assert FIRST in said
    assert f"end at byte {len(whole)}, but the file ends at {len(whole) - 1} bytes" in said


def test_pickles_are_never_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {})
    assert refused(folder) == [f"no-weights: {folder} holds no safetensors file"]
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    [said] = refused(folder)
    assert said.startswith("pickled-weights: ")
    assert "pytorch_model.bin), which are never read" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b"3", "not a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_config_that_is_none(sharded: Path, text: bytes, said: str) -> None:
    (sharded / "config.json").write_bytes(text)
    [found] = refused(sharded)
    assert found.startswith("bad-source-json: config.json: ")
    assert said in found


def test_config_is_needed_and_may_hold_what_publishers_write(sharded: Path) -> None:
    (sharded / "config.json").write_text('{"a": NaN, "b": 1, "b": 2}')
    assert opened(sharded).config["b"] == 2
    (sharded / "config.json").unlink()
    assert refused(sharded) == [f"missing-config: {sharded} has no config.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_files_that_may_not_be_read(sharded: Path) -> None:
    (sharded / FIRST).chmod(0)
    [said] = refused(sharded)
    assert said.startswith(f"unreadable-file: cannot read {sharded / FIRST}")


@pytest.mark.parametrize(
    "reference", ["/no/such/folder", "./gone", "gone.safetensors", "gone.json", "~nobody-here/x"]
)
def test_paths_that_are_not_there(reference: str) -> None:
    with pytest.raises(PolicyError) as caught:
        open_source(reference)
    assert [found.code for found in caught.value.diagnostics] == ["unreadable-file"]


@pytest.mark.parametrize("reference", ["", "no-such-model", "a b/c", "org/--x", "a/b/c", "x@y"])
def test_references_that_can_be_nothing(reference: str) -> None:
    with pytest.raises(PolicyError) as caught:
        open_source(reference)
    assert [found.code for found in caught.value.diagnostics] == ["unknown-source"]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_corrupted_folder_is_read_or_refused(sharded: Path, data: st.DataObject) -> None:
    path = sharded / data.draw(st.sampled_from([FIRST, SECOND, INDEX, "config.json"]))
    whole = path.read_bytes()
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed[: data.draw(st.integers(0, len(whole)))])
    try:
        source_digest(opened(sharded))
    except PolicyError as error:
        str(error).encode()
    finally:
        path.write_bytes(whole)


def test_digest_tells_headers_apart_and_not_places(sharded: Path, tmp_path: Path) -> None:
    found = opened(sharded)
    turned = replace(found, tensors=dict(reversed(found.tensors.items())), root=tmp_path)
    assert source_digest(turned) == source_digest(found)
    first = found.tensors["a"]
    changes = [
        replace(found, config={"model_type": "qwen2"}),
        replace(found, file_nbytes={**found.file_nbytes, FIRST: 1}),
        *(
            replace(found, tensors={**found.tensors, "a": first._replace(**change)})
            for change in ({"dtype": "I8"}, {"shape": (2, 2)}, {"file": SECOND}, {"start": 0})
        ),
    ]
    digests = {source_digest(change) for change in changes}
    assert len(digests | {source_digest(found)}) == len(changes) + 1


def test_hundred_thousand_tensors_of_many_shards_open(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weight_map = {}
    entry = '"{}":{{"dtype":"F8_E4M3","shape":[4,2],"data_offsets":[{},{}]}}'
    for shard in range(125):
        file = f"model-{shard:05d}-of-00125.safetensors"
        names = [
            f"model.layers.{shard}.block_sparse_moe.experts.{i // 3}.w{i % 3 + 1}.weight"
            for i in range(770)
        ]
        weight_map |= dict.fromkeys(names, file)
        entries = [entry.format(name, 8 * i, 8 * i + 8) for i, name in enumerate(names)]
        header = ("{" + ",".join(entries) + "}").encode()
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8 * 770))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert len(opened(folder).tensors) == 96_250
