"""config.json as a target's reader looks for it, from configs in several forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny

from emitters import FORMATS
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory
from policy_dsl.language.load import parse_policy
from policy_dsl.plan import Plan
from policy_dsl.planning.resolve import resolve
from policy_dsl.reader_config import reader_kind
from policy_dsl.roles.config_facts import TIED
from policy_dsl.sources.reference import open_source

GOLDEN = Path(__file__).parents[1] / "golden" / "families"
ABSENT = object()
# All that a target of today stores of any family.
RULES = {
    "mlx_affine": "all: 4bit g32\nnorm, router, router_bias, bias: keep optional",
    "gptq": "all: 4bit g32\nembed, lm_head, norm, router, router_bias, bias: keep optional",
    "jangtq_prestack": "experts: 2bit\nattention: 8bit g32\nembed, lm_head, norm: f16\n"
    "router, router_bias: f16",
    "hipfire_hfq": "all: q8\nnorm, bias: f16 optional",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def source(family: str, **changes: Any) -> Inventory:
    """The tiny model of a family, its config changed; ABSENT takes a key out."""
    found = tiny(family)
    config = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, **found.config, **changes}
    kept = {key: value for key, value in config.items() if value is not ABSENT}
    return replace(found, config=kept)


def without(found: Inventory, *endings: str) -> Inventory:
    """The model without the tensors whose names end like that."""
    kept = {name: one for name, one in found.tensors.items() if not name.endswith(endings)}
    return replace(found, tensors=kept)


def plan(target: str, found: Inventory, rules: str = "") -> Plan:
    text = f"name p\ntarget {target}\n{rules or RULES[target]}\n"
    return resolve(parse_policy(text, "p.qpol")[0], found, FORMATS)


def written(target: str, found: Inventory, rules: str = "") -> dict[str, Any]:
    """The bundle's config without its quantization."""
    config = json.loads(FORMATS[target].files().metadata(plan(target, found, rules))["config.json"])
    ours = ("quantization", "quantization_config", "mxtq_bits", "weight_format")
    return {key: value for key, value in config.items() if key not in ours}


def added(target: str, found: Inventory) -> dict[str, Any]:
    """What the bundle's config has and the source's has not, or has otherwise."""
    config = written(target, found)
    return {key: value for key, value in config.items() if found.config.get(key, ...) != value}


def refused(target: str, found: Inventory) -> list[str]:
    """Why no reader of the target can load it."""
    with pytest.raises(PolicyError) as caught:
        plan(target, found)
    (error,) = (one for one in caught.value.diagnostics if one.severity == "error")
    assert error.code == "no-reader"
    return [error.message, *error.notes]


BIASES = ("_proj.bias",)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_positions_that_transformers_5_nests_are_written_at_the_top(family, where):
    nested = {**LLAMA3, "rope_theta": 5e5}
    found = added("mlx_affine", source(family, **{where: nested}))
    assert found["rope_theta"] == 5e5
    assert ("rope_scaling" in found) == (where == "rope_parameters")
    if where == "rope_parameters":
        assert found["rope_scaling"] == LLAMA3


def test_keys_that_are_there_stay_as_they_are_and_in_order():
    whole = source("llama", rope_theta=5e5, rope_scaling=None, num_key_value_heads=2)
    found = written("gptq", whole)
    assert list(found.items()) == list(whole.config.items())
    assert added("mlx_affine", whole) == {}


def test_the_theta_that_mlx_lm_finds_by_itself_is_not_repeated():
    qwen3 = without(
        source("qwen3", rope_parameters={"rope_theta": 5e5}, attention_bias=False), *BIASES
    )
    assert added("mlx_affine", qwen3) == {}


@pytest.mark.parametrize("target", ["mlx_affine", "jangtq_prestack"])
def test_experts_under_another_name_and_what_mlx_lm_requires(target):
    names = {"num_experts": ABSENT, "num_local_experts": 4, "mlp_only_layers": [0]}
    found = added(target, source("qwen3_moe", **names, head_dim=ABSENT))
    assert found == {
        "num_experts": 4,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "head_dim": 16,
        "rope_theta": 10000.0,
    }


