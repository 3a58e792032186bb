"""Plans say which readers cannot load a bundle; vLLM's limits stop policies that name it."""

from __future__ import annotations

import pytest
from tiny_models import planned, tiny

from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory, TensorInfo, tensor_nbytes
from policy_dsl.plan import Plan
from policy_dsl.treatments import Coded

OTHERS = ("auto-round", "gptqmodel", "transformers")
GPTQ = "metadata dialect gptq"


def refused(plan: Plan, runtime: str = "vllm") -> str:
    """Every reason of a reader, as one text."""
    return "\n".join(one.reason for one in plan.refusals if one.reader == runtime)


def inner(columns: int) -> Inventory:
    """A MiniMax-M2 of width 128 whose experts have so many columns."""
    config = {**tiny("minimax_m2").config, "hidden_size": 128, "intermediate_size": columns}
    config |= {"num_hidden_layers": 1, "num_local_experts": 1, "num_experts_per_tok": 1}
    config |= {"head_dim": 32, "vocab_size": 32}
    block = "model.layers.0"
    shapes = {
        **{f"{name}.weight": (32, 128) for name in ("model.embed_tokens", "lm_head")},
        **{f"{block}.self_attn.{name}_proj.weight": (128, 128) for name in "qo"},
        **{f"{block}.self_attn.{name}_proj.weight": (64, 128) for name in "kv"},
        **{f"{block}.{name}_layernorm.weight": (128,) for name in ("input", "post_attention")},
        f"{block}.self_attn.q_norm.weight": (128,),
        f"{block}.self_attn.k_norm.weight": (64,),
        f"{block}.block_sparse_moe.gate.weight": (1, 128),
        f"{block}.block_sparse_moe.e_score_correction_bias": (1,),
        f"{block}.block_sparse_moe.experts.0.w1.weight": (columns, 128),
        f"{block}.block_sparse_moe.experts.0.w2.weight": (128, columns),
        f"{block}.block_sparse_moe.experts.0.w3.weight": (columns, 128),
        "model.norm.weight": (128,),
    }
    tensors = {
        name: TensorInfo(name, "BF16", shape, tensor_nbytes("BF16", shape))
        for name, shape in shapes.items()
    }
    return Inventory("tiny", config, tensors)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_everybody_reads_a_dense_model(family):
    assert planned(tiny(family), "").refusals == ()
    numbered = "all: 4bit int-gidx\nembed, lm_head: keep optional"
    assert planned(tiny(family), numbered, head=GPTQ).refusals == ()


@pytest.mark.parametrize("head", ["", GPTQ])
@pytest.mark.parametrize(
    ("family", "rules", "reason"),
    [
        ("minimax_m2", "experts.down_proj in layers 1: 8bit", "one module"),
        ("minimax_m2", "w1 in layers 0, 2: keep", "one module"),
        ("mixtral", "experts.gate_proj: 4bit g-1", "one module"),
        ("qwen3_moe", "k_proj in layers 2: 8bit", "as attention.qkv_proj"),
        ("llama", "v_proj: keep", "as attention.qkv_proj"),
        ("qwen3", "mlp.up_proj: 8bit", "as mlp.gate_up_proj"),
        ("glm4_moe", "shared_experts.up_proj: 8bit", "as shared_experts.gate_up_proj"),
        ("qwen2", "o_proj: 4bit asym", "no zero points"),
        ("qwen3_5", "linear_attention.in_proj_z: 8bit", "as linear_attention.in_proj_qkvz"),
        ("qwen2_moe", "shared_experts.up_proj: 8bit", "as shared_experts.gate_up_proj"),
        ("glm4_moe_lite", "attention.q_a_proj: 8bit", "as attention.fused_qkv_a_proj"),
    ],
)
def test_what_vllm_joins_must_be_alike(family, rules, reason, head):
    plan = planned(tiny(family), rules, head=head)
    assert reason in refused(plan)
    assert all((one.severity == "fatal") == (one.reader == "vllm") for one in plan.refusals)
    with pytest.raises(PolicyError, match="vllm cannot hold this"):
        planned(tiny(family), rules, head=f"{head}\nruntime vllm")


