"""The files beside the tensors: known from the plan alone, and right for their readers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from emitters import get, names, specs
from emitters.core.bundle import complete
from emitters.core.record import plan_digest, source_id

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
    assert "mlx_affine" in names()
    assert set(specs()) == set(names())
    with pytest.raises(KeyError):
        get("core")


def test_every_size_is_known_from_headers_alone(planned):
    plan, inventory = planned(Path("minimax-m2.7"), "config_i")
    whole = complete(plan, inventory)
    sizes = {file.name: file.nbytes for file in whole.files}
    unknown = inventory.side_files is None
    assert (None in sizes.values()) == unknown
    assert all(file.reason for file in whole.files if file.nbytes is None)
    assert [file for file in whole.files if file.kind == "tensors"] == list(plan.files)
    assert complete(whole, inventory) == whole


def test_unknown_side_files_leave_the_rest_exact(demo, planned):
    plan, inventory = planned(demo, "config_i")
    known = {file.name: file.nbytes for file in complete(plan, inventory).files}
    bare = complete(plan, replace(inventory, side_files=None))
    found = {file.name: file.nbytes for file in bare.files if file.nbytes is not None}
    assert found.items() <= known.items()
    assert "policyc.json" not in found
    assert "tokenizer.json" not in found


def test_a_plan_digest_tells_plans_apart(write_llama, planned):
    source = write_llama()
    plan, again, other = (planned(source, text)[0] for text in (MIXED, MIXED, "mlx_4bit"))
    assert plan_digest(plan) == plan_digest(again)
    assert plan_digest(plan) != plan_digest(other)


def test_a_record_names_no_place():
    assert source_id("/somewhere/model") == "model"
    assert source_id("org/model") == "org/model"
