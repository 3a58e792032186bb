"""What is beside the weights: files of tokenizers also in subfolders, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from policy_dsl.sources.recorded import read_recorded, write_recorded
from policy_dsl.sources.reference import open_source

TEMPLATE = "additional_chat_templates/rag.jinja"
SECOND = "qformer_tokenizer/tokenizer.json"


def write(folder: Path) -> Path:
    """A checkpoint of one tensor."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": np.zeros(4, np.uint8)}, folder / "model.safetensors")
    return folder


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_subfolders_that_tokenizers_write_are_listed_and_others_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    put(folder, TEMPLATE, SECOND, "tekken.json", "onnx/model.onnx", ".git/config")
    put(folder, "additional_chat_templates/b/c.jinja", "qformer_tokenizer/model.safetensors")
    found = open_source(str(folder))
    assert found.side_files == {TEMPLATE: 2, SECOND: 2, "tekken.json": 2}
    assert found.unread == (
        *("additional_chat_templates/b/", "onnx/", "qformer_tokenizer/model.safetensors"),
    )
    assert list(found.tensors) == ["a"]


def test_a_linked_subfolder_is_not_followed(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    put(tmp_path / "elsewhere", "secret.jinja")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    found = open_source(str(folder))
    assert found.side_files == {}
    assert found.unread == ("additional_chat_templates/",)


def test_recorded_headers_keep_the_names_of_subfolders(tmp_path: Path) -> None:
    folder = write(tmp_path / "m")
    put(folder, TEMPLATE)
    found = open_source(str(folder))
    record = tmp_path / "m.json"
    record.write_text(write_recorded(found))
    assert read_recorded(record).side_files == found.side_files


@pytest.mark.parametrize("name", ["onnx/a.jinja", "additional_chat_templates/../a", "../a"])
def test_recorded_headers_with_names_of_other_folders_are_refused(
    tmp_path: Path, name: str
) -> None:
    folder = write(tmp_path / "m")
    put(folder, TEMPLATE)
    document = json.loads(write_recorded(open_source(str(folder))))
    document["side_files"] = {name: 3}
    record = tmp_path / "m.json"
    record.write_text(json.dumps(document))
    with pytest.raises(Exception, match="bad-recorded-headers"):
        read_recorded(record)
