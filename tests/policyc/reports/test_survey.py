"""The bytes of the roles of a source add up to those of its tensors, by whatever dtype."""

from __future__ import annotations

import pytest

from policyc.reports.inspect_report import survey, survey_document


@pytest.mark.parametrize("dtype", ["F8_E4M3", "U8", "I8"])
def test_fp8_counts_whole_under_any_name(dtype, tensor, inventory, recorded):
    source, _ = recorded("qwen3_moe")
    tensors = []
    for each in source.tensors.values():
        if each.name.endswith("_proj.weight"):
            grid = [-(-size // 16) for size in each.shape]
            scale = tensor(f"{each.name}_scale_inv", grid, "F32")
            each = each._replace(dtype=dtype, nbytes=each.nbytes // 2)  # noqa: PLW2901
            tensors.append(scale)
        tensors.append(each)
    entry = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    found = survey(inventory({**source.config, "quantization_config": entry}, *tensors))
    assert found.findings == ()
    assert sum(role["nbytes"] for role in found.roles) == found.inventory.nbytes
    assert found.parameters == sum(each.nbytes // 2 for each in source.tensors.values())


def test_mxfp4_counts_two_values_in_a_byte(tensor, changed):
    path = "model.layers.0.mlp.experts"
    packed = [
        tensor(f"{path}.down_proj_blocks", [4, 64, 4, 16], "U8"),
        tensor(f"{path}.down_proj_scales", [4, 64, 4], "U8"),
        tensor(f"{path}.down_proj_bias", [4, 64]),
    ]
    without = "layers.0.mlp.experts.down_proj"
    entry = {"quantization_config": {"quant_method": "mxfp4"}}
    source = changed("gpt_oss", without=without, with_tensors=packed, config=entry)
    found = survey(source)
    document = survey_document(found)
    assert sum(role["nbytes"] for role in document["roles"]) == source.nbytes
