"""A bundle that is not what was planned is not finished, whoever made the mistake."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from emitters import FORMATS
from emitters.core.build import build, check_bundle
from emitters.core.journal import tensor_files
from emitters.core.preconditions import open_as_planned
from emitters.core.run_unit import Work
from emitters.tensor_io.view_rows import ViewReader
from policy_dsl.diagnostics import PolicyError
from policy_dsl.planning.resolve import resolve

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def built(write_llama, planned, tmp_path):
    """A plan, the work of its build, and the folder that this wrote."""
    plan, inventory = planned(write_llama())
    build(plan, inventory, out=tmp_path / "out")
    known = FORMATS[plan.target]
    reader = ViewReader(open_as_planned(plan, inventory, known), plan.model.config)
    return plan, Work(known, reader, plan.fp8_rule, tmp_path / "out"), tmp_path / "out"


def test_the_built_bundle_is_what_was_planned(built):
    plan, work, _ = built
    check_bundle(plan, work, tensor_files(plan, work))


@pytest.mark.parametrize("bits", [8, None])
def test_metadata_that_tell_another_width_are_found(built, bits):
    plan, work, folder = built
    config = json.loads((folder / "config.json").read_text())
    for key in ("quantization", "quantization_config"):
        config[key][Q_PROJ] = False if bits is None else {**config[key][Q_PROJ], "bits": bits}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PolicyError, match="width-disagrees"):
        check_bundle(plan, work, tensor_files(plan, work))


def test_a_tensor_by_another_name_is_found(built):
    plan, work, folder = built
    for file in ("model.safetensors", "model.safetensors.index.json"):
        content = (folder / file).read_bytes()
        changed = content.replace(b'"model.norm.weight"', b'"model.nurm.weight"', 1)
        (folder / file).write_bytes(changed)
    with pytest.raises(PolicyError) as caught:
        check_bundle(plan, work, tensor_files(plan, work))
    assert "the header of model.safetensors is not the planned one" in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "code"),
    [
        ("model.safetensors.index.json", '{"metadata": {"total_size": 7}}', "index"),
        ("config.json", "{}", "width-disagrees"),
        ("config.json", "[]", "bad-"),
    ],
)
def test_what_verify_would_refuse_is_not_finished(
    write_llama, planned, tmp_path, file, content, code
):
    known = FORMATS["mlx_affine"]
    files = known.files()

    def metadata(plan):
        return files.metadata(plan) | {file: content.encode()}

    wrong = replace(known, files=lambda: replace(files, metadata=metadata))
    plan, inventory = planned(write_llama())
    plan = resolve(plan.policy, inventory, {known.name: wrong})
    with pytest.raises(PolicyError, match=code):
        build(plan, inventory, out=tmp_path / "out", format=wrong)
    # The same plan leads to it again: nothing is left that a later run would resume.
    assert {path.name for path in tmp_path.iterdir()} == {"source", "policy.yaml"}
