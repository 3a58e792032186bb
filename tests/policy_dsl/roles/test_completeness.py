"""Every tensor that a model needs is asked for, in the shape that its config means."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from family_cases import source_of

from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory, TensorInfo
from policy_dsl.roles.architecture import architecture, family_of
from policy_dsl.roles.classify import classify
from policy_dsl.roles.model import numbered_key
from policy_dsl.sources.reference import open_source

GOLDEN = Path(__file__).parents[2] / "golden" / "architectures"
CASES = sorted(
    f"{path.stem} {form}"
    for path in GOLDEN.glob("*.json")
    for form in ("saved", "memory")
    if form in json.loads(path.read_text())
)
# Families that transformers has no class for, as published.
CASES += [
    f"{case} published"
    for case in (
        *("bailing_hybrid", "bailing_moe_v3", "deepseek_v41", "kimi_k3"),
        *("gemma4", "gemma4_26b", "step3p5", "hunyuan", "bailing_moe"),
    )
]
# Tables say nothing of its shape, or that it may be missing: layers that share keys need none, and
# of fused tensors there may be the parts.
ANY_SHAPE = {"kimi_k3": "A_log"}
MAYBE = {
    "deepseek_v41": "bias_vl",
    "gemma4": r"layers\.[23]\.self_attn\.(k_proj|v_proj|k_norm)",
    "hunyuan": r"qkv_proj|[^d]\.gate_and_up_proj|mlp\.gate_and_up_proj",
}
# The last word of a name -> the role by which messages name its tensor.
MEANT = {
    **{"gate_up_proj": "gate_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
    **{"gate": "router", "embed_tokens": "embed", "conv1d": "conv", "A_log": "ssm"},
    **{"e_score_correction_bias": "router_bias", "bias": "router_bias"},
    **{"input_linear": "gate_", "output_linear": "down_proj", "embeddings": "embed"},
    **{"out_proj": "o_proj", "expert_bias": "router_bias"},
    **{"attention_sink_bias": "sinks", "word_embeddings": "embed", "attn_sink": "sinks"},
    **{"query_key_value": "qkv_proj", "dense": "o_proj", "head": "lm_head"},
    **{"wq_a": "q_a_proj", "wq_b": "q_b_proj", "wkv": "kv", "wgate": "compressor_gate"},
    **{"per_layer_model_projection": "model_projection"},
    **{"wo_a": "o_a_proj", "wo_b": "o_b_proj", "embed_tokens_per_layer": "embed_per_layer"},
}
TOWERS = ("vision", "visual", "multi_modal_projector", "mm_projector")


@pytest.fixture(params=CASES)
def model(request, recorded):
    """A whole tiny model of a family, as saved by transformers and as it is in memory."""
    case, form = request.param.split()
    if form == "published":
        return _published(case, request.getfixturevalue("tmp_path"))
    found, _ = recorded(case, form)
    has_head = any("lm_head" in name for name in found.tensors)
    # Whether a head may be missing depends on this key alone.
    config = {**found.config, "tie_word_embeddings": not has_head}
    return Inventory("tiny", config, found.tensors)


def _published(case, folder):
    """The language model of a golden case, without blocks that predict tokens."""
    found = open_source(str(source_of(case, folder)))
    rule = architecture(family_of(found.config)).names.get
    beyond = f"model.layers.{found.config.get('num_hidden_layers')}."
    tensors = {
        name: tensor
        for name, tensor in found.tensors.items()
        if rule(numbered_key(name)[0]) and not name.startswith(beyond)
    }
    has_head = any(name.endswith("head.weight") for name in tensors)
    return Inventory("tiny", {**found.config, "tie_word_embeddings": not has_head}, tensors)


def _language(model):
    """The names of the language model's tensors."""
    return [name for name in model.tensors if not any(tower in name for tower in TOWERS)]


def _one_of_each(model):
    """One name of those that differ in their numbers only."""
    return list({re.sub(r"[0-9]+", "#", name): name for name in _language(model)}.values())


def _refusal(model, tensors, **config):
    with pytest.raises(PolicyError) as caught:
        classify(Inventory(model.id, {**model.config, **config}, tensors))
    return str(caught.value)


