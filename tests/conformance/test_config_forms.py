"""Bundles from configs in every form load in their readers, and answer as transformers does."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from bundles import widths
from family_cases import (
    CASES,
    GOLDEN,
    MLX_4BIT,
    OF_LATENT_LAYERS,
    TOKENIZER,
    planned,
    rules_for,
    source_of,
)

from emitters import FORMATS as TARGETS
from policy_dsl.language.load import parse_policy
from policy_dsl.plan import coded_modules
from policy_dsl.planning.resolve import resolve
from policy_dsl.roles.architecture import architecture, family_of
from policy_dsl.sources.reference import open_source
from policyc.cli import main
from tests.models import families_of

GPTQ_FAMILIES = families_of("gptq")
JANG_FAMILIES = families_of("jangtq_prestack")
MLX_FAMILIES = families_of("mlx_affine")

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
config_forms = pytest.importorskip("config_forms")
checkpoints = pytest.importorskip("checkpoints")
FORMS, MODELS = config_forms.FORMS, config_forms.MODELS
# The two that have least in common, for readers that take long to start.
FARTHEST = ("published", "bare")

# How close the logits must be: nothing but the order of sums, and the loss of 8 bits.
CLOSE = {"all: keep": 0.999999, "all: 8bit g32": 0.999}
PACKED = """
all: 8bit g32
embed, embed_per_layer, lm_head, norm, bias, router, router_bias, shared_expert_gate: keep optional
conv, ssm, vision: keep optional
linear_attention.in_proj_a, linear_attention.in_proj_b, linear_attention.in_proj_ba: keep optional
attention.wk, attention.weights_proj: keep optional
linear_attention.x_proj, attention.b_proj, attention.g_proj: keep optional
"""
# A source's experts at 4 bits, the rest at 8.
CODED = """
experts: 4bit optional
attention, shared_experts, mlp: 8bit g32 optional
attention.v_proj: 8bit optional
embed, lm_head: 8bit
"""
# What JANG's loader takes only as it is.
NOT_CODED = {"lfm2_moe": "mlp: keep\n"}


def taken(families):
    """Models of families that a target takes."""
    return [name for name, kind in MODELS.items() if families.get(kind.family, "") is None]


@pytest.mark.parametrize("families", [MLX_FAMILIES, GPTQ_FAMILIES, JANG_FAMILIES])
def test_every_family_is_here(families):
    known = {kind.family for kind in MODELS.values()}
    # Of the others, what publishers write is shown to load, and to answer like stock's own.
    known |= {family_of(json.loads((GOLDEN / case / "config.json").read_text())) for case in CASES}
    # One of these below a vision model: `test_families.py`.
    known.add("mistral3_4")
    assert {family for family, reason in families.items() if reason is None} <= known


# transformers has the first only inside of a config that mlx-lm does not know, and means an older
# model by the second.
OTHERS_THERE = {"step3p5", "minimax"}


def test_every_type_that_transformers_and_mlx_lm_have_is_here(stock):
    known = {getattr(transformers, kind.config_class).model_type for kind in MODELS.values()}
    claimed = {
        one
        for family, reason in MLX_FAMILIES.items()
        for one in architecture(family).model_types
        if reason is None
    }
    shared = {one for one in claimed if one in transformers.CONFIG_MAPPING and stock.knows(one)}
    assert shared - known == OTHERS_THERE


@pytest.mark.parametrize("rules", CLOSE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", taken(MLX_FAMILIES))
def test_mlx_lm_answers_as_transformers(name, form, rules, forms, build, stock):
    made = forms(name)
    bundle = build(f"target mlx_affine\n{rules}\n", made.folders[form])
    found = stock.logits(bundle, config_forms.PROMPT)
    assert config_forms.cosine(found, made.logits) > CLOSE[rules]


# Models whose published form stock mlx-lm does not convert. It wants experts in one tensor, counts
# those that are the identity, does not know the type, or needs a key, a name or a size that other
# publishers write.
STOCK_REFUSES = {
    *("gemma4_unified", "gpt_oss", "llama4_text", "muse_glimmer"),
    *("qwen3_5_tied", "qwen3_5_text", "qwen3_5_moe", "qwen3_vl_moe"),
    *("kimi_k25", "longcat_flash", "granitemoehybrid_dense", "solar_open"),
}


@pytest.mark.parametrize("name", taken(MLX_FAMILIES))
def test_bundles_are_stock_mlx_lm_s_own(name, forms, build, stock, tmp_path):
    """Each module as stock's conversion treats it: bit for bit, and the source's own values."""
    source = forms(name).folders["published"]
    options = {"q_bits": 4, "q_group_size": 32}
    theirs, rules = None, "all: 4bit g32"
    if name in STOCK_REFUSES:
        with pytest.raises((TypeError, ValueError)):
            stock.convert(source, tmp_path / "stock", **options)
    else:
        theirs = stock.convert(source, tmp_path / "stock", **options)
        inventory = open_source(str(source))
        rules = rules_for(inventory, treatments(theirs)).replace("; ", "\n")
        # The bundled policy says the same, by hand.
        bundled = coded_modules(planned(inventory, MLX_4BIT, "p.yaml").modules)
        bits = {module.name: one.bits for module, one in bundled}
        wanted = {name: width[0] for name, width in widths(theirs).items() if width}
        differing = {name for name in bits if bits[name] != wanted.get(name)}
        assert differing <= OF_LATENT_LAYERS
        assert not wanted.keys() - bits.keys()
    ours = build(f"target mlx_affine\n{rules}\n", source)
    if theirs is not None:
        stock.assert_equal_bundles(ours, theirs, config_forms.PROMPT)
    assert main(["verify", str(ours), "--source", str(source)]) == 0


def test_heads_of_another_number_than_a_layer_has_are_an_error(forms, tmp_path, capsys):
    source = shutil.copytree(forms("laguna").folders["saved"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["num_attention_heads_per_layer"] = [4, 4, 4]
    (source / "config.json").write_text(json.dumps(config))
    (tmp_path / "p.qpol").write_text("target mlx_affine\nall: keep\n")
    assert main(["plan", str(tmp_path / "p.qpol"), "--model", str(source)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "layers.1.self_attn.g_proj.weight has shape [6, 128]" in error
    assert "not [4, hidden_size = 128] as the config says" in error


FULL, SLIDING = ({"layer_types": [kind] * 3} for kind in ("full_attention", "sliding_attention"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("olmo3", FULL),
        ("olmo3", SLIDING),
        ("afmoe", SLIDING),
        ("laguna", SLIDING),
        ("mellum", SLIDING),
        ("exaone4", {**FULL, "sliding_window_pattern": "G"}),
        ("exaone4", {**SLIDING, "sliding_window_pattern": "L"}),
    ],
)
def test_layers_of_one_kind_are_refused_where_mlx_lm_raises(name, changes, forms, stock, tmp_path):
    source = shutil.copytree(forms(name).folders["published"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises((StopIteration, ValueError)):
        stock.convert(source, tmp_path / "stock", q_group_size=32)
    (tmp_path / "p.qpol").write_text("target mlx_affine\nall: keep\n")
    assert main(["plan", str(tmp_path / "p.qpol"), "--model", str(source)]) == 2


def test_a_tied_embedding_stays_plain_where_mlx_lm_multiplies_by_it(forms, stock, tmp_path):
    source = shutil.copytree(forms("seed_oss").folders["published"], tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    theirs = stock.convert(source, tmp_path / "stock", q_group_size=32)
    with pytest.raises(ValueError, match="matmul"):
        stock.logits(theirs, config_forms.PROMPT)
    (tmp_path / "p.qpol").write_text("target mlx_affine\nall: 4bit g32\n")
    assert main(["plan", str(tmp_path / "p.qpol"), "--model", str(source)]) == 2


def treatments(bundle):
    """Module -> its bits and group size, as a config may say them."""
    keys = ("bits", "group_size", "mode")
    found = widths(bundle).items()
    return {name: dict(zip(keys, width, strict=True)) if width else False for name, width in found}


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_mlx_lm_reads_what_it_does_not_convert_itself(name, forms, build, stock, tmp_path):
    """FP8 and experts one by one: stock leaves scales over, and takes fused experts only."""
    published, plain = checkpoints.as_fp8(forms(name).folders["published"], tmp_path)
    with pytest.raises(ValueError, match="parameters not in model"):
        stock.convert(published, tmp_path / "stock")
    found = []
    for folder in (published, plain):
        bundle = build("target mlx_affine\nall: keep\n", folder)
        found.append(stock.logits(bundle, config_forms.PROMPT))
        shutil.rmtree(bundle)
    assert np.isfinite(found[0]).all()
    assert np.array_equal(*found)


# transformers has no class for some, takes positions of one from other keys, and does not read
# the last two.
UNREAD = {*config_forms.OF_OTHERS, "mimo_v2_flash", "minimax_m3_vl", "mistral3"}


@pytest.mark.parametrize("name", [one for one in taken(GPTQ_FAMILIES) if one not in UNREAD])
def test_transformers_reads_every_form_as_the_source(name, forms, gptq):
    made = forms(name)
    expected = transformers.AutoConfig.from_pretrained(made.folders["saved"]).to_dict()
    for form in FORMS:
        bundle = gptq(made.folders[form], PACKED)
        found = transformers.AutoConfig.from_pretrained(bundle).to_dict()
        differing = {key for key in expected if found[key] != expected[key]}
        # LFM2's publisher says twice which layers attend, and EXAONE's which have windows.
        twice = {"full_attn_idxs", "sliding_window_pattern"}
        assert differing <= {"_name_or_path", *twice}, form


@pytest.mark.parametrize("form", FARTHEST)
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama_linear",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "glm4_moe",
        "olmo2",
        "olmo3",
        "olmoe",
        "qwen2_moe",
        "qwen3_next",
        "qwen3_5",
        "qwen3_5_text",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "deepseek_v3",
        "deepseek_v32",
        "glm_moe_dsa",
        "glm4_moe_lite",
        "granitemoehybrid_dense",
        "jamba",
        "jamba_dense",
        "lfm2",
        "mellum",
        "nemotron_h",
        "nemotron_h_latent",
        "afmoe",
        "dots1",
        "ernie4_5_moe",
        "exaone4",
        "exaone_moe",
        "gemma4_text",
        "gemma4_unified",
        "hunyuan_v1_dense",
        "laguna",
        "llama4",
        "llama4_text",
        "ministral3",
        "mistral4",
        "muse_glimmer",
        "seed_oss",
        "solar_open",
    ],
)
def test_auto_round_in_transformers_answers_as_transformers(name, form, forms, gptq, auto_round):
    made = forms(name)
    bundle = gptq(made.folders[form], PACKED)
    assert auto_round("missing", bundle, "float32") == []
    found = auto_round("logits", bundle, config_forms.PROMPT, "float32")
    # Its linears compute in 16 bits.
    assert config_forms.cosine(found, made.logits) > 0.998


@pytest.mark.parametrize("form", FARTHEST)
@pytest.mark.parametrize("name", ["kimi_k25", "gemma4"])
def test_auto_round_finds_the_language_model_but_not_all_of_the_tower(
    name, form, forms, gptq, auto_round
):
    made = forms(name)
    bundle = gptq(made.folders[form], PACKED)
    # With packed weights, transformers does not take published names of the tower apart.
    missing = auto_round("missing", bundle, "float32")
    assert {".".join(name.split(".")[:2]) for name in missing} == {"model.vision_tower"}
    assert unread_by(made.folders[form]) == {"auto-round", "gptqmodel", "transformers"}
    found = auto_round("logits", bundle, config_forms.PROMPT, "float32")
    assert config_forms.cosine(found, made.logits) > 0.998


def unread_by(folder):
    """Readers that cannot load a packed bundle of a source, as its plan says."""
    policy, _ = parse_policy(f"target gptq\n{PACKED}", "p.qpol")
    plan = resolve(policy, open_source(str(folder)), TARGETS)
    return {one.reader for one in plan.not_loaded}


@pytest.mark.parametrize("name", ["mistral3", "minimax_m3_vl", "phimoe"])
def test_auto_round_does_not_find_what_transformers_calls_otherwise(name, forms, gptq, auto_round):
    folder = forms(name).folders["published"]
    missing = auto_round("missing", gptq(folder, PACKED), "float32")
    assert any("vision" not in one for one in missing)
    assert unread_by(folder) >= {"auto-round", "gptqmodel", "transformers"}


def test_auto_round_loads_all_of_mimo_v2_flash(forms, gptq, auto_round):
    """It does not run: AutoRound replaces the function of its attention by one without sinks."""
    bundle = gptq(forms("mimo_v2_flash").folders["saved"], PACKED)
    assert auto_round("missing", bundle, "float32") == []
    with pytest.raises(TypeError, match="positional arguments"):
        auto_round("logits", bundle, config_forms.PROMPT, "float32")


@pytest.mark.parametrize("name", taken(JANG_FAMILIES))
def test_jang_answers_alike_for_every_form(name, forms, jang, tmp_path, capsys):
    made, found = forms(name), {}
    rules = CODED + NOT_CODED.get(name, "")
    (tmp_path / "p.qpol").write_text(f"target jangtq_prestack\n{rules}")
    for form in FARTHEST:
        out = tmp_path / form
        words = ["build", str(tmp_path / "p.qpol"), "--model", str(made.folders[form])]
        assert main([*words, "-o", str(out), "-q"]) == 0, capsys.readouterr().err
        found[form] = jang("logits", out, config_forms.PROMPT)
        passed, said = jang("stamp", out)
        assert passed, said
    assert np.array_equal(found["bare"], found["published"])
    # Experts at 4 bits lose more than 8-bit bundles may.
    assert config_forms.cosine(found["bare"], made.logits) > 0.97


@pytest.mark.parametrize("case", ["bailing_hybrid", "bailing_moe"])
def test_jang_answers_like_stock_for_what_transformers_does_not_have(
    case, build, stock, jang, tmp_path
):
    folder = shutil.copytree(source_of(case, tmp_path), tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    prompt = (1, 5, 17, 33, 3, 83, 55, 93, 23)
    whole = build("target mlx_affine\nall: keep\n", folder)
    expected = stock.logits(whole, prompt, dtype="float32")
    shutil.rmtree(whole)
    coded = build("target jangtq_prestack\nall: keep\nexperts: 4bit\n", folder)
    assert config_forms.cosine(jang("logits", coded, prompt), expected) > 0.97
    passed, said = jang("stamp", coded)
    assert passed, said
