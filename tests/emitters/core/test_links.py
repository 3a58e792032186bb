"""Links in the folders of strangers: what leads out of them is refused, or said."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from policyc.cli import main
from tests.models import TINY

SHARD = "model-00001-of-00004.safetensors"
INDEX = "model.safetensors.index.json"
SECRET = "PRIVATE KEY of somebody"

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: its exit code, and all that it printed."""

    def runs(*arguments: str | Path) -> tuple[int, str]:
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return runs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint in a folder of its own, and a secret beside that folder."""
    (tmp_path / "secret").write_text(SECRET)
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def _put_elsewhere(path: Path, link: str | None = None) -> Path:
    """A file, with a link in its place to where it is now."""
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    moved = Path(shutil.move(path, elsewhere / path.name))
    path.symlink_to(link or moved)
    return moved


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("NOTICE", "../secret"),
        ("LICENSE.md", "additional_chat_templates/../../secret"),
        ("modeling_x.py", "hop"),
        ("special_tokens_map.json", "../secret"),
        ("additional_chat_templates/rag.jinja", "../../secret"),
        ("jang_config.json", "../secret"),
        ("adapter_config.json", "../secret"),
    ],
)
def test_side_files_that_are_links_out_of_the_folder(
    source: Path, tmp_path: Path, run: Run, name: str, link: str
) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "hop").symlink_to("../hop")
    (tmp_path / "hop").symlink_to("secret")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(link)
    out = tmp_path / "bundle"
    for command in (
        ("build", "config_i", "--model", source, "-o", out),
        ("plan", "config_i", "--model", source),
        ("inspect", source),
    ):
        code, said = run(*command)
        assert code == 2
        assert f"error[link-outside]: {name} is a link out of the folder" in said
        assert f'to "{tmp_path / "secret"}"' in said
        assert "put a copy of the file in place of the link" in said
        assert SECRET not in said
    assert not out.exists()


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json"])
def test_what_is_read_of_a_checkpoint_is_in_its_folder(source: Path, run: Run, name: str) -> None:
    _put_elsewhere(source / name)
    code, said = run("plan", "config_i", "--model", source)
    assert (code, "error[link-outside]" in said) == (2, True)


def test_a_link_of_the_file_alone_says_the_same(source: Path, run: Run, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(source / "config.json", alone)
    (alone / "model.safetensors").symlink_to(source / SHARD)
    (alone / "NOTICE").symlink_to("../secret")
    code, said = run("inspect", alone / "model.safetensors")
    assert (code, "error[link-outside]: NOTICE" in said) == (2, True)


def test_links_that_stay_in_the_folder(source: Path, tmp_path: Path, run: Run) -> None:
    (source / "hidden").mkdir()
    shutil.move(source / "tokenizer.json", source / "hidden" / "t.json")
    (source / "hop").symlink_to("hidden/t.json")
    (source / "tokenizer.json").symlink_to("../model/hop")
    (source / "LICENSE").symlink_to(source / "README.md")
    # The folder itself may be a link too.
    (tmp_path / "door").symlink_to("model", target_is_directory=True)
    out = tmp_path / "bundle"
    arguments = ("config_i", "--model", tmp_path / "door", "--no-links")
    assert run("build", *arguments, "-o", out)[0] == 0
    assert (out / "LICENSE").read_bytes() == (TINY / "README.md").read_bytes()
    assert not (out / "tokenizer.json").is_symlink()
    assert run("verify", out, "--source", tmp_path / "door")[0] == 0


def _cached(tmp_path: Path, *, repository: str = "models--org--tiny") -> Path:
    """A snapshot as the hub's cache has it, links and all."""
    place = tmp_path / "hub" / repository
    snapshot = place / "snapshots" / ("a" * 40)
    (place / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(TINY.iterdir())):
        shutil.copy(path, place / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_snapshots_of_the_cache_are_links_to_its_blobs(tmp_path: Path, run: Run) -> None:
    snapshot, out = _cached(tmp_path), tmp_path / "bundle"
    (tmp_path / "door").symlink_to(snapshot, target_is_directory=True)
    for model in (snapshot, tmp_path / "door"):
        code, said = run("plan", "config_i", "--model", model, "--no-links")
        assert (code, "Linked files" in said) == (0, False)
    assert run("build", "config_i", "--model", snapshot, "-o", out)[0] == 0
    assert not any(path.is_symlink() for path in out.iterdir())


def test_links_that_only_look_like_the_cache(tmp_path: Path, run: Run) -> None:
    other = _cached(tmp_path / "a", repository="folder")
    assert "error[link-outside]" in run("inspect", other)[1]
    own, foreign = _cached(tmp_path / "b"), _cached(tmp_path / "c")
    (own / "NOTICE").symlink_to(os.path.realpath(foreign / "README.md"))
    assert "error[link-outside]: NOTICE" in run("inspect", own)[1]
    (own / "NOTICE").unlink()
    # A blob that is a link itself, and blobs that are another folder.
    (tmp_path / "secret").write_text(SECRET)
    blobs = own.parent.parent / "blobs"
    (blobs / "x").symlink_to(tmp_path / "secret")
    (own / "NOTICE").symlink_to("../../blobs/x")
    assert "error[link-outside]: NOTICE" in run("inspect", own)[1]
    (own / "NOTICE").unlink()
    shutil.move(blobs, tmp_path / "moved")
    blobs.symlink_to(tmp_path / "moved", target_is_directory=True)
    assert "error[link-outside]" in run("inspect", own)[1]


def test_linked_shards_are_followed_and_listed(source: Path, tmp_path: Path, run: Run) -> None:
    plain, out = tmp_path / "plain", tmp_path / "bundle"
    run("build", "config_i", "--model", source, "-o", plain)
    moved = _put_elsewhere(source / SHARD)
    code, said = run("plan", "config_i", "--model", source)
    assert code == 0
    assert "Linked files" in said
    # Long lines are wrapped.
    assert f"{SHARD} -> {moved}" in " ".join(said.split())
    _, said = run("plan", "config_i", "--model", source, "--format", "markdown")
    assert "Linked files" in said
    _, said = run("plan", "config_i", "--model", source, "--format", "json")
    assert json.loads(said)["linked_files"] == {SHARD: str(moved)}
    assert run("build", "config_i", "--model", source, "-o", out)[0] == 0
    assert (out / "policyc.json").read_bytes() == (plain / "policyc.json").read_bytes()


@pytest.mark.parametrize(
    "command",
    [
        ("check", "config_i", "--model"),
        ("plan", "config_i", "--model"),
        ("build", "config_i", "--model"),
        ("explain", "config_i", "lm_head.weight", "--model"),
        ("diff", "config_i", "mlx_4bit", "--model"),
        ("inspect",),
        ("verify", TINY, "--source"),
    ],
)
def test_linked_shards_can_be_refused(
    source: Path, run: Run, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    _put_elsewhere(source / SHARD)
    code, said = run(*command, source, "--no-links")
    assert code == (1 if command[0] == "check" else 2)
    assert f"error[link-outside]: {SHARD} is a link out of the folder" in said
    assert "leave out --no-links" in said
    assert sorted(os.listdir()) == ["elsewhere", "model", "secret"]


def test_shards_that_are_links_to_something_else(source: Path, run: Run) -> None:
    (source / SHARD).unlink()
    (source / SHARD).symlink_to("/dev/zero")
    code, said = run("inspect", source)
    assert (code, "it is a device, not a file" in said) == (2, True)
    (source / SHARD).unlink()
    (source / SHARD).symlink_to("../secret")
    code, said = run("inspect", source)
    assert (code, "error[not-safetensors]" in said, SECRET in said) == (2, True, False)


def test_other_links_are_no_reason_to_fail(source: Path, run: Run, tmp_path: Path) -> None:
    (source / "notes.json").symlink_to("../secret")
    (source / "train.log").symlink_to("gone")
    os.mkfifo(source / "control")
    code, said = run("plan", "config_i", "--model", source, "--format", "json")
    assert code == 0
    left_out = {file["name"] for file in json.loads(said)["dropped_files"]}
    assert {"notes.json", "train.log", "control"} <= left_out
    assert run("build", "config_i", "--model", source, "-o", tmp_path / "bundle")[0] == 0


@pytest.fixture
def bundle(tmp_path: Path, run: Run) -> Path:
    """A bundle of the example."""
    (tmp_path / "secret").write_text(SECRET)
    assert run("build", "config_i", "--model", TINY, "-o", tmp_path / "bundle")[0] == 0
    return tmp_path / "bundle"


@pytest.mark.parametrize("name", ["config.json", "policyc.json", INDEX, "tokenizer.json"])
def test_a_bundle_whose_files_are_elsewhere(bundle: Path, run: Run, name: str) -> None:
    if not (bundle / name).exists():
        pytest.skip("a small bundle has one shard and no index")
    _put_elsewhere(bundle / name)
    code, said = run("verify", bundle)
    assert (code, f"error[link-outside]: {name}" in said) == (1, True)


def test_a_bundle_whose_weights_are_elsewhere(bundle: Path, run: Run) -> None:
    (shard,) = bundle.glob("*.safetensors")
    _put_elsewhere(shard)
    code, said = run("verify", bundle)
    assert (code, f"warning[linked-file]: {shard.name}" in said) == (0, True)
    code, said = run("verify", bundle, "--no-links")
    assert (code, f"error[link-outside]: {shard.name}" in said) == (1, True)
    for command in (("inspect", bundle), ("diff", bundle, bundle)):
        assert run(*command)[0] == 0
        assert run(*command, "--no-links")[0] == 2


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


def _nowhere(path: Path) -> None:
    path.symlink_to("gone")


@pytest.mark.parametrize("make", [_pipe, _zeros, _folder, _nowhere])
def test_what_no_format_names_is_not_read(
    bundle: Path, run: Run, make: Callable[[Path], None]
) -> None:
    for name in ("notes.json", "a.json", "zz"):
        make(bundle / name)
    code, said = run("verify", bundle)
    assert (code, "all is well" in said) == (0, True)
    assert run("inspect", bundle)[0] == 0
    assert run("diff", bundle, bundle)[0] == 0


@pytest.mark.parametrize("make", [_pipe, _zeros, _nowhere])
@pytest.mark.parametrize(
    "name", ["config.json", "policyc.json", "tokenizer.json", INDEX, "README.md"]
)
def test_what_is_recorded_and_is_not_a_file_is_a_finding(
    bundle: Path, run: Run, name: str, make: Callable[[Path], None]
) -> None:
    (bundle / name).unlink(missing_ok=True)
    make(bundle / name)
    code, said = run("verify", bundle)
    recorded = name != "README.md"
    assert (code, "error[" in said) == ((1, True) if recorded else (0, False))
    assert run("inspect", bundle)[0] == (2 if recorded else 0)


@pytest.mark.parametrize("make", [_pipe, _zeros])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX, SHARD, "NOTICE"])
def test_a_source_with_something_else_in_place_of_a_file(
    source: Path, run: Run, name: str, make: Callable[[Path], None]
) -> None:
    (source / name).unlink(missing_ok=True)
    make(source / name)
    code, said = run("plan", "config_i", "--model", source)
    assert (code, "error[unreadable-file]" in said) == (2, True)
