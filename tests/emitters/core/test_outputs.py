"""What a build may write to and delete: a place of its own, and files that a build made."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import digests

from emitters.core.build import Silent, build
from emitters.core.verify import verify_bundle
from emitters.core.workspace import claimed
from policy_dsl.diagnostics import PolicyError
from policy_dsl.planning.record import record_digest
from policyc.cli import main


@pytest.fixture
def force(write_llama, planned, tmp_path) -> Callable[[], str]:
    """Builds with `force`; the error, or nothing."""
    made = planned(write_llama())

    def run() -> str:
        try:
            build(*made, out=tmp_path / "out", force=True)
        except PolicyError as error:
            return str(error)
        return ""

    return run


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """All that is under a folder, with what is in files and where links lead."""

    def of(path: Path) -> bytes | str | None:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else None

    return {str(path): of(path) for path in sorted(folder.rglob("*"))}


def signed(document: dict[str, Any]) -> str:
    """The text of a record whose digest is its own."""
    return json.dumps({**document, "digest": record_digest(document)})


def entry(content: bytes) -> dict[str, object]:
    return {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def bundle_record(files: dict[str, Any]) -> dict[str, Any]:
    return {"schema_version": 2, "kind": "bundle", "policyc": "1", "files": files}


MINE = {"thesis.txt": entry(b"mine")}
RECORDS = {
    "unsigned": json.dumps({"files": {"photos": 1, "thesis.txt": 1}}),
    "a wrong digest": json.dumps({**bundle_record(MINE), "digest": "0" * 64}),
    "of another kind": signed({**bundle_record(MINE), "kind": "plan"}),
    "of a later version": signed({**bundle_record(MINE), "schema_version": 3}),
    "naming a folder": signed(bundle_record({**MINE, "photos": entry(b"mine")})),
    "naming a folder's file": signed(bundle_record({**MINE, "photos/1.jpg": entry(b"mine")})),
    "naming a path out": signed(bundle_record({**MINE, "../thesis.txt": entry(b"mine")})),
    "naming itself": signed(bundle_record({**MINE, "policyc.json": entry(b"mine")})),
    "with another size": signed(bundle_record({"thesis.txt": entry(b"longer")})),
    "with other contents": signed(bundle_record({"thesis.txt": entry(b"your")})),
    "with sizes that are not": signed(bundle_record({"thesis.txt": {"nbytes": True}})),
    "with nothing": signed(bundle_record({})),
    "a list": "[]",
    "deep": "[" * 100_000,
    "a long number": '{"schema_version": ' + "9" * 5000 + "}",
    "not JSON": "}",
}


@pytest.mark.parametrize("kind", RECORDS)
def test_force_trusts_no_record_but_a_build_s(force, tmp_path, kind):
    out = tmp_path / "out"
    (out / "photos").mkdir(parents=True)
    (out / "photos" / "1.jpg").write_text("mine")
    (out / "thesis.txt").write_text("mine")
    (out / "policyc.json").write_text(RECORDS[kind])
    before = everything(out)
    said = force()
    assert said.startswith("error[output-not-a-bundle]")
    assert "move it away, or give another folder with -o" in said
    assert everything(out) == before
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda out: (out / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda out: os.truncate(out / "model.safetensors", 9), "model.safetensors has 9"),
        (lambda out: (out / "config.json").write_bytes(b"x" * 99), "config.json has 99 bytes"),
        (lambda out: flip(out / "tokenizer.json"), "tokenizer.json was changed"),
        (lambda out: link(out / "LICENSE", out.parent / "secret"), "LICENSE is a link"),
        (lambda out: pipe(out / "LICENSE"), "LICENSE is a pipe, not a file"),
        (lambda out: link(out / "policyc.json", out.parent / "r"), "policyc.json is a link"),
        (lambda out: pipe(out / "policyc.json"), "policyc.json is a pipe, not a file"),
    ],
)
def test_a_bundle_that_was_changed_is_not_replaced(force, tmp_path, harm, said):
    assert force() == ""
    harm(tmp_path / "out")
    before = {path.name for path in (tmp_path / "out").iterdir()}
    refused = force()
    assert refused.startswith("error[output-not-a-bundle]")
    assert said in refused
    assert {path.name for path in (tmp_path / "out").iterdir()} == before


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def link(path: Path, target: Path) -> None:
    path.rename(target)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_a_record_of_an_earlier_version_is_a_record(force, tmp_path):
    """Earlier versions wrote no `resolved` policy; all that a deletion needs is there."""
    assert force() == ""
    path = tmp_path / "out" / "policyc.json"
    document = json.loads(path.read_text())
    del document["digest"], document["policy"]["resolved"]
    path.write_text(signed(document))
    assert force() == ""


def listen(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        # The paths of sockets must be short.
        here = os.open(path.parent, os.O_RDONLY)
        opened.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


THINGS: dict[str, Callable[[Path], object]] = {
    "a link to a folder": lambda path: path.symlink_to("elsewhere", target_is_directory=True),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
    "a socket": listen,
}
PLACES = ["out", "out.partial", *(f"out.partial/{name}" for name in ("lock", "journal"))]
PLACES += [f"out.partial/{name}" for name in ("bundle", "replaced", "deleted")]


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("place", PLACES)
def test_links_and_special_files_are_never_written_through(force, tmp_path, place, thing):
    path = tmp_path / place
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").write_text("mine")
    path.parent.mkdir(exist_ok=True)
    THINGS[thing](path)
    before = everything(tmp_path)
    said = force()
    assert said.startswith("error[output-not-plain]")
    assert str(path) in said
    assert everything(tmp_path) == before


def test_the_cure_of_a_link_fits_its_place(force, tmp_path):
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    assert "remove it, or give another folder with -o" in force()
    (tmp_path / "out.partial").unlink()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    assert "give the folder that it leads to with -o" in force()


def test_an_unfinished_shard_that_is_a_link_is_not_written_through(force, tmp_path):
    stopped(force, tmp_path)
    shard = tmp_path / "out.partial" / "bundle" / "model.safetensors"
    link(shard, tmp_path / "precious")
    before = everything(tmp_path)
    assert force().startswith("error[output-has-other-files]")
    assert everything(tmp_path) == before


def stopped(force: Callable[[], str], tmp_path: Path) -> None:
    """Leaves an unfinished build behind, as a kill does."""
    assert force() == ""
    partial = tmp_path / "out.partial"
    (tmp_path / "out").rename(tmp_path / "bundle")
    partial.mkdir()
    (tmp_path / "bundle").rename(partial / "bundle")
    (partial / "lock").touch()


@pytest.mark.parametrize("name", ["photos/1.jpg", "additional_chat_templates/deep/1.jpg"])
def test_folders_in_unfinished_work_are_never_deleted(force, tmp_path, name):
    stopped(force, tmp_path)
    mine = tmp_path / "out.partial" / "bundle" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert force().startswith("error[output-has-other-files]")
    assert mine.read_text() == "mine"


def test_unfinished_work_without_a_lock_is_somebody_else_s(force, tmp_path):
    mine = tmp_path / "out.partial" / "bundle" / "1.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    before = everything(tmp_path)
    assert force().startswith("error[output-has-other-files]")
    assert everything(tmp_path) == before


def test_what_is_put_into_the_output_during_a_build_stays(write_llama, planned, tmp_path):
    made, out = planned(write_llama()), tmp_path / "out"

    class Meddler(Silent):
        def begin(self, stage: str, total: int, done: int) -> None:
            out.mkdir(exist_ok=True)
            (out / "mine.txt").write_text("mine")

    for force, code in ((False, "output-exists"), (True, "output-not-a-bundle")):
        with pytest.raises(PolicyError, match=code):
            build(*made, out=out, force=force, progress=Meddler())
        assert digests(out).keys() == {"mine.txt"}
        (out / "mine.txt").unlink()
        # Hours of work wait for the place to be free.
        assert build(*made, out=out).resumed_nbytes > 0
        for path in out.iterdir():
            path.unlink()


def test_what_is_put_into_unfinished_work_stays(write_llama, planned, tmp_path):
    made, out = planned(write_llama()), tmp_path / "out"
    mine = tmp_path / "out.partial" / "bundle" / "mine.txt"

    class Meddler(Silent):
        def begin(self, stage: str, total: int, done: int) -> None:
            mine.write_text("mine")
            (mine.parent / ".DS_Store").touch()

    with pytest.raises(PolicyError, match=r"output-has-other-files(.|\n)*mine\.txt"):
        build(*made, out=out, progress=Meddler())
    for force in (False, True):
        # Before any work, and before anything is deleted.
        with pytest.raises(PolicyError, match="output-has-other-files"):
            build(*made, out=out, force=force)
    mine.rename(tmp_path / "mine.txt")
    # What a file browser leaves is in nobody's way.
    assert build(*made, out=out).resumed_nbytes > 0


def test_a_build_that_fails_for_good_deletes_its_own_files_only(write_llama, planned, tmp_path):
    def poke(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"][1][0, 0] = 0x7F80

    mine = tmp_path / "out.partial" / "bundle" / "mine.txt"

    class Meddler(Silent):
        def begin(self, stage: str, total: int, done: int) -> None:
            mine.write_text("mine")

    with pytest.raises(PolicyError, match="non-finite-source"):
        build(*planned(write_llama(poke)), out=tmp_path / "out", progress=Meddler())
    assert mine.read_text() == "mine"


def test_names_in_a_record_are_never_paths(force, tmp_path):
    """A bundle's reader looks at what is in the folder, whatever the record names."""
    assert force() == ""
    path = tmp_path / "out" / "policyc.json"
    document = json.loads(path.read_text())
    os.mkfifo(tmp_path / "pipe")
    # Reading it would never end.
    document["files"]["../pipe"] = entry(b"")
    document["files"][str(tmp_path / "pipe")] = entry(b"")
    path.write_text(signed({key: document[key] for key in document.keys() - {"digest"}}))
    missing = verify_bundle(tmp_path / "out", jobs=1).findings
    assert [found.code for found in missing] == ["missing-bundle-file"]
    assert missing[0].count == 2