def _last_words(name):
    """Words of which a message about a tensor has at least one."""
    parts = name.removesuffix(".weight").split(".")
    words = [part for part in parts if not part.isdecimal()][-2:]
    return [*words, *(MEANT[word] for word in words if word in MEANT)]


def test_a_checkpoint_without_any_one_tensor_is_refused(model):
    classify(model)
    maybe = re.compile(MAYBE.get(model.config["model_type"], "^$"))
    for name in [one for one in _language(model) if not maybe.search(one)]:
        rest = {other: each for other, each in model.tensors.items() if other != name}
        said = _refusal(model, rest)
        assert any(word in said for word in _last_words(name)), (name, said)


def test_a_tensor_of_any_other_shape_is_refused_by_name(model):
    unsaid = ANY_SHAPE.get(model.config["model_type"])
    for name in [one for one in _one_of_each(model) if unsaid is None or unsaid not in one]:
        shape = model.tensors[name].shape
        others = [(*shape[:axis], size + 2, *shape[axis + 1 :]) for axis, size in enumerate(shape)]
        for other in (*others, (), (0,), (*shape, 1)):
            changed = model.tensors[name]._replace(shape=other)
            said = _refusal(model, {**model.tensors, name: changed})
            assert "wrong-shape" in said or "bad-config-value" in said
            assert name in said


@pytest.mark.parametrize("dtype", ["I64", "I32", "BOOL", "F64", "U8", "F8_E4M3", "F8_E5M2"])
def test_a_tensor_of_a_dtype_that_no_weight_has_is_refused_by_name(model, dtype):
    for name in _one_of_each(model):
        changed = model.tensors[name]._replace(dtype=dtype)
        said = _refusal(model, {**model.tensors, name: changed})
        assert name in said
        assert (dtype if dtype != "F8_E4M3" else "FP8") in said


def _sizes(config):
    text = config.get("text_config", {})
    return {
        key: value
        for key, value in {**text, **config}.items()
        if type(value) is int
        and value
        and not key.endswith(("_token_id", "_tok", "_per_token"))
        and key not in _FREE
    }


# Numbers that no tensor shows.
_FREE = {
    *("max_position_embeddings", "n_group", "topk_group", "rotary_dim", "index_topk"),
    *("mm_tokens_per_image", "group_norm_size", "attn_res_block_size", "sliding_window"),
    *("num_nextn_predict_layers", "candidate_source_layer_id", "moe_top_k", "moe_topk"),
    *("cla_share_factor", "num_shared_expert", "top_k_experts"),
}


def _with(config, key, value):
    if key in config:
        return {key: value}
    return {"text_config": {**config["text_config"], key: value}}


@pytest.mark.parametrize(
    "other", [lambda size: size * 2, lambda size: size + 7, lambda size: 65535]
)
def test_a_size_that_the_tensors_have_not_is_refused(model, other):
    sizes = _sizes(model.config)
    unused = {"num_key_value_heads"} if "kv_lora_rank" in sizes else set()
    unused |= {"qk_rope_head_dim"} if "o_lora_rank" in sizes else set()
    if sizes.get("hidden_size_per_layer_input") is None:
        unused |= {"vocab_size_per_layer_input"}
    if model.config["model_type"].startswith(("qwen3_5_moe", "solar_open")):
        unused = {"intermediate_size"}
    if sizes.get("shared_intermediate_size") and "num_local_experts" not in sizes:
        unused = {"intermediate_size"}
    for key, size in sizes.items():
        if key not in unused:
            said = _refusal(model, model.tensors, **_with(model.config, key, other(size)))
            assert "error[" in said


BAD_VALUES = ["x", [1, 2], True, -1, 2.5, 10**30, {}, "", 0.1]


@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_size_of_another_kind_is_a_bad_config_value(model, value):
    for key in _sizes(model.config):
        said = _refusal(model, model.tensors, **_with(model.config, key, value))
        assert f"gives {key} as " in said


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("minimax_m2", "num_experts_per_tok", "x"),
        ("llama", "tie_word_embeddings", 1),
        ("llama", "rope_theta", "10000"),
        ("llama", "rope_theta", float("nan")),
        ("llama", "rope_scaling", "linear"),
        ("llama", "attention_bias", "yes"),
        ("qwen3_moe", "mlp_only_layers", 1),
        ("qwen3_moe", "mlp_only_layers", ["0"]),
        ("qwen3_moe", "decoder_sparse_step", 0),
        ("qwen3_next", "layer_types", ["full_attention"]),
        ("glm4_moe", "norm_topk_prob", "true"),
        ("glm4_moe", "routed_scaling_factor", []),
        ("gemma3_text", "sliding_window", "all"),
    ],
)
def test_values_that_readers_need_are_of_their_kind(case, key, value, changed, message):
    said = message(changed(case, config={key: value}))
    assert "error[bad-config-value]" in said
    assert f"gives {key} as " in said


