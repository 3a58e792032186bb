"""Records that somebody edited and sealed again: each wrong field is an error that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from older_bundles import unpack
from small_checkpoints import llama_config, llama_tensors, write_folder

from emitters.core.build import build
from emitters.core.bundle_reading import bundle_outline
from emitters.core.verify import verify_bundle
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory
from policy_dsl.language.load import load
from policy_dsl.planning.record import record_digest
from policy_dsl.sources.reference import open_source
from policyc.workflow import plan_for

POLICY = "name: eight\ntarget: mlx_affine\nrules: |\n  all: 8bit\n  lm_head: keep\n"
# A quantized module, and a plain one.
CODED, PLAIN = "model.layers.0.mlp.down_proj", "lm_head"
# A quantized one of a bundle with a record of version 1.
OLDER = "model.layers.0.block_sparse_moe.switch_mlp.down_proj"
NUMBERS = (True, -1, 1.0, 64.0, float("nan"), float("inf"), "1", [], {}, 10**60)
NO_NUMBERS = (True, 1, 1.5, [], {})
HASHES = ("", "0" * 63, "g" * 64, 1, None)
Place = tuple[str | int, ...]
# A field of the record -> what it cannot be. The name of a module after `forms` or `rows` is the
# number that it has there.
WRONG: dict[Place, tuple[Any, ...]] = {
    ("kind",): ("plan", 1, None),
    ("policyc",): ("", 1, None),
    ("target",): ("", 1, None, []),
    ("codec_version",): (*NUMBERS, None, 2**63),
    ("plan_digest",): HASHES,
    ("policy", "name"): (*NO_NUMBERS, None),
    ("policy", "variables"): ([], "x", {"a": None}, {"a": float("nan")}, {"a": [1]}),
    ("source", "id"): (*NO_NUMBERS, None),
    ("source", "nbytes"): (*NUMBERS, None, 2**63),
    ("source", "fp8_rule"): (*NO_NUMBERS, None),
    ("source", "commit"): NO_NUMBERS,
    ("source", "files"): ([], "x", None, {"a": 1}, {"a": {"nbytes": 1}}),
    ("calibration",): (1, "x", [], {}),
    ("statistics",): (1, "x", [], None, {"a": {}}),
    ("omitted",): ({}, "x", [1], [{"name": "a"}], [{"name": 1, "reason": "x"}]),
    ("transforms",): ({}, [{}], [1], [None, None]),
    ("files",): ([], "x", None, {"a": 1}),
    ("files", "config.json", "nbytes"): (*NUMBERS, None, 2**63),
    ("files", "config.json", "sha256"): ("", "0" * 65, 1, None),
    ("forms",): ({}, "x", None, [1], [{}]),
    ("forms", CODED): ([], 1, None, {}),
    ("forms", CODED, "role"): (*NO_NUMBERS, None),
    ("forms", CODED, "shape"): (1, "x", None, {}, [1] * 65),
    ("forms", CODED, "shape", 0): (*NUMBERS, None, 2**63),
    ("forms", CODED, "added"): (*NUMBERS, None, 0, 65537),
    ("forms", CODED, "dtype"): (*NO_NUMBERS, None),
    ("forms", CODED, "parts"): ([], "x", [1], {}, ["a.b"]),
    ("forms", CODED, "rule"): (*NO_NUMBERS, None),
    ("forms", CODED, "rule_at"): (*NO_NUMBERS, {"path": "a", "line": 0, "column": 1}),
    ("forms", CODED, "treatment"): ([], "x", {}, None),
    ("forms", CODED, "treatment", "action"): ("drop", 1, None),
    ("forms", CODED, "treatment", "bits"): (*NUMBERS, None, 0, 65),
    ("forms", CODED, "treatment", "group_size"): (*NUMBERS[:1], -2, *NUMBERS[2:], 2**31),
    ("forms", CODED, "treatment", "scheme"): (*NO_NUMBERS, None),
    ("modules",): ([], "x", None, {}),
    ("modules", "columns"): ([], ["name"], "x", None),
    ("modules", "rows"): ({}, "x", None, [1], [[]], [["a", 1, 0, "0" * 64]]),
    ("modules", "rows", CODED, 0): (*NO_NUMBERS, None),
    ("modules", "rows", CODED, 1): (*NUMBERS, 65536),
    ("modules", "rows", CODED, 2): (*NUMBERS, None, 1000),
    ("modules", "rows", CODED, 3): HASHES,
    ("modules", "rows", CODED, 4): ([], ["0" * 64], ["0" * 64] * 4, ["x"] * 3, "x", None),
}
WRONG_V1: dict[Place, tuple[Any, ...]] = {
    ("kind",): ("plan", 1, None),
    ("policyc",): ("", 1, None),
    ("target",): ("", 1, None, []),
    ("plan_digest",): HASHES,
    ("policy", "name"): (*NO_NUMBERS, None),
    ("policy", "variables"): ([], "x", {"a": None}, {"a": float("nan")}, {"a": [1]}),
    ("source", "id"): (*NO_NUMBERS, None),
    ("source", "nbytes"): (*NUMBERS, None, 2**63),
    ("source", "fp8_rule"): (*NO_NUMBERS, None),
    ("omitted",): ({}, "x", [1], [{"name": "a"}], [{"name": 1, "reason": "x"}]),
    ("transforms",): ({}, [{}], [1], [None, None]),
    ("modules",): ([], "x", None),
    ("modules", OLDER): ([], 1, None, {}),
    ("modules", OLDER, "role"): (*NO_NUMBERS, None),
    ("modules", OLDER, "layer"): (*NUMBERS, 65536),
    ("modules", OLDER, "shape"): (1, "x", None, {}, [1] * 65),
    ("modules", OLDER, "shape", 0): (*NUMBERS, None, 2**63),
    ("modules", OLDER, "added"): (*NUMBERS, None, 0, 65537),
    ("modules", OLDER, "dtype"): (*NO_NUMBERS, None),
    ("modules", OLDER, "tensors"): ([], "x", [1], {}),
    ("modules", OLDER, "treatment"): ([], "x", {}, None),
    ("modules", OLDER, "treatment", "action"): ("drop", 1, None),
    ("modules", OLDER, "treatment", "bits"): (*NUMBERS, None, 0, 65),
    ("modules", OLDER, "treatment", "group_size"): (*NUMBERS[:1], -2, *NUMBERS[2:], 2**31),
    ("modules", OLDER, "treatment", "scheme"): (*NO_NUMBERS, None),
    ("files",): ([], "x", None, {"a": 1}),
    ("files", "config.json", "nbytes"): (*NUMBERS, None, 2**63),
    ("files", "config.json", "sha256"): ("", "0" * 65, 1, None),
    ("tensors",): ([], "x", {"a": 1}, {"a": "b"}),
}
CASES = [
    pytest.param(place, value, id=f"{version}-{'.'.join(map(str, place))}-{str(value)[:20]}")
    for version, wrong in ((1, WRONG_V1), (2, WRONG))
    for place, values in wrong.items()
    for value in values
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Inventory]:
    """A bundle and its source."""
    folder = tmp_path_factory.mktemp("records")
    sizes = {"layers": 1, "hidden": 64, "inner": 128, "vocabulary": 96}
    write_folder(folder / "source", llama_config(**sizes), llama_tensors(**sizes))
    (folder / "source" / "tokenizer.json").write_text('{"model": {}}')
    (folder / "policy.yaml").write_text(POLICY)
    source = open_source(str(folder / "source"))
    build(plan_for(load(folder / "policy.yaml"), source, None), source, out=folder / "bundle")
    return folder / "bundle", source


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose record is of version 1."""
    return unpack(tmp_path_factory.mktemp("older")) / "mlx_affine"