@pytest.mark.parametrize("target", ["mlx_affine", "jangtq_prestack"])
def test_what_mlx_lm_requires_of_glm(target):
    found = added(target, source("glm4_moe", rope_parameters={"rope_theta": 1e6}))
    assert {key: found[key] for key in ("rope_theta", "rope_scaling", "partial_rotary_factor")} == {
        "rope_theta": 1e6,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
    }
    assert (found["n_group"], found["topk_group"], found["norm_topk_prob"]) == (1, 1, True)


@pytest.mark.parametrize("target", ["mlx_affine", "jangtq_prestack", "gptq"])
def test_rotated_dimensions_of_minimax(target):
    nested = {"rope_theta": 5e6, "partial_rotary_factor": 0.25}
    found = added(target, source("minimax_m2", rotary_dim=ABSENT, rope_parameters=nested))
    assert found["rotary_dim"] == 4
    assert found.get("rope_theta") == (None if target == "gptq" else 5e6)


def test_vllm_gets_what_the_class_of_transformers_does_not_fill_in():
    found = added("gptq", source("minimax_m2"))
    assert found == {"scoring_func": "sigmoid", "use_routing_bias": True}
    assert added("gptq", source("glm4_moe", head_dim=ABSENT)) == {"head_dim": 16}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_whether_a_head_is_tied_is_said_where_readers_differ(family):
    silent = source(family, tie_word_embeddings=ABSENT, rope_theta=10000.0)
    assert added("mlx_affine", silent)["tie_word_embeddings"] is False
    assert "tie_word_embeddings" not in added("gptq", silent)
    tied = without(silent, "lm_head.weight")
    assert "tie_word_embeddings" not in added("mlx_affine", tied)
    assert added("gptq", tied)["tie_word_embeddings"] is True


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_scaled_positions_are_no_trouble_for_transformers(family):
    changes = {"rope_scaling": LLAMA3, "rope_theta": 5e5}
    assert added("gptq", source(family, **changes)) == {}


def test_counts_of_heads_are_written_where_a_class_is_shared():
    silent = source("mistral", num_key_value_heads=ABSENT, num_attention_heads=16, head_dim=4)
    assert added("mlx_affine", silent)["num_key_value_heads"] == 8


def test_gemma_3_below_a_vision_model_is_completed_inside():
    found = tiny("gemma3")
    text = {
        **found.config["text_config"],
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "_sliding_window_pattern": 6,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        },
    }
    gemma = without(replace(found, config={**found.config, "text_config": text}), *BIASES)
    config = written("mlx_affine", gemma)
    assert config["vocab_size"] == 96
    inside = {key: config["text_config"][key] for key in config["text_config"] if key not in text}
    assert inside == {
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }


def test_parameters_of_scaled_positions_that_mlx_lm_would_take_for_others():
    yarn = {"type": "yarn", "factor": 4.0}
    found = added("mlx_affine", source("qwen2", rope_scaling=yarn, rope_theta=1e6))
    assert found["rope_scaling"] == {**yarn, "original_max_position_embeddings": 64}


def test_a_null_that_mlx_lm_cannot_take_is_filled_in():
    found = source("llama", rope_theta=None, head_dim=None)
    config = written("mlx_affine", found)
    assert config["rope_theta"] == 10000.0
    # Its class takes this one for absence, and means the same.
    assert config["head_dim"] is None


@pytest.mark.parametrize(
    ("target", "family", "changes", "why"),
    [
        (
            "mlx_affine",
            "qwen3_moe",
            {"rope_scaling": LLAMA3},
            "does not scale positions as `llama3`",
        ),
        ("mlx_affine", "llama", {"rope_scaling": {"type": "longrope"}}, "as `longrope`"),
        ("mlx_affine", "llama", {"hidden_act": "gelu"}, "`hidden_act` silu or swish"),
        ("mlx_affine", "llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial"),
        (
            "mlx_affine",
            "llama",
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            "takes `rope_theta` 10000.0 from config.json, which means 500000.0",
        ),
        ("mlx_affine", "qwen3", {}, "no place for 12 biases"),
        ("mlx_affine", "gemma3_text", {"tie_word_embeddings": ABSENT}, "no place for 12 biases"),
        ("hipfire_hfq", "llama", {"rope_scaling": LLAMA3}, "positions as `llama3`"),
        ("hipfire_hfq", "llama", {}, "no place for 21 biases"),
    ],
)
def test_what_no_reader_computes_is_an_error_of_the_plan(target, family, changes, why):
    assert any(why in reason for reason in refused(target, source(family, **changes)))