def test_what_appears_beside_files_that_are_deleted_stays_and_blocks_nothing(force, tmp_path):
    assert force() == ""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with claimed(out) as workspace:
        workspace.clear(())
        for name, content in everything(out).items():
            (workspace.bundle / Path(name).name).write_bytes(content)
        workspace.finish()
        (deleted,) = partial.glob("deleted*")
        (deleted / "mine.txt").write_text("mine")
        (deleted / "photos").mkdir()
    (warning,) = workspace.left
    assert warning.code == "output-left-over"
    assert "mine.txt" in warning.message
    assert str(deleted) in warning.message
    assert sorted(path.name for path in partial.rglob("*")) == [
        *("deleted", "mine.txt", "photos", "policyc.json")
    ]
    # A later build says it again, and ends as it should.
    assert force() == ""
    assert (deleted / "mine.txt").read_text() == "mine"


def test_unfinished_work_that_cannot_be_listed_any_more_is_a_warning(tmp_path, monkeypatch):
    partial, list_of = tmp_path / "out.partial", os.listdir

    def refused(folder: Path) -> list[str]:
        if folder == partial:
            raise PermissionError(errno.EACCES, "Permission denied")
        return list_of(folder)

    with claimed(tmp_path / "out") as workspace:
        monkeypatch.setattr(os, "listdir", refused)
    (warning,) = workspace.left
    assert warning.code == "output-left-over"
    assert "Permission denied" in warning.message


