"""What an index says beside its list of shards, and an index beside a container."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emitters.core.build import build
from emitters.core.verify import verify_bundle

INDEX = "model.safetensors.index.json"
HFQ = "all, router: q8; experts: mq4; norm, router_bias: f16"
TOTALS = (True, -1, 1, 1.5, float("nan"), float("inf"), 10**60, "7", "x" * 10**6, [1], {"a": 1})


@pytest.fixture
def bundle(write_llama: Any, planned: Any, tmp_path: Path) -> Path:
    """A bundle in shards, without a record."""
    build(*planned(write_llama()), out=tmp_path / "bundle")
    (tmp_path / "bundle" / "policyc.json").unlink()
    return tmp_path / "bundle"


def change(bundle: Path, **changes: object) -> None:
    """Other values in the index of a bundle."""
    index = json.loads((bundle / INDEX).read_text())
    (bundle / INDEX).write_text(json.dumps({**index, **changes}))


@pytest.mark.parametrize("total", TOTALS, ids=lambda total: str(total)[:20])
def test_a_total_that_is_not_that_of_the_tensors_is_a_finding(bundle: Path, total: object) -> None:
    change(bundle, metadata={"total_size": total})
    found = [one for one in verify_bundle(bundle, jobs=1).findings if one.code != "no-record"]
    assert [one.code for one in found] == ["index-disagrees"]
    assert "total_size" in found[0].message
    assert len(found[0].message) < 300


@pytest.mark.parametrize("metadata", [None, True, 1, float("nan"), "x", [], [1], {}])
def test_metadata_without_a_total_say_nothing(bundle: Path, metadata: object) -> None:
    change(bundle, metadata=metadata)
    assert verify_bundle(bundle, jobs=1).ok


@pytest.mark.parametrize("listed", [None, True, 1, "x", [], {}, [1], {"a": 1}, {"a": None}])
def test_a_list_of_shards_of_another_type_is_a_finding(bundle: Path, listed: object) -> None:
    change(bundle, weight_map=listed)
    (found,) = verify_bundle(bundle, jobs=1).findings
    assert found.code == "bad-source-json"
    assert INDEX in found.message
    assert "weight_map" in found.message


def test_an_index_beside_a_container_is_not_part_of_it(
    demo: Path, planned: Any, tmp_path: Path
) -> None:
    policy = f"name: hfq\ntarget: hipfire_hfq\nrules: |\n  {HFQ}\n"
    build(*planned(demo, policy), out=tmp_path / "bundle")
    for text in ("{", "[]", '{"metadata": {"total_size": 7}}', "1" * 5000):
        (tmp_path / "bundle" / INDEX).write_text(text)
        report = verify_bundle(tmp_path / "bundle", jobs=1)
        assert report.ok
        assert [found.code for found in report.findings] == ["unrecorded-file"]
