"""The files beside the tensors: known from the plan alone, and right for their readers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from emitters import FORMATS
from emitters.core.build import build
from emitters.core.verify import verify_bundle
from policy_dsl.diagnostics import PolicyError
from policy_dsl.planning.record import source_id
from policy_dsl.planning.resolve import resolve

MIXED = """name: mixed
target: mlx_affine
rules: |
  all: 4bit
  down_proj: 3bit g32
  o_proj: mxfp4
  q_proj: keep
  norm: keep
"""


def test_formats_are_the_folders_with_a_spec():
    assert "mlx_affine" in FORMATS
    assert set(FORMATS) == set(FORMATS)
    with pytest.raises(KeyError):
        FORMATS["core"]


def test_every_size_is_known_from_headers_alone(planned):
    plan, inventory = planned(Path("minimax-m2.7"), "config_i")
    sizes = {file.name: file.nbytes for file in plan.files}
    unknown = inventory.side_files is None
    assert (None in sizes.values()) == unknown
    assert all(file.reason for file in plan.files if file.nbytes is None)
    bare = resolve(plan.policy, inventory, FORMATS, files=False)
    assert plan.tensor_files == list(bare.files)


def test_unknown_side_files_leave_the_rest_exact(demo, planned):
    plan, inventory = planned(demo, "config_i")
    known = {file.name: file.nbytes for file in plan.files}
    bare = resolve(plan.policy, replace(inventory, side_files=None), FORMATS)
    found = {file.name: file.nbytes for file in bare.files if file.nbytes is not None}
    assert found.items() <= known.items()
    assert "policyc.json" not in found
    assert "tokenizer.json" not in found


def test_a_plan_digest_tells_plans_apart(write_llama, planned):
    source = write_llama()
    plan, again, other = (planned(source, text)[0] for text in (MIXED, MIXED, "mlx_4bit"))
    assert plan.digest == again.digest
    assert plan.digest != other.digest


def test_a_record_names_no_place():
    assert source_id("/somewhere/model") == "model"
    assert source_id("org/model") == "org/model"


TEMPLATES = "additional_chat_templates"


@pytest.mark.parametrize("target", ["mlx_affine", "gptq", "jangtq_prestack", "hipfire_hfq"])
def test_side_files_are_in_the_bundle_or_among_those_left_out(demo, planned, tmp_path, target):
    source = Path(shutil.copytree(demo, tmp_path / "model"))
    names = ("tekken.json", "tokenizer.model", "tokenizer.model.v3", "spiece.model")
    others = (f"{TEMPLATES}/rag.jinja", "onnx/a", "photo.png", "a.gguf", "LICENSE.md")
    for name in (*names, *others):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    policies = {
        "mlx_affine": "mlx_4bit",
        "gptq": "w4a16",
        "jangtq_prestack": "jangtq_k",
        "hipfire_hfq": "hipfire_mq4",
    }
    plan, inventory = planned(source, policies[target])
    held = {file.name for file in plan.files}
    left = {file.name: file.reason for file in plan.omitted_files}
    embedded = set(FORMATS[target].spec.embedded_files)
    assert inventory.side_files.keys() - embedded <= held | left.keys()
    assert not held & left.keys()
    assert {"LICENSE.md"} <= held
    assert {"README.md", "a.gguf", "onnx/", "photo.png"} <= left.keys()
    if target == "hipfire_hfq":
        assert left["tokenizer.model"] == "hipfire_hfq has no place for it"
    else:
        assert {*names, f"{TEMPLATES}/rag.jinja"} <= held


def test_a_bundle_with_subfolders_is_built_verified_and_replaced(write_llama, planned, tmp_path):
    source, out = write_llama(), tmp_path / "out"
    (source / TEMPLATES).mkdir()
    (source / TEMPLATES / "rag.jinja").write_text("{{ x }}")
    build(*planned(source), out=out)
    assert (out / TEMPLATES / "rag.jinja").read_text() == "{{ x }}"
    assert json.loads((out / "policyc.json").read_text())["files"][f"{TEMPLATES}/rag.jinja"]
    assert verify_bundle(out, jobs=1).findings == ()
    build(*planned(source), out=out, force=True)
    mine = out / TEMPLATES / "mine.jinja"
    mine.write_text("mine")
    (stray,) = verify_bundle(out, jobs=1).findings
    assert (stray.code, stray.severity) == ("unrecorded-file", "warning")
    with pytest.raises(PolicyError, match="output-has-other-files"):
        build(*planned(source), out=out, force=True)
    assert mine.read_text() == "mine"
    mine.unlink()
    (out / TEMPLATES / "rag.jinja").unlink()
    (lost,) = verify_bundle(out, jobs=1).findings
    assert lost.code == "missing-bundle-file"
    assert "rag.jinja" in lost.message