def test_what_is_left_over_is_a_warning_of_the_command(write_llama, tmp_path, capsys):
    write_llama()
    policy = tmp_path / "p.qpol"
    policy.write_text("target mlx_affine\nall: 8bit\n")
    out, deleted = tmp_path / "out", tmp_path / "out.partial" / "deleted"
    arguments = ["build", str(policy), "--model", str(tmp_path / "source"), "-o", str(out)]
    deleted.mkdir(parents=True)
    (deleted / "mine.txt").write_text("mine")
    assert main(arguments) == 0
    assert "warning[output-left-over]" in capsys.readouterr().err
    assert (deleted / "mine.txt").read_text() == "mine"
    assert main([*arguments, "--force"]) == 0


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("Model", "model"),
        ("Model", "model/out"),
        ("Model", "MODEL/a/b/c"),
        ("Models/tiny", "models"),
        ("Models/deep/tiny", "MODELS"),
        ("Out.partial", "out"),
        ("Out.partial/bundle", "out"),
    ],
)
def test_a_disk_that_ignores_case_does_not_hide_the_source(
    write_llama, planned, tmp_path, monkeypatch, source, out
):
    """The system says which names are one folder: what names say alone is not enough."""
    monkeypatch.setattr(
        os.path, "samefile", lambda one, other: str(one).lower() == str(other).lower()
    )
    (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
    made = planned(write_llama(name=source))
    before = everything(tmp_path)
    with pytest.raises(PolicyError, match="output-in-source"):
        build(*made, out=tmp_path / out, force=True)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("place", ["door", "door/out", "door/deep/out"])
def test_another_way_to_the_source_is_seen(write_llama, planned, tmp_path, place):
    source = write_llama()
    (tmp_path / "door").symlink_to(source, target_is_directory=True)
    with pytest.raises(PolicyError, match="output-in-source"):
        build(*planned(source), out=tmp_path / place, force=True)
    build(*planned(tmp_path / "door"), out=tmp_path / "out")


def test_hard_links_between_source_and_output_do_not_matter(force, tmp_path):
    assert force() == ""
    shard = tmp_path / "source" / "model.safetensors"
    content = shard.read_bytes()
    os.link(shard, tmp_path / "other name")
    (tmp_path / "out" / "LICENSE").unlink()
    os.link(tmp_path / "source" / "LICENSE", tmp_path / "out" / "LICENSE")
    assert force() == ""
    assert shard.read_bytes() == content
    assert (tmp_path / "source" / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("/", "output-in-source"),
        ("/..", "output-in-source"),
        ("/dev/null", "output-not-plain"),
        ("a" * 250, "unwritable-output"),
        ("a" * 300, "unwritable-output"),
        ("policy.yaml/out", "unwritable-output"),
        ("policy.yaml", "output-not-plain"),
        ("loop/out", "unwritable-output"),
    ],
)
def test_places_where_nothing_can_be_built(write_llama, planned, tmp_path, place, code):
    made = planned(write_llama())
    (tmp_path / "loop").symlink_to("loop")
    before = everything(tmp_path)
    for force in (False, True):
        with pytest.raises(PolicyError) as caught:
            build(*made, out=tmp_path / place, force=force)
        assert [found.code for found in caught.value.diagnostics] == [code]
    assert everything(tmp_path) == before


