"""Records that somebody edited and sealed again: each wrong field is an error that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_checkpoints import llama_config, llama_tensors, write_folder

from emitters.core.build import build
from emitters.core.bundle_outline import bundle_outline
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
NUMBERS = (True, -1, 1.0, 64.0, float("nan"), float("inf"), "1", [], {}, 10**60)
NO_NUMBERS = (True, 1, 1.5, [], {})
# A field of the record -> what it cannot be.
WRONG: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("kind",): ("plan", 1, None),
    ("policyc",): ("", 1, None),
    ("target",): ("", 1, None, []),
    ("plan_digest",): ("", "0" * 63, "g" * 64, 1, None),
    ("policy", "name"): (*NO_NUMBERS, None),
    ("policy", "variables"): ([], "x", {"a": None}, {"a": float("nan")}, {"a": [1]}),
    ("source", "id"): (*NO_NUMBERS, None),
    ("source", "nbytes"): (*NUMBERS, None, 2**63),
    ("source", "fp8_rule"): (*NO_NUMBERS, None),
    ("omitted",): ({}, "x", [1], [{"name": "a"}], [{"name": 1, "reason": "x"}]),
    ("transforms",): ({}, [{}], [1], [None, None]),
    ("modules",): ([], "x", None),
    ("modules", CODED): ([], 1, None, {}),
    ("modules", CODED, "role"): (*NO_NUMBERS, None),
    ("modules", CODED, "layer"): (*NUMBERS, 65536),
    ("modules", CODED, "shape"): (1, "x", None, {}, [1] * 65),
    ("modules", CODED, "shape", 0): (*NUMBERS, None, 2**63),
    ("modules", CODED, "added"): (*NUMBERS, None, 0, 65537),
    ("modules", CODED, "dtype"): (*NO_NUMBERS, None),
    ("modules", CODED, "tensors"): ([], "x", [1], {}),
    ("modules", CODED, "treatment"): ([], "x", {}, None),
    ("modules", CODED, "treatment", "action"): ("drop", 1, None),
    ("modules", CODED, "treatment", "bits"): (*NUMBERS, None, 0, 65),
    ("modules", CODED, "treatment", "group_size"): (*NUMBERS[:1], -2, *NUMBERS[2:], 2**31),
    ("modules", CODED, "treatment", "scheme"): (*NO_NUMBERS, None),
    ("files",): ([], "x", None, {"a": 1}),
    ("files", "config.json", "nbytes"): (*NUMBERS, None, 2**63),
    ("files", "config.json", "sha256"): ("", "0" * 65, 1, None),
    ("tensors",): ([], "x", {"a": 1}, {"a": "b"}),
}
CASES = [
    pytest.param(place, value, id=f"{'.'.join(map(str, place))}-{str(value)[:20]}")
    for place, values in WRONG.items()
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


def edited(bundle: Path, tmp_path: Path, place: tuple[str | int, ...], value: object) -> Path:
    """A copy of the bundle whose record says so, under a digest that fits."""
    shutil.copytree(bundle, tmp_path / "bundle")
    record = json.loads((bundle / "policyc.json").read_text())
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    record["digest"] = record_digest(record)
    (tmp_path / "bundle" / "policyc.json").write_text(json.dumps(record))
    return tmp_path / "bundle"


@pytest.mark.parametrize(("place", "value"), CASES)
def test_a_field_of_another_type_or_size_is_named(
    made: tuple[Path, Inventory], tmp_path: Path, place: tuple[str | int, ...], value: object
) -> None:
    bundle = edited(made[0], tmp_path, place, value)
    report = verify_bundle(bundle, made[1], jobs=1)
    (found,) = report.findings
    assert found.code == "bad-record"
    name = str(place[-1] if isinstance(place[-1], str) else place[-2])
    assert name in found.message
    with pytest.raises(PolicyError, match="bad-record"):
        bundle_outline(bundle)


@pytest.mark.parametrize("shape", [[96], [96, 64, 1], [64, 96], [2**62, 64], []])
def test_a_plain_tensor_has_the_shape_that_its_record_says(
    made: tuple[Path, Inventory], tmp_path: Path, shape: list[int]
) -> None:
    bundle = edited(made[0], tmp_path, ("modules", PLAIN, "shape"), shape)
    (found,) = verify_bundle(bundle, made[1], jobs=1).findings
    assert (found.code, PLAIN in found.message) == ("incomplete-module", True)


@pytest.mark.parametrize(
    "tensors",
    [["lm_head.weight", "model.norm.weight"], ["lm_head.weight"] * 2, [f"{CODED}.scales"]],
)
def test_a_tensor_is_part_of_one_module_and_one_part_of_it(
    made: tuple[Path, Inventory], tmp_path: Path, tensors: list[str]
) -> None:
    bundle = edited(made[0], tmp_path, ("modules", PLAIN, "tensors"), tensors)
    (found,) = verify_bundle(bundle, made[1], jobs=1).findings
    assert (found.code, "is listed twice" in found.message) == ("bad-record", True)