def edited(bundle: Path, tmp_path: Path, place: Place, value: object) -> Path:
    """A copy of the bundle whose record says so, under a digest that fits."""
    shutil.copytree(bundle, tmp_path / "bundle")
    record = json.loads((bundle / "policyc.json").read_text())
    inner = record
    keys = [*place]
    if place[0] != "modules" or record["schema_version"] == 2:
        keys = [number_of(record, key, place) if key in (CODED, PLAIN) else key for key in place]
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    record["digest"] = record_digest(record)
    (tmp_path / "bundle" / "policyc.json").write_text(json.dumps(record))
    return tmp_path / "bundle"


def number_of(record: dict[str, Any], name: str | int, place: Place) -> int:
    """Where a module is among the rows, or which form it has."""
    rows = record["modules"]["rows"]
    at = [row[0] for row in rows].index(name)
    return int(rows[at][2]) if place[0] == "forms" else at


@pytest.mark.parametrize(("place", "value"), CASES)
def test_a_field_of_another_type_or_size_is_named(
    made: tuple[Path, Inventory], older: Path, tmp_path: Path, place: Place, value: object
) -> None:
    is_older = OLDER in place or place[0] == "tensors"
    bundle = edited(older if is_older else made[0], tmp_path, place, value)
    report = verify_bundle(bundle, made[1], jobs=1)
    (found,) = report.findings
    assert found.code == "bad-record"
    fields = [key for key in place if isinstance(key, str) and key not in (CODED, OLDER)]
    assert fields[-1] in found.message
    with pytest.raises(PolicyError, match="bad-record"):
        bundle_outline(bundle)


@pytest.mark.parametrize("shape", [[96], [96, 64, 1], [64, 96], [2**62, 64], []])
def test_a_plain_tensor_has_the_shape_that_its_record_says(
    made: tuple[Path, Inventory], tmp_path: Path, shape: list[int]
) -> None:
    bundle = edited(made[0], tmp_path, ("forms", PLAIN, "shape"), shape)
    (found,) = verify_bundle(bundle, made[1], jobs=1).findings
    assert (found.code, PLAIN in found.message) == ("incomplete-module", True)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("modules", "rows", PLAIN, 0), CODED),
        (("modules", "rows", PLAIN, 0), "model.norm"),
        (("forms", CODED, "parts"), ["weight", "scales", "scales"]),
    ],
)
def test_a_module_is_listed_once_and_a_part_once_in_it(
    made: tuple[Path, Inventory], tmp_path: Path, place: Place, value: object
) -> None:
    bundle = edited(made[0], tmp_path, place, value)
    (found,) = verify_bundle(bundle, made[1], jobs=1).findings
    assert (found.code, "is listed twice" in found.message) == ("bad-record", True)


@pytest.mark.parametrize(
    "tensors",
    [["lm_head.weight", "model.norm.weight"], ["lm_head.weight"] * 2, [f"{OLDER}.scales"]],
)
def test_a_tensor_is_part_of_one_module_and_one_part_of_it(
    older: Path, tmp_path: Path, tensors: list[str]
) -> None:
    bundle = edited(older, tmp_path, ("modules", "lm_head", "tensors"), tensors)
    (found,) = verify_bundle(bundle, jobs=1).findings
    assert (found.code, "is listed twice" in found.message) == ("bad-record", True)
