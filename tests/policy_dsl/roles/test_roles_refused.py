"""What is refused on the way from a checkpoint to a model of roles, and how it is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policy_dsl.inventory import Inventory
from policy_dsl.roles.architecture import families


def test_an_unknown_model_type_lists_the_families(changed, message):
    text = message(changed("llama", config={"model_type": "qwen3_mo"}))
    assert (
        'error[unknown-architecture]: no architecture table knows the model_type "qwen3_mo"' in text
    )
    assert 'did you mean "qwen3_moe"?' in text
    assert all(family in text for family in families())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("falcon_h1", "multiplies its weights by numbers of the config"),
        ("baichuan_m1", "divides each row of its head"),
        ("qwen4_exp", "no class of mlx-lm"),
    ],
)
def test_a_model_type_that_no_table_can_take_says_why(kind, reason, changed, message):
    text = message(changed("llama", config={"model_type": kind}))
    assert (
        f'error[unknown-architecture]: no architecture table knows the model_type "{kind}"' in text
    )
    assert reason in text
    assert "did you mean" not in text


@pytest.mark.parametrize("value", [None, 7, ["llama"]])
def test_a_config_without_a_model_type(value, changed, codes):
    assert codes(changed("llama", config={"model_type": value})) == ["missing-config-key"]


def test_a_config_without_sizes(recorded, changed, codes, message):
    assert codes(changed("llama", config={"num_hidden_layers": None})) == ["missing-config-key"]
    assert "num_experts" in message(changed("qwen3_moe", config={"num_experts": None}))
    assert codes(changed("qwen3_moe", config={"num_experts": None})) == ["missing-config-key"]
    fused, _ = recorded("qwen3_moe", "memory")
    config = {**fused.config, "num_experts": None}
    assert codes(Inventory("tiny", config, fused.tensors)) == ["missing-config-key"]


@pytest.mark.parametrize("value", ["3", -1, 2.0, True, 10**9])
def test_a_count_is_a_plausible_whole_number(value, changed, codes, message):
    model = changed("llama", config={"num_hidden_layers": value})
    assert codes(model) == ["bad-config-value"]
    assert "it must be a whole number of at most 65,536" in message(model)


def test_tensors_without_a_role_are_named_and_counted(tensor, changed, message):
    extra = [tensor(f"model.layers.0.self_attn.x{i}_proj.weight", [4, 4]) for i in range(7)]
    text = message(changed("llama", with_tensors=extra))
    assert "error[tensor-without-role]: architecture llama has no role for 7 tensors" in text
    assert "x4_proj.weight and 2 more" in text
    assert "x5_proj" not in text


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight.extra",
        "model.layers.00.self_attn.q_proj.weight",
        "model.layers.-1.self_attn.q_proj.weight",
        "model.layers.²0.self_attn.q_proj.weight",
        "model.layers.123456789012.self_attn.q_proj.weight",
        "model.layers.0.mlp.gate.weight",
        "Model.norm.weight",
        "..",
        "",
    ],
)
def test_a_name_that_is_only_like_a_known_one_has_no_role(name, tensor, changed, codes):
    assert codes(changed("llama", with_tensors=[tensor(name, [4, 4])])) == ["tensor-without-role"]


@pytest.mark.parametrize("name", ["vision_tower.", "multi_modal_projector.."])
def test_a_nameless_part_of_a_vision_tower_has_no_role(name, tensor, changed, codes):
    assert codes(changed("gemma3", with_tensors=[tensor(name, [4, 4])])) == ["tensor-without-role"]


def test_a_quantized_checkpoint_is_recognised(tensor, changed, message):
    name = "model.layers.0.mlp.gate_proj.qweight"
    text = message(changed("llama", with_tensors=[tensor(name, [4, 4], "I32")]))
    assert "already quantized" in text


def test_packed_codes_are_no_matrix_of_numbers(tensor, changed, codes):
    name = "model.layers.0.mlp.gate_proj.weight"
    source = changed("llama", without=name, with_tensors=[tensor(name, [128, 8], "I32")])
    assert codes(source) == ["unreadable-dtype"]


def test_many_matrices_of_codes_are_one_finding(recorded, message):
    found, _ = recorded("llama")
    tensors = {
        name: each._replace(dtype="I32") if name.endswith("_proj.weight") else each
        for name, each in found.tensors.items()
    }
    text = message(Inventory("tiny", found.config, tensors))
    assert text.count("unreadable-dtype") == 1
    assert " more: a matrix is BF16" in text


def test_a_layer_that_lacks_a_matrix_of_the_others_is_incomplete(changed, message):
    text = message(changed("llama", without="layers.0.self_attn.q_proj"))
    lacking = "attention.q_proj, self_attn.q_proj.bias (attention_bias is true)"
    assert text == f"error[missing-tensor]: tiny has no {lacking} in layer 0"


@pytest.mark.parametrize("shape", [[4, 4, 4], [128, 0], [0, 64], [8]])
def test_a_matrix_has_two_axes_and_values(shape, tensor, changed, codes):
    name = "model.layers.0.mlp.gate_proj.weight"
    source = changed("llama", without=name, with_tensors=[tensor(name, shape)])
    assert codes(source) == ["wrong-shape"]


@pytest.mark.parametrize(
    "shape", [[3, 64, 64], [4, 63, 64], [4, 0, 64], [64, 64], [4, 64, 8, 8]], ids=str
)
def test_fused_experts_have_the_shape_of_the_config(shape, tensor, recorded, codes):
    source, _ = recorded("qwen3_moe", "memory")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors = {**source.tensors, name: tensor(name, shape)}
    assert codes(Inventory("tiny", source.config, tensors)) == ["wrong-shape"]


def test_experts_stored_in_two_ways_are_not_guessed_at(recorded, message):
    source, _ = recorded("qwen3_vl_moe")
    tensors = {
        name: one._replace(shape=(4, 96, 64)) if name.endswith("1.mlp.experts.down_proj") else one
        for name, one in source.tensors.items()
    }
    assert "[experts, in, out]" in message(replace(source, tensors=tensors))


@pytest.mark.parametrize("config", [{"hidden_size": 8}, {"vocab_size": 9}])
def test_embeddings_have_the_shape_of_the_config(config, changed, codes):
    assert codes(changed("llama", config=config)) == ["wrong-shape"]


def test_one_matrix_under_two_names_is_ambiguous(tensor, changed, message):
    fused = tensor("model.layers.1.mlp.experts.down_proj", [4, 64, 32])
    text = message(changed("qwen3_moe", with_tensors=[fused]))
    assert "error[ambiguous-tensor]: model.layers.1.mlp.experts.0.down_proj.weight and" in text
    assert fused.name in text


def test_missing_experts_are_named(changed, message):
    source = changed("qwen3_moe", without="layers.2.mlp.experts.1.up_proj")
    assert (
        "error[missing-experts]: experts.up_proj of layer 2 lacks experts 1; the config says 4"
        in message(source)
    )


def test_experts_beyond_the_config(tensor, changed, codes):
    extra = tensor("model.layers.2.mlp.experts.9.up_proj.weight", [32, 64])
    assert codes(changed("qwen3_moe", with_tensors=[extra])) == ["expert-beyond-config"]


def test_layers_beyond_the_config(changed, codes, mtp_block):
    assert codes(changed("llama", config={"num_hidden_layers": 2})) == ["layer-beyond-config"]
    # The config announces no prediction block, so layer 3 is nothing but one too many.
    extra = mtp_block("model.layers.3.", "glm4_moe", 2)
    config = {"num_nextn_predict_layers": 0}
    source = changed("glm4_moe", with_tensors=extra, config=config)
    assert codes(source) == ["layer-beyond-config"]


def test_missing_layers_and_embeddings(inventory, changed, codes, message):
    assert codes(changed("llama", without="model.layers.1.")) == ["missing-layers"]
    assert "no tensors of layers 3, 4, 5, 6, 7, …" in message(
        changed("llama", config={"num_hidden_layers": 60})
    )
    assert codes(changed("llama", without="embed_tokens")) == ["missing-tensor"]
    assert codes(inventory({"model_type": "llama", "num_hidden_layers": 1})) == [
        "missing-layers",
        "missing-tensor",
    ]


def test_independent_defects_come_together(tensor, changed, codes):
    extra = [
        tensor("model.extra.weight", [4, 4]),
        tensor("model.layers.0.mlp.gate_proj.weight_scale_inv", [1, 1], "F32"),
    ]
    found = codes(changed("llama", with_tensors=extra, config={"num_hidden_layers": 2}))
    assert found == ["tensor-without-role", "layer-beyond-config", "wrong-scale-dtype"]