@pytest.mark.parametrize(
    ("case", "config", "said"),
    [
        ("qwen3_moe", {"mlp_only_layers": []}, "mlp_only_layers is []"),
        ("glm4_moe", {"first_k_dense_replace": 0}, "first_k_dense_replace is 0"),
        ("glm4_moe", {"first_k_dense_replace": 2}, "first_k_dense_replace is 2"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts is 0"),
        ("glm4_moe", {"use_qk_norm": False}, "use_qk_norm is false"),
        ("llama", {"attention_bias": None}, "attention_bias is null, which means false"),
        ("llama", {"mlp_bias": False}, "mlp_bias is false"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank is null"),
        ("deepseek_v3", {"first_k_dense_replace": 2}, "first_k_dense_replace is 2"),
        ("deepseek_v32", {"mlp_layer_types": ["dense"] * 3}, 'mlp_layer_types says "dense"'),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 3}, "layer_types says"),
    ],
)
def test_blocks_that_the_config_denies_are_refused_by_key_and_tensors(
    case, config, said, changed, message
):
    text = message(changed(case, config=config))
    assert text.startswith("error[config-disagrees]: ")
    assert said in text.splitlines()[0]
    assert ", but tiny has " in text.splitlines()[0]


def test_what_the_config_promises_is_missed_by_its_key(changed, message):
    said = message(changed("glm4_moe", without="_norm.weight", config={"use_qk_norm": True}))
    assert (
        "error[missing-tensor]: tiny has no self_attn.q_norm, self_attn.k_norm "
        "in layers 0, 1, 2; use_qk_norm is true" in said
    )
    said = message(changed("llama", without="layers.1.post_attention"))
    assert said == "error[missing-tensor]: tiny has no post_attention_layernorm in layer 1"


def test_one_wrong_size_is_one_finding_however_many_tensors_show_it(changed, codes, message):
    said = message(changed("minimax_m2", config={"intermediate_size": 65535}))
    assert said.count("error[") == 1
    assert "gives intermediate_size as 65535\n" in said
    assert "it is 128 in model.layers.0." in said


def test_fused_experts_that_are_stored_transposed_are_noticed(recorded, codes):
    found, _ = recorded("qwen3_moe", "memory")
    tensors = {
        name: each._replace(shape=(each.shape[0], each.shape[2], each.shape[1]))
        if ".experts." in name
        else each
        for name, each in found.tensors.items()
    }
    assert set(codes(Inventory("tiny", found.config, tensors))) == {"wrong-shape"}


def test_counters_in_towers_are_no_weights(changed):
    positions = TensorInfo("vision_tower.embeddings.position_ids", "I64", (1, 8), 64)
    classify(changed("gemma3", with_tensors=[positions]))


@pytest.mark.parametrize("case", ["glm4_moe", "deepseek_v3"])
def test_an_mtp_block_is_left_out_whole_or_not_at_all(case, recorded, inventory, mtp_block):
    source, _ = recorded(case)
    config = {**source.config, "num_nextn_predict_layers": 1}
    block = mtp_block("model.layers.3.", case, 2)
    whole = inventory(config, *source.tensors.values(), *block)
    assert classify(whole).n_layers == 3
    assert classify(inventory(config, *source.tensors.values())).n_layers == 3
    for missing in block:
        left = [each for each in whole.tensors.values() if each is not missing]
        with pytest.raises(PolicyError) as caught:
            classify(inventory(config, *left))
        assert "layer 3" in str(caught.value), missing.name
    longer = [each._replace(shape=(each.shape[0] + 8, *each.shape[1:])) for each in block]
    for wrong, right in zip(longer, block, strict=True):
        others = {**whole.tensors, right.name: wrong}
        with pytest.raises(PolicyError):
            classify(inventory(config, *others.values()))
