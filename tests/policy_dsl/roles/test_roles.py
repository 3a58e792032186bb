"""Every tensor of every family has exactly one role: as recorded, as published, as stored.

tests/golden/architectures holds the names, shapes and roles of tiny models.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from policy_dsl.diagnostics import PolicyError
from policy_dsl.policy import COMPONENTS, SINGLE_ROLES
from policy_dsl.roles.architecture import architecture, families, family_of
from policy_dsl.roles.classify import classify
from policy_dsl.roles.model import module_name, published_name
from policy_dsl.sources.reference import open_source
from policy_dsl.views import Alternate, Expert, Transposed
from tests.models import minimax

GOLDEN = Path(__file__).parents[2] / "golden" / "architectures"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))

# Built like a family that is recorded, or with sizes of their own in every layer.
WITHOUT_CLASS = {"laguna", "mimo", "minimax_m3_vl", "mistral3_4"}
# transformers joins its convolutions in memory, which no one stores so.
OTHER_IN_MEMORY = {"kimi_linear"}


def by_name(model):
    return {each.source.name: each for each in model.tensors}


# every family, as transformers holds it in memory and saves it


@pytest.mark.parametrize("form", ["memory", "saved"])
@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_the_role_of_its_module(case, form, recorded):
    source, roles = recorded(case, form)
    model = classify(source)
    assert {each.source.name for each in model.tensors} == set(source.tensors)
    for each in model.tensors:
        expected = roles[each.source.name].split("+")
        assert each.component == "vision" if expected == ["vision"] else each.role in expected
        assert each.role in model.architecture.roles


@pytest.mark.parametrize("case", CASES)
def test_fused_and_single_experts_are_the_same_model(case, recorded):
    fused, single = (classify(recorded(case, form)[0]) for form in ("memory", "saved"))

    def matrices(model):
        return Counter(
            (each.role, each.layer, each.expert, each.shape)
            for each in model.tensors
            if each.is_matrix and each.component != "vision" and each.role != "lm_head"
        )

    assert matrices(fused) == matrices(single)


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_of_the_config(case, recorded):
    source, _ = recorded(case)
    text = source.config.get("text_config", source.config)
    hidden, inner = (
        text["hidden_size"],
        text.get("moe_intermediate_size", text["intermediate_size"]),
    )
    model = classify(source)
    for each in model.tensors:
        if each.role == "router":
            assert each.shape == (model.n_experts, hidden)
        if each.component == "experts":
            down = each.projection == "down_proj"
            outer = text.get("moe_latent_size") or hidden
            assert each.shape == ((outer, inner) if down else (inner, outer))
        if each.role in ("embed", "lm_head"):
            assert each.shape == (text["vocab_size"], hidden)
        if each.role == "attention.o_proj":
            assert each.shape[0] == hidden


def test_every_family_is_recorded():
    configs = [json.loads((GOLDEN / f"{case}.json").read_text())["config"] for case in CASES]
    # Publishers' own forms, of which transformers has no class, or another.
    published = (GOLDEN.parent / "families").glob("*/config.json")
    configs += [json.loads(path.read_text()) for path in published]
    recorded = {family_of(config) for config in configs}
    assert {*families()} - recorded == WITHOUT_CLASS | OTHER_IN_MEMORY


@pytest.mark.parametrize("family", families())
def test_a_table_stays_within_the_closed_vocabulary(family):
    table = architecture(family)
    for role in table.roles:
        component, _, last = role.rpartition(".")
        assert role in SINGLE_ROLES or (component in COMPONENTS and last)
    words = {*table.roles, *COMPONENTS, *(role.rpartition(".")[2] for role in table.roles)}
    for alias, meant in table.aliases.items():
        assert alias not in words
        assert set(meant) <= words


def test_a_model_type_belongs_to_one_family():
    tables = map(architecture, families())
    plain = [
        one for one in tables if not (one.architectures or one.text_model_types or one.only_where)
    ]
    types = [each for one in plain for each in one.model_types]
    assert len(types) == len(set(types))


def test_an_unknown_family_has_no_table():
    with pytest.raises(KeyError):
        architecture("../roles")


# MiniMax-M2.7


def test_minimax_m27_is_read_whole():
    source = minimax()
    assert len(source.tensors) == 96_103
    model = classify(source)
    assert (model.n_layers, model.n_experts, model.tied) == (62, 256, False)
    assert sum(math.prod(each.shape) for each in model.tensors) == 228_689_764_864
    assert Counter(each.role for each in model.tensors) == {
        "experts.gate_proj": 15_872,
        "experts.up_proj": 15_872,
        "experts.down_proj": 15_872,
        "norm": 249,
        "attention.q_proj": 62,
        "attention.k_proj": 62,
        "attention.v_proj": 62,
        "attention.o_proj": 62,
        "router": 62,
        "router_bias": 62,
        "embed": 1,
        "lm_head": 1,
    }
    assert not model.ignored


# layouts that publishers use and transformers does not write


def test_a_family_goes_by_its_older_or_derived_model_type(changed):
    assert classify(changed("minimax_m2", config={"model_type": "minimax"})).n_experts == 4
    kimi = classify(changed("deepseek_v3", config={"model_type": "kimi_k2"}))
    assert kimi.architecture.family == "kimi_k2"


def test_kimi_k25_is_published_below_language_model(inventory, recorded):
    source, _ = recorded("kimi_k25")
    tensors = []
    for each in source.tensors.values():
        name = each.name.replace("model.language_model.", "language_model.model.")
        name = name.replace("model.vision_tower.layers.", "vision_tower.encoder.blocks.")
        name = name.replace("lm_head", "language_model.lm_head")
        tensors.append(each._replace(name=name.replace("model.mm_projector.", "mm_projector.")))
    model = classify(inventory(source.config, *tensors))
    assert Counter(each.role for each in model.tensors) == Counter(
        each.role for each in classify(source).tensors
    )


def test_experts_of_longcat_that_are_the_identity_are_ignored(tensor):
    published = open_source(str(GOLDEN.parent / "families" / "longcat_flash"))
    name = "model.layers.0.mlp.experts.{}.gate_proj.weight"
    added = {name.format(at): tensor(name.format(at), [32, 64]) for at in (4, 5)}
    model = classify(replace(published, tensors={**published.tensors, **added}))
    assert {one.name for one, _ in model.ignored} == set(added)
    beyond = {name.format(6): tensor(name.format(6), [32, 64])}
    with pytest.raises(PolicyError, match="experts 6; the config says 4"):
        classify(replace(published, tensors={**published.tensors, **beyond}))


def test_kimi_k25_is_saved_by_transformers_with_another_name_for_its_layers(inventory, recorded):
    source, _ = recorded("kimi_k25")
    before, after = "model.language_model.layers.", "language_model.model"
    stored = {
        word: [
            each._replace(name=each.name.replace(before, f"{after}.{word}."))
            for each in source.tensors.values()
        ]
        for word in ("layers", "blocks")
    }
    models = {word: classify(inventory(source.config, *held)) for word, held in stored.items()}
    names = {
        word: sorted(published_name(each, model) for each in model.tensors)
        for word, model in models.items()
    }
    assert names["blocks"] == names["layers"]
    modules = {
        word: {module_name(each, model) for each in model.tensors} for word, model in models.items()
    }
    assert modules["blocks"] == modules["layers"]


@pytest.mark.parametrize("ending", ["self_attn.1.q_b_proj", "mlps.0.up_proj", "input_layernorm.1"])
def test_each_of_two_attentions_in_a_layer_must_be_whole(tensor, ending):
    published = open_source(str(GOLDEN.parent / "families" / "longcat_flash"))
    (name,) = (name for name in published.tensors if name.endswith(f"{ending}.weight"))
    rest = {other: one for other, one in published.tensors.items() if other != name}
    with pytest.raises(PolicyError, match=f"longcat_flash has no {name}"):
        classify(replace(published, tensors=rest))
    third = re.sub(r"[01]\.(\w+\.)?weight$", r"2.\1weight", name)
    added = {**published.tensors, third: tensor(third, list(published.tensors[name].shape))}
    with pytest.raises(PolicyError, match=f"no role for 1 tensor: {third}"):
        classify(replace(published, tensors=added))


def test_interleaved_mxfp4_experts_of_gpt_oss(packed_gpt_oss):
    experts = [each for each in classify(packed_gpt_oss).tensors if each.component == "experts"]
    assert len(experts) == 3 * 4 * 3
    up = next(each for each in experts if (each.role, each.expert) == ("experts.up_proj", 2))
    assert (up.shape, up.operations, up.mxfp4) == ((128, 64), (Expert(2), Alternate(1, 2)), True)
    assert up.scale.name.endswith("gate_up_proj_scales")
    down = next(each for each in experts if (each.role, each.expert) == ("experts.down_proj", 2))
    assert (down.shape, down.operations) == ((64, 128), (Expert(2),))


def test_transposed_interleaved_experts_of_gpt_oss(recorded):
    model = classify(recorded("gpt_oss")[0])
    up = next(each for each in model.tensors if (each.role, each.expert) == ("experts.up_proj", 3))
    assert (up.shape, up.operations) == ((128, 64), (Expert(3), Transposed(), Alternate(1, 2)))
    assert up.view.place(5, 7) == (3, 7, 11)


def test_fused_experts_are_halves_of_the_rows(recorded):
    model = classify(recorded("qwen3_moe", "memory")[0])
    fused = [
        each for each in model.tensors if each.source.name.endswith("1.mlp.experts.gate_up_proj")
    ]
    places = [(each.role, each.expert, each.view.place(0, 0), each.shape) for each in fused[:4]]
    assert places == [
        ("experts.gate_proj", 0, (0, 0, 0), (32, 64)),
        ("experts.up_proj", 0, (0, 32, 0), (32, 64)),
        ("experts.gate_proj", 1, (1, 0, 0), (32, 64)),
        ("experts.up_proj", 1, (1, 32, 0), (32, 64)),
    ]


def turned(source, *endings):
    """The model with the last two axes of tensors swapped whose names end like that."""
    tensors = {
        name: one._replace(shape=(one.shape[0], *one.shape[:0:-1]))
        if name.endswith(endings)
        else one
        for name, one in source.tensors.items()
    }
    return replace(source, tensors=tensors)


def test_experts_of_qwen3_vl_are_stored_as_their_shapes_say(recorded):
    source, _ = recorded("qwen3_vl_moe")
    saved = classify(source)
    published = classify(turned(source, ".gate_up_proj", ".down_proj"))
    places = {}
    for model in (saved, published):
        one = next(each for each in model.tensors if each.role == "experts.up_proj")
        assert one.shape == (96, 64)
        places[model is published] = one.view.place(1, 2)
    assert places == {False: (0, 97, 2), True: (0, 2, 97)}
    assert [each.shape for each in saved.tensors] == [each.shape for each in published.tensors]


def test_square_experts_are_stored_as_the_others_show(recorded):
    """gate_up_proj of 2 x 32 rows and 64 columns: only down_proj says which are which."""
    source, _ = recorded("qwen3_vl_moe")
    text = {**source.config["text_config"], "moe_intermediate_size": 32}
    shapes = {".gate_up_proj": (4, 64, 64), ".experts.down_proj": (4, 64, 32)}
    tensors = {
        name: one._replace(
            shape=next((s for end, s in shapes.items() if name.endswith(end)), one.shape)
        )
        for name, one in source.tensors.items()
    }
    square = replace(source, config={**source.config, "text_config": text}, tensors=tensors)
    for found, place in ((square, (0, 33, 2)), (turned(square, "experts.down_proj"), (0, 2, 33))):
        up = next(one for one in classify(found).tensors if one.role == "experts.up_proj")
        assert up.view.place(1, 2) == place


def test_blocks_after_the_last_layer_are_mtp(tensor, changed, mtp_block):
    extra = [
        tensor(f"model.layers.3.{name}.weight", shape)
        for name, shape in {
            "embed_tokens": [96, 64],
            "enorm": [64],
            "hnorm": [64],
            "eh_proj": [64, 128],
            "shared_head.norm": [64],
            "shared_head.head": [96, 64],
        }.items()
    ]
    extra += mtp_block("model.layers.3.", "glm4_moe", 2)
    config = {"num_nextn_predict_layers": 1}
    model = classify(changed("glm4_moe", with_tensors=extra, config=config))
    mtp = [each for each in model.tensors if each.component == "mtp"]
    assert {each.source.name for each in mtp} == {each.name for each in extra}
    assert all(each.layer is None and each.role.startswith("mtp.") for each in mtp)
    found = by_name(model)
    assert found["model.layers.3.embed_tokens.weight"].role == "mtp.embed"
    assert found["model.layers.3.eh_proj.weight"].role == "mtp.eh_proj"
    assert found["model.layers.3.eh_proj.weight"].is_matrix
    assert found["model.layers.3.enorm.weight"].role == "mtp.norm"
    assert found["model.layers.3.self_attn.q_proj.weight"].role == "mtp.q_proj"
    assert found["model.layers.3.mlp.gate.weight"].role == "mtp.router"
    expert = found["model.layers.3.mlp.experts.2.down_proj.weight"]
    assert (expert.role, expert.expert) == ("mtp.down_proj", 2)
    assert "mtp.eh_proj" in model.architecture.roles


def test_qwen_mtp_stands_beside_the_model(tensor, changed, mtp_block):
    extra = mtp_block("mtp.layers.0.", "qwen3_next", 1)
    extra += [tensor("mtp.fc.weight", [64, 128]), tensor("mtp.norm.weight", [64])]
    extra += [tensor("mtp.pre_fc_norm_hidden.weight", [64])]
    model = classify(changed("qwen3_next", with_tensors=extra))
    found = by_name(model)
    assert found["mtp.fc.weight"].role == "mtp.fc"
    assert found["mtp.pre_fc_norm_hidden.weight"].role == "mtp.norm"
    assert found["mtp.layers.0.mlp.shared_expert_gate.weight"].role == "mtp.shared_expert_gate"
    assert found["mtp.layers.0.mlp.experts.3.up_proj.weight"].expert == 3
    assert all(each.layer is None for each in model.tensors if each.component == "mtp")


def test_vision_matrices_are_the_linear_weights(recorded):
    found = by_name(classify(recorded("gemma3")[0]))
    tower = "vision_tower.encoder.layers.0."
    assert found[tower + "mlp.fc1.weight"].is_matrix
    assert found[tower + "mlp.fc1.weight"].role == "vision.fc1"
    assert found[tower + "mlp.fc1.bias"].role == "vision.bias"
    assert found[tower + "layer_norm1.weight"].role == "vision.norm"
    for plain in ("patch_embedding", "position_embedding"):
        assert not found[f"vision_tower.embeddings.{plain}.weight"].is_matrix


def test_rotary_tables_are_ignored_with_a_reason(tensor, changed):
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    model = classify(changed("llama", with_tensors=[tensor(name, [8], "F32")]))
    [(ignored, reason)] = model.ignored
    assert ignored.name == name
    assert "rotary" in reason


# tied embeddings


def test_a_head_that_is_there_keeps_its_role_when_tied(changed):
    model = classify(changed("llama", config={"tie_word_embeddings": True}))
    assert model.tied
    assert by_name(model)["lm_head.weight"].role == "lm_head"


def test_without_the_key_a_missing_head_means_tied(recorded):
    assert classify(recorded("gemma3")[0]).tied
    assert not classify(recorded("llama")[0]).tied


def test_an_untied_model_needs_its_head(changed, codes):
    source = changed("llama", without="lm_head", config={"tie_word_embeddings": False})
    assert codes(source) == ["missing-tensor"]
