"""Whole files, byte for byte as hipfire writes them, metadata included."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emitters.core.verify import verify_bundle
from policy_dsl.sources.hfq_container import read_container
from policy_dsl.sources.local_files import local_files
from policy_dsl.sources.reference import open_source

GOLDEN = Path(__file__).parents[2] / "golden" / "hipfire"
TIERS = ("mq4", "mq3-lloyd", "mq3", "mq2-lloyd", "mq2")
MINIMAX = tuple(f"tiny-minimax.{tier}" for tier in TIERS)
DENSE = tuple(f"tiny-llama.{form}" for form in ("mq4", "mq6", "hfq4", "q8f16"))
# Of the others, only hashes.
KEPT = ("tiny-minimax.mq2-lloyd", "tiny-llama.mq4", "tiny-llama.hfq4")


@pytest.mark.parametrize("name", [*MINIMAX, *DENSE])
def test_a_built_file_is_the_recorded_one(
    upstream: Callable[[str], Path], manifests: dict[str, Any], name: str
) -> None:
    path, wanted = upstream(name) / name, manifests[name]
    content = path.read_bytes()
    found = read_container(local_files(path.parent), name)
    # By tensor first: one hash of all would not say where a difference is.
    tensors = {
        key: {
            "qt": one.code,
            "group": one.group_size,
            "shape": list(one.info.shape),
            "bytes": one.info.nbytes,
            "sha256": hashlib.sha256(content[one.info.start : one.info.stop]).hexdigest()[:16],
        }
        for key, one in found.tensors.items()
    }
    assert tensors == wanted["tensors"]
    assert list(tensors) == list(wanted["tensors"])
    start = found.payload_start
    assert (len(content), start) == (wanted["bytes"], wanted["data_offset"])
    assert hashlib.sha256(content[start:]).hexdigest() == wanted["payload_sha256"]
    assert hashlib.sha256(content).hexdigest() == wanted["sha256"]


@pytest.mark.parametrize("name", KEPT)
def test_header_and_metadata_are_the_recorded_ones(
    upstream: Callable[[str], Path], manifests: dict[str, Any], name: str
) -> None:
    start = manifests[name]["data_offset"]
    assert (upstream(name) / name).read_bytes()[:start] == (GOLDEN / name).read_bytes()[:start]


@pytest.mark.parametrize("name", KEPT)
def test_files_of_hipfire_verify_without_a_record(name: str) -> None:
    source = open_source(str(GOLDEN / f"{name.partition('.')[0]}-src"))
    report = verify_bundle(GOLDEN / name, source, jobs=1)
    assert report.ok
    assert {found.code for found in report.findings} == {"no-record"}
    results = {check.name: check.result for check in report.checks}
    assert results.pop("hashes") == "not possible"
    assert set(results.values()) == {"passed"}
    assert {"readers", "values"} <= results.keys()


@pytest.mark.parametrize("name", [*MINIMAX, *DENSE])
def test_built_files_verify_with_their_record(upstream: Callable[[str], Path], name: str) -> None:
    source = open_source(str(GOLDEN / f"{name.partition('.')[0]}-src"))
    report = verify_bundle(upstream(name), source, jobs=2)
    assert report.findings == ()
    assert {check.result for check in report.checks} == {"passed"}


def test_the_record_names_the_importance_matrix(upstream: Callable[[str], Path]) -> None:
    record = json.loads((upstream("tiny-minimax.mq2") / "policyc.json").read_bytes())
    content = (GOLDEN / "tiny-minimax-src" / "imatrix.gguf").read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    assert record["statistics"] == {"imatrix": {"file": "imatrix.gguf", "sha256": sha256}}
    dense = json.loads((upstream("tiny-llama.mq4") / "policyc.json").read_bytes())
    assert not dense.get("statistics")