def test_the_current_folder_and_ways_around_are_places(write_llama, planned, tmp_path):
    made, there = planned(write_llama()), tmp_path / "there"
    there.mkdir()
    (tmp_path / "door").symlink_to(there, target_is_directory=True)
    # Only the last step must not be a link.
    for place in ("door/out", "there/../there/./two", "door/../out"):
        build(*made, out=tmp_path / place)
        for path in there.iterdir():
            path.rename(tmp_path / f"{len(os.listdir(tmp_path))}")


@pytest.mark.parametrize("when", ["encode", "hash"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "policyc.json"])
def test_links_that_appear_during_a_build_are_not_written_through(
    write_llama, planned, tmp_path, name, when
):
    made, mine = planned(write_llama()), tmp_path / "mine"
    mine.write_text("mine")

    class Meddler(Silent):
        def begin(self, stage: str, total: int, done: int) -> None:
            if stage == when:
                path = tmp_path / "out.partial" / "bundle" / name
                path.unlink(missing_ok=True)
                path.symlink_to(mine)

    with suppress(PolicyError):
        build(*made, out=tmp_path / "out", progress=Meddler())
        # The record is written last, and takes the link's place.
        assert (name, when) == ("policyc.json", "hash")
        assert not (tmp_path / "out" / name).is_symlink()
    assert mine.read_text() == "mine"