@pytest.mark.parametrize(
    ("family", "rules", "reason"),
    [
        ("qwen3_5_text", "linear_attention.in_proj_a: 4bit", "few rows"),
        ("qwen3_next", "linear_attention.in_proj_ba: 4bit", "few rows"),
        ("qwen2_moe", "shared_expert_gate: 4bit", "gates of shared experts"),
        ("qwen3_vl", "vision: 4bit", "packed vision towers"),
        ("glm_moe_dsa", "attention.wk: 4bit", "projections of the indexer"),
        ("glm_moe_dsa", "attention.weights_proj: 4bit", "projections of the indexer"),
    ],
)
def test_what_has_no_packed_form_is_an_error(family, rules, reason):
    with pytest.raises(PolicyError, match=reason):
        planned(tiny(family), rules)


def test_a_vision_tower_stays_where_readers_have_one():
    """vLLM's classes have the whole model, also where only its text is asked for."""
    kept = [one for one in planned(tiny("qwen3_vl"), "").modules if one.role.startswith("vision.")]
    assert {one.name.split(".")[1] for one in kept} == {"visual"}
    assert not any(isinstance(one.treatment, Coded) for one in kept)


def test_layers_are_counted_where_they_differ():
    plan = planned(tiny("minimax_m2"), "experts.down_proj in layers 1-2: 8bit")
    assert refused(plan).endswith("(layer 1 and 1 more)")


def test_mixed_layers_are_no_trouble_for_vllm():
    rules = "experts in layers 1: 8bit\nattention in layers 0: keep\nexperts in layers 2: keep"
    assert refused(planned(tiny("minimax_m2"), rules)) == ""
    assert refused(planned(tiny("qwen3_moe"), rules.replace("layers 2", "layers 0-1"))) == ""


def test_few_bits_and_zero_points_by_dialect():
    three = "all: 3bit\nembed, lm_head: keep"
    assert refused(planned(tiny("llama"), three)) == ""
    assert "4 and 8 bits of this dialect" in refused(planned(tiny("llama"), three, head=GPTQ))
    second = "all: 4bit int-v2\nembed, lm_head: keep"
    assert "zero points of version 1 only" in refused(planned(tiny("llama"), second))
    # Its kernels for symmetric groups never look at them.
    assert refused(planned(tiny("llama"), second, head=GPTQ)) == ""
    # Kernels for experts, and for widths without Marlin's, have zero points.
    assert refused(planned(inner(128), "experts: 4bit asym")) == ""
    assert refused(planned(tiny("llama"), "mlp: 3bit asym")) == ""


@pytest.mark.parametrize(
    ("columns", "rules", "head", "reason"),
    [
        (128, "experts: 4bit g-1", "", ""),
        (96, "experts: 4bit g32", "", ""),
        (96, "experts: 4bit g-1", "", "g-1 does not load"),
        (96, "experts: 4bit g-1", GPTQ, ""),
        (128, "experts: 4bit g-1 asym", "", "g-1 does not load"),
        (96, "experts: 8bit g32", GPTQ, ""),
        # In this dialect kernels are chosen by the groups of most weights, here attention's.
        (96, "attention: 4bit g64", GPTQ, "one width for all layers"),
        (128, "attention: 4bit g64", GPTQ, ""),
    ],
)
def test_experts_that_marlin_does_not_take(columns, rules, head, reason):
    told = refused(planned(inner(columns), rules, head=head))
    assert reason in told
    assert bool(reason) == bool(told)


def test_experts_of_renamed_families_load_in_vllm_alone():
    for family in ("minimax_m2", "mixtral"):
        for head in ("", GPTQ):
            plan = planned(tiny(family), "", head=head)
            assert refused(plan) == ""
            assert all("experts stay random" in refused(plan, other) for other in OTHERS)
        plain = planned(tiny(family), "experts: keep")
        assert refused(plain) == refused(plain, "gptqmodel") == ""
        said = [refused(plain, reader) for reader in ("auto-round", "transformers")]
        assert all("where they are plain" in one for one in said)


def test_vllm_alone_finds_what_transformers_joins_on_loading():
    for family in ("lfm2_moe", "mixtral"):
        plan = planned(tiny(family), "experts: keep")
        found = [refused(plan, reader) for reader in OTHERS]
        assert all("under other names" in said for said in found) == (family == "lfm2_moe")


