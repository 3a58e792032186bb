"""Whole bundles, byte for byte those of jang's own converter.

Source: tests/golden/jangtq/README.md (jang 2.5.50, its MiniMax converter and its rebundler).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hash_sources import Recipe, source_digest, source_tensors
from small_checkpoints import digests, stored

GOLDEN = Path(__file__).parents[2] / "golden" / "jangtq"
BUNDLES = (
    "tiny8_bf16_JANGTQ2",
    "tiny8_fp8_JANGTQ2",
    "tiny8_bf16_JANGTQ2_perexpert",
    "tiny32_bf16_JANGTQ_K",
    "tiny32_fp8_JANGTQ4",
    "tiny32_odd_bf16_JANGTQ_K",
)
MICRO = ("micro_JANGTQ_K", "micro_JANGTQ2_perexpert")
INDEX = "model.safetensors.index.json"
DOCUMENTS = ("config.json", "jang_config.json", "tokenizer_config.json")
# What a bundle of ours has or says otherwise, and why.
OWN_FILES = {"policyc.json": "the record of the build"}
PLACE = "<absolute path of the bundle before rebundling>"
# Key -> the recorded value that another one may replace, and why.
OTHER_INDEX: dict[str, tuple[Any, str]] = {
    "rebundled_from": (PLACE, "a path of the converting machine; nothing is rebundled here"),
    "total_size": (0, "where experts lie apart, jang's converter forgets to count"),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_the_source_is_the_recorded_one(manifests, name):
    recorded = manifests[name]
    found = source_tensors(Recipe(**recorded["source"]))
    assert source_digest(found) == recorded["source_digest"]
    for tensor, (dtype, shape, sha256) in recorded.get("source_tensors", {}).items():
        here, values = found[tensor]
        assert (here, list(values.shape)) == (dtype, shape)
        assert hashlib.sha256(values.tobytes()).hexdigest() == sha256


def test_every_recorded_bundle_is_compared(manifests):
    assert tuple(manifests) == BUNDLES


@pytest.mark.parametrize("name", BUNDLES)
def test_every_tensor_is_the_recorded_one(manifests, built, name):
    found = {
        tensor: [dtype, list(shape), hashlib.sha256(content).hexdigest()]
        for tensor, (dtype, shape, content) in stored(built(name).bundle).items()
    }
    expected = manifests[name]["tensors"]
    assert found.keys() == expected.keys()
    assert [tensor for tensor in expected if found[tensor] != expected[tensor]] == []


@pytest.mark.parametrize("name", BUNDLES)
def test_every_file_is_the_recorded_one(manifests, built, name):
    """The same header, order and padding too: whole shards have the recorded hashes."""
    recorded, bundle = manifests[name], built(name).bundle
    assert sorted(digests(bundle).keys() - OWN_FILES) == recorded["files"]
    shards = {path: sha for path, sha in digests(bundle).items() if path.endswith("tensors")}
    assert shards == recorded["shard_sha256"]


@pytest.mark.parametrize("name", BUNDLES)
def test_metadata_are_the_recorded_ones(manifests, built, name):
    recorded, bundle = manifests[name], built(name).bundle
    for file in DOCUMENTS:
        document = json.loads((bundle / file).read_text(encoding="utf-8"))
        # As text, for the order of keys and the kinds of numbers.
        assert json.dumps(document) == json.dumps(recorded[file])
    template = (bundle / "chat_template.jinja").read_text(encoding="utf-8")
    assert template == recorded["chat_template.jinja"]
    metadata = json.loads((bundle / INDEX).read_bytes())["metadata"]
    expected = said_alike(recorded["index_metadata"], metadata)
    assert json.dumps(metadata) == json.dumps(expected)


@pytest.mark.parametrize("name", MICRO)
def test_whole_recorded_folders_are_made_again(built, name):
    found, expected = files(built(name).bundle), files(GOLDEN / name)
    assert found.keys() - OWN_FILES == expected.keys()
    assert [file for file in expected if found[file] != expected[file]] == [INDEX]
    mine, theirs = (json.loads(folder[INDEX]) for folder in (found, expected))
    theirs["metadata"] = said_alike(theirs["metadata"], mine["metadata"])
    # As text, for the order of keys.
    assert json.dumps(mine) == json.dumps(theirs)


@pytest.mark.parametrize("name", [*BUNDLES, *MICRO])
def test_the_index_counts_the_files(built, name):
    bundle = built(name).bundle
    shards = list(bundle.glob("model-*.safetensors"))
    total = json.loads((bundle / INDEX).read_bytes())["metadata"]["total_size"]
    assert total == sum(path.stat().st_size for path in shards)


def files(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def said_alike(recorded: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """An index's recorded metadata; as we have it, or have it not, where that is excused."""
    excused = {key for key, value in OTHER_INDEX.items() if recorded.get(key) == value[0]}
    return {
        key: found[key] if key in excused else value
        for key, value in recorded.items()
        if key in found or key not in excused
    }