def test_a_tied_glm_loads_in_no_class_of_mlx_lm():
    tied = without(source("glm4_moe", tie_word_embeddings=True), "lm_head.weight")
    assert any("tie_word_embeddings" in one for one in refused("mlx_affine", tied))


def test_a_window_that_a_reader_ignores_is_told_and_no_error():
    found = plan("mlx_affine", source("mistral", sliding_window=32)).refusals
    assert {one.reason for one in found} == {
        "it ignores `sliding_window`: texts of more than 32 tokens come out differently"
    }
    assert plan("mlx_affine", source("mistral", sliding_window=64)).refusals == ()
    assert plan("mlx_affine", source("qwen2", sliding_window=32)).refusals == ()


def test_a_window_that_a_reader_counts_otherwise_is_a_warning(recorded):
    mimo, _ = recorded("mimo_v2_flash")
    saved = {**mimo.config, "sliding_window": 9}
    published = {**saved, "sliding_window": 8, "sliding_window_size": 8}
    plans = {
        size: plan("mlx_affine", replace(mimo, config=config), "all: keep")
        for size, config in {9: saved, 8: published}.items()
    }
    found = {size: {one.reason for one in made.refusals} for size, made in plans.items()}
    assert found == {9: set(), 8: {"it computes with `window` 8, and this model has 9"}}


def test_layers_that_take_the_keys_of_another_indexer_are_a_warning(recorded):
    glm = recorded("glm_moe_dsa")[0]
    longest = glm.config["max_position_embeddings"]

    def reasons(**changes):
        given = {"rope_parameters": {"rope_theta": 1e6}, "index_topk": longest, **changes}
        found = plan("mlx_affine", replace(glm, config={**glm.config, **given}), "all: keep")
        assert {one.severity for one in found.refusals} <= {"inexact"}
        return {one.reason for one in found.refusals}

    assert reasons(index_topk_freq=1) == set()
    assert reasons(index_topk_freq=4) == {
        "it computes with `index_topk_freq` 1, and this model has 4"
    }
    assert reasons(index_topk=32) == {
        "texts of more than 32 tokens come out differently: it chooses other keys"
    }


def test_an_indexer_that_transformers_did_not_save_is_missing_for_that_reason(recorded):
    glm = recorded("glm_moe_dsa")[0]
    kinds = ["full", *["shared"] * (glm.config["num_hidden_layers"] - 1)]
    kept = {
        name: one
        for name, one in glm.tensors.items()
        if ".indexer." not in name or ".layers.0." in name
    }
    saved = replace(glm, tensors=kept, config={**glm.config, "indexer_types": kinds})
    with pytest.raises(PolicyError) as caught:
        plan("mlx_affine", saved, "all: keep")
    (error,) = caught.value.diagnostics
    assert error.code == "missing-tensor"
    assert "attention.wk" in error.message
    assert error.message.endswith(
        "; transformers saves none where one is shared, and readers want one in every layer"
    )


ALL_TOKENS, WINDOW = "it needs a layer that attends to all tokens", "it needs a layer with a window"


@pytest.mark.parametrize(
    ("case", "kind", "why"),
    [
        ("olmo3", "full_attention", WINDOW),
        ("olmo3", "sliding_attention", ALL_TOKENS),
        ("exaone4", "full_attention", WINDOW),
        ("exaone4", "sliding_attention", ALL_TOKENS),
        ("exaone_moe", "full_attention", "without layers with a window it gives positions to all"),
        ("afmoe", "sliding_attention", ALL_TOKENS),
        ("mellum", "sliding_attention", ALL_TOKENS),
        ("gpt_oss", "full_attention", WINDOW),
        ("gemma3_text", "sliding_attention", "it looks at layer 6, and this model has"),
    ],
)
def test_layers_of_one_kind_are_refused_where_the_reader_wants_both(case, kind, why, recorded):
    found = recorded(case)[0]
    kinds = {"layer_types": [kind] * found.config["num_hidden_layers"], "sliding_window": 8}
    changed = replace(found, config={**found.config, **kinds})
    assert any(why in one for one in refused("mlx_affine", changed))


def test_the_head_of_a_tied_model_cannot_be_divided():
    found = open_source(str(GOLDEN / "bailing_moe"))
    tied = replace(found, config={**found.config, "norm_head": True, TIED: True})
    assert any("it divides the columns of a head" in one for one in refused("mlx_affine", tied))


