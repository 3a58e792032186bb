"""What failed downloads leave under a file's name is called what it is, wherever it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from emitters.core.record import read_record
from emitters.tensor_io.imatrix import open_imatrix
from policy_dsl.diagnostics import Diagnostic, PolicyError
from policy_dsl.regular_files import refuse_placeholder
from policy_dsl.sources.reference import open_source
from policy_dsl.sources.saliency import read_saliency
from tests.models import TINY

INDEX = "model.safetensors.index.json"


def pointer(nbytes: int) -> bytes:
    oid = "ab" * 32
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {nbytes}\n"
    return text.encode()


KINDS = {
    "a Git LFS pointer of 4,994,182 bytes": pointer(4_994_182),
    "an HTML page": b"\n<!doctype html><html><title>Sign in</title></html>",
    "an XML page": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    'the text "Entry not found"': b"Entry not found",
    'the text "404: Not Found"': b"404: Not Found\n",
    "empty": b"",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model that may be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def refused(folder: Path) -> tuple[Diagnostic, ...]:
    with pytest.raises(PolicyError) as caught:
        open_source(str(folder))
    return caught.value.diagnostics


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00002-of-00004.safetensors"])
def test_in_place_of_a_file_that_is_read(model: Path, file: str, what: str) -> None:
    (model / file).write_bytes(KINDS[what])
    (found,) = refused(model)
    assert (found.code, found.message) == ("not-the-file", f"{file} is {what}")
    wanted = "git lfs pull" if "LFS" in what else "download it again"
    assert wanted in (found.suggestion or "")


def test_all_pointers_are_one_finding_with_a_count(model: Path) -> None:
    for number, path in enumerate(sorted(model.glob("*.safetensors"))):
        path.write_bytes(pointer(10 ** (number * 2)))
    (model / "config.json").write_bytes(pointer(17))
    (found,) = refused(model)
    assert found.count == 5
    assert "in all 5: config.json, model-00001-of-00004.safetensors" in found.notes[0]


def test_a_page_and_pointers_are_two_findings(model: Path) -> None:
    (model / "config.json").write_bytes(KINDS["an HTML page"])
    for path in model.glob("*.safetensors"):
        path.write_bytes(pointer(9))
    assert [found.count for found in refused(model)] == [1, 4]


def test_a_pointer_in_place_of_a_container(tmp_path: Path) -> None:
    file = tmp_path / "model.mq4"
    file.write_bytes(pointer(9))
    (found,) = refused(file)
    assert found.message == "model.mq4 is a Git LFS pointer of 9 bytes"


@pytest.mark.parametrize("what", ["a Git LFS pointer of 4,994,182 bytes", "empty"])
def test_in_place_of_statistics_headers_or_a_record(model: Path, what: str) -> None:
    path = model / "headers.json"
    path.write_bytes(KINDS[what])
    (model / "policyc.json").write_bytes(KINDS[what])
    for read in (
        lambda: open_source(str(path)),
        lambda: read_saliency(path, "reap"),
        lambda: open_imatrix(path),
        lambda: read_record(model),
    ):
        with pytest.raises(PolicyError, match=f"json is {what}"):
            read()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("__init__.py", b""),
        ("chat_template.jinja", b""),
        ("LICENSE.html", b"<html>free</html>"),
        ("vocab.txt", b"[PAD]\n<html>\n"),
        ("tokenizer.json", json.dumps({"model": "Entry not found"}).encode()),
        ("NOTICE", b"version 2\nsize 3\n"),
        ("merges.txt", b"#version: 0.2\nn o\nno t\n"),
    ],
)
def test_files_that_are_what_they_say(file: str, content: bytes) -> None:
    refuse_placeholder(file, content, len(content))