def test_delta_attention_is_one_matrix_in_vllm():
    inner, hidden = 32 * 32, 64
    kinds = {"kda_layers": [1], "full_attn_layers": [], "num_heads": 32, "head_dim": 32}
    shapes = {
        **{f"self_attn.{word}_proj.weight": (inner, hidden) for word in "qkv"},
        **{f"self_attn.{word}_conv1d.weight": (inner, 1, 4) for word in "qkv"},
        **{f"self_attn.{word}_a_proj.weight": (32, hidden) for word in "fg"},
        **{f"self_attn.{word}_b_proj.weight": (inner, 32) for word in "fg"},
        "self_attn.b_proj.weight": (32, hidden),
        "self_attn.o_proj.weight": (hidden, inner),
        "self_attn.o_norm.weight": (32,),
        "self_attn.A_log": (1, 1, 32, 1),
        "self_attn.dt_bias": (inner,),
        **{f"mlp.{word}_proj.weight": (hidden, hidden) for word in ("gate", "up", "down")},
        **{f"{word}_layernorm.weight": (hidden,) for word in ("input", "post_attention")},
    }
    shapes = {f"model.layers.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {f"{name}.weight": (32, hidden) for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (hidden,)
    tensors = {
        name: TensorInfo(name, "BF16", shape, tensor_nbytes("BF16", shape))
        for name, shape in shapes.items()
    }
    sizes = {"vocab_size": 32, "hidden_size": hidden, "intermediate_size": hidden}
    config = {"model_type": "kimi_linear", "num_hidden_layers": 1, "linear_attn_config": kinds}
    source = Inventory("tiny", config | sizes, tensors)
    assert refused(planned(source, "")) == ""
    assert "as attention.in_proj_qkvgfab" in refused(planned(source, "attention.b_proj: keep"))


def test_what_transformers_does_by_itself_it_does_with_stacks():
    for family in ("qwen3_moe", "glm4_moe"):
        assert planned(tiny(family), "").refusals == ()
        plan = planned(tiny(family), "mlp: keep", head=GPTQ)
        assert "stay random" in refused(plan, "transformers")


def test_what_gptqmodel_has_classes_of_its_own_for():
    assert "no dense blocks" in refused(planned(tiny("qwen3_moe"), "", head=GPTQ), "gptqmodel")
    assert refused(planned(tiny("qwen3_moe"), "mlp: keep", head=GPTQ), "gptqmodel") == ""
    for rules in ("", "experts, mlp, shared_experts: keep"):
        told = refused(planned(tiny("glm4_moe"), rules, head=GPTQ), "gptqmodel")
        assert "fails on the first token" in told


def test_optimum_knows_one_width_and_wants_group_numbers():
    numbered = "all: 4bit int-gidx\nembed, lm_head: keep\n"
    for more in ("o_proj: keep", "mlp in layers 0: 8bit int-gidx", "lm_head: 4bit int-gidx"):
        plan = planned(tiny("llama"), numbered + more, head=GPTQ)
        assert "one width" in refused(plan, "transformers")
        assert planned(tiny("llama"), numbered + more).refusals == ()
    assert "int-gidx" in refused(planned(tiny("llama"), "", head=GPTQ), "transformers")


def test_asymmetric_groups_of_version_1_have_few_readers():
    first = "all: 4bit asym\nembed, lm_head: keep"
    plan = planned(tiny("llama"), first)
    for reader in ("auto-round", "transformers"):
        assert "int-v2" in refused(plan, reader)
    assert "int-v2" in refused(planned(tiny("llama"), first, head=GPTQ), "gptqmodel")
    second = "all: 4bit int-v2 asym\nembed, lm_head: keep"
    for head, readers in (("", OTHERS), (GPTQ, ("auto-round", "gptqmodel"))):
        plan = planned(tiny("llama"), second, head=head)
        assert all(refused(plan, reader) == "" for reader in readers)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ("embed: 4bit", "no reader looks rows up"),
        ("router: 4bit", "no reader packs routers"),
        ("attention: 4bit asym by opt-rtn", "searches no scales for asymmetric groups"),
    ],
)
def test_what_nobody_reads_is_an_error(rules, reason):
    with pytest.raises(PolicyError, match=reason):
        planned(tiny("minimax_m2"), rules)


def test_rows_and_columns_fill_words():
    config, tensors = tiny("llama").config, dict(tiny("llama").tensors)
    head = tensors["lm_head.weight"]
    rows = (80, head.shape[1])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = head._replace(name=name, shape=rows, nbytes=tensor_nbytes("BF16", rows))
    source = Inventory("tiny", {**config, "vocab_size": 80}, tensors)
    assert planned(source, "").refusals == ()
    with pytest.raises(PolicyError, match="words hold 32 values along either axis, and 80"):
        planned(source, "lm_head: 4bit")