@pytest.mark.parametrize("family", ["llama4_text", "seed_oss"])
def test_an_embedding_that_the_reader_multiplies_by_is_not_quantized(family, recorded):
    golden = GOLDEN / family
    found = open_source(str(golden)) if golden.exists() else recorded(family)[0]
    tied = replace(found, config={**found.config, TIED: True})
    with pytest.raises(PolicyError) as caught:
        plan("mlx_affine", without(tied, "lm_head.weight"), "all: 4bit g32")
    (error,) = caught.value.diagnostics
    assert "mlx-lm cannot run a tied embedding that is quantized" in error.message


def test_blocks_that_predict_are_counted_as_the_bundle_has_them():
    counts = {"num_nextn_predict_layers": 1, "num_hidden_layers": 2}
    beside = source("glm4_moe", **counts)
    assert written("mlx_affine", beside)["num_nextn_predict_layers"] == 0
    packed = f"{RULES['gptq']}\nmtp: keep"
    assert written("gptq", beside, packed)["num_nextn_predict_layers"] == 1
    dropped = f"{RULES['gptq']}\nmtp: drop"
    assert written("gptq", beside, dropped)["num_nextn_predict_layers"] == 0


def of_family(case: str, **changes: Any) -> Inventory:
    """A golden checkpoint of a family, with keys of its text config changed."""
    found = open_source(str(GOLDEN / case))
    text = {**found.config["text_config"], **changes}
    kept = {key: value for key, value in text.items() if value is not ABSENT}
    return replace(found, config={**found.config, "text_config": kept})


def test_blocks_that_predict_are_counted_in_the_text_config_too():
    found = written("mlx_affine", of_family("qwen3_5"), "all: keep")
    assert found["text_config"]["mtp_num_hidden_layers"] == 0


def test_a_text_config_says_of_the_head_what_the_whole_model_does():
    """mlx-lm looks at the inner one, transformers at the outer one."""
    beside = of_family("qwen3_vl", tie_word_embeddings=False)
    tied = without(replace(beside, config={**beside.config, TIED: True}), "lm_head.weight")
    assert written("mlx_affine", tied, "all: keep")["text_config"][TIED] is True
    untied = of_family("qwen3_vl_moe", tie_word_embeddings=True)
    assert written("mlx_affine", untied, "all: keep")["text_config"][TIED] is False


@pytest.mark.parametrize("is_flat", [False, True])
def test_positions_of_qwen3_5_are_written_where_mlx_lm_looks(is_flat):
    """Its class takes no other key than `rope_parameters`, and has another default."""
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    old = {"rope_theta": 5e6, "partial_rotary_factor": 0.5, "rope_scaling": scaled}
    found = of_family("qwen3_5", rope_parameters=ABSENT, **old)
    if is_flat:
        found = replace(found, config={**found.config["text_config"], "model_type": "qwen3_5_text"})
    config = written("mlx_affine", found, "all: keep")
    text = config if is_flat else config["text_config"]
    assert config["model_type"] == "qwen3_5"
    assert text["rope_parameters"] == {**scaled, "rope_theta": 5e6, "partial_rotary_factor": 0.5}


def test_a_dense_model_gets_no_counts_of_experts():
    found = written("mlx_affine", of_family("qwen3_5"), "all: keep")["text_config"]
    assert not [key for key in found if "expert" in key]


def test_a_factor_that_yarn_has_anyway_is_no_other():
    """OLMo 3 is published with the attention factor that mlx-lm computes by itself."""
    scaled = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
    usual = source("llama", rope_scaling={**scaled, "attention_factor": 1.2079441541679836})
    assert plan("mlx_affine", usual).refusals == ()
    other = source("llama", rope_scaling={**scaled, "attention_factor": 1.3})
    assert any("attention_factor" in one for one in refused("mlx_affine", other))


@pytest.mark.parametrize("word", [[], {}, 7, None], ids=str)
def test_types_and_classes_that_are_not_words_are_no_kind_of_a_family(word: Any) -> None:
    """A list where a word belongs has no hash: it is passed over."""
    config = {"text_config": {"model_type": word}, "architectures": [word]}
    plain = reader_kind("mlx_lm", {"model_type": "mistral3"})
    assert reader_kind("mlx_lm", {"model_type": "mistral3", **config}) == plain
    assert reader_kind("mlx_lm", {"model_type": word, **config}) is None
