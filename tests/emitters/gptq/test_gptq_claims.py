"""What is read from configurations: ours, AutoRound's, GPTQModel's, and broken ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FAMILIES, GOLDEN, forms, packed, planned, tiny

from emitters import FORMATS
from emitters.checkpoints import forms_of
from policy_dsl.formats import Claim, Forms
from policy_dsl.plan import Plan
from policy_dsl.treatments import Unread

RECORDED = sorted((GOLDEN / "gptq_configs").glob("*.json"))
LAYER = "model.layers.0.self_attn"
# One linear of 64 x 64 at 4 bits in groups of 32, and a norm.
PARTS = {"qweight": ("I32", (8, 64)), "qzeros": ("I32", (2, 8)), "scales": ("F16", (2, 64))}
FORMS: Forms = {f"{LAYER}.q_proj": PARTS, "model.norm": {"weight": ("BF16", (64,))}}
USUAL = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}
GPTQ = {**USUAL, "quant_method": "gptq", "desc_act": False}


def claimed(quantization: object, of: Forms = FORMS) -> dict[str, Claim]:
    config = json.dumps({"model_type": "llama", "quantization_config": quantization})
    return FORMATS["gptq"].files().claims({"config.json": config.encode()}, of)


def shown(claim: Claim) -> tuple[Any, ...]:
    told = claim.treatment
    return told.scheme, told.bits, told.group_size, told.symmetric, claim.shape


def read_back(plan: Plan) -> dict[str, tuple[Any, ...]]:
    claims = FORMATS["gptq"].files().claims(FORMATS["gptq"].files().metadata(plan), forms(plan))
    return {name: shown(claim) for name, claim in claims.items()}


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_other_tools_configurations_explain_their_tensors(path: Path):
    recorded = json.loads(path.read_text())
    tensors = {name: (dtype, tuple(shape)) for name, (dtype, shape) in recorded["tensors"].items()}
    found = forms_of(tensors)
    claims = claimed(recorded["quantization_config"], found)
    assert claims.keys() == {name for name, parts in found.items() if "qweight" in parts}
    for name, claim in claims.items():
        expected = FORMATS["gptq"].spec.part_shapes(claim.treatment, claim.shape, claim.dtype)
        assert {part.part: (part.dtype, part.shape) for part in expected} == found[name]
    wide = {name for name, claim in claims.items() if claim.treatment.bits == 8}
    qkv = {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"}
    assert wide == ({"lm_head"} if path.stem.endswith("head") else qkv)


@pytest.mark.parametrize("dialect", ["auto-round", "gptq"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "rules",
    [
        "",
        "lm_head: 8bit optional\nattention in layers 1: 8bit g64",
        "o_proj: keep\ndown_proj in layers 2: 3bit",
        "all: 2bit g-1 asym\nembed, lm_head: keep optional",
        "all: 4bit int-gidx\nembed, lm_head: keep optional\no_proj: 8bit int",
        "all: 4bit int-v2-gidx asym\nembed, lm_head: keep optional\no_proj: 8bit int-v2",
    ],
)
def test_what_is_written_is_read_back(family, rules, dialect):
    plan = planned(tiny(family), rules, head=f"metadata dialect {dialect}")
    expected = {
        name: (
            *(module.treatment.scheme, module.treatment.bits, module.treatment.group_size),
            *(module.treatment.symmetric, module.shape),
        )
        for name, module in packed(plan).items()
    }
    assert read_back(plan) == expected


def test_a_plain_model_claims_nothing():
    plan = planned(tiny("llama"), "all: keep")
    assert read_back(plan) == {}
    assert "quantization_config" not in json.loads(
        FORMATS["gptq"].files().metadata(plan)["config.json"]
    )


@pytest.mark.parametrize(
    ("quantization", "scheme"),
    [
        (USUAL, "int"),
        ({**USUAL, "packing_format": "auto_round:auto_gptq"}, "int"),
        ({**USUAL, "packing_format": "auto_round:gptqmodel"}, "int-v2"),
        ({**USUAL, "packing_format": "auto_round"}, "int-v2"),
        (GPTQ, "int"),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, "int-v2"),
        ({**GPTQ, "format": "gptq_v2"}, "int-v2"),
    ],
)
def test_the_version_of_zero_points(quantization, scheme):
    (claim,) = claimed(quantization).values()
    assert shown(claim) == (scheme, 4, 32, True, (64, 64))
    numbered = {f"{LAYER}.q_proj": {**PARTS, "g_idx": ("I32", (64,))}}
    (claim,) = claimed(quantization, numbered).values()
    assert claim.treatment.scheme == f"{scheme}-gidx"


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({**USUAL, "extra_config": {f"{LAYER}.q_proj": {"bits": 8}}}, 8),
        ({**USUAL, "extra_config": {r".*self_attn\.q": {"bits": 8}, "q_proj": {"bits": 2}}}, 8),
        ({**USUAL, "extra_config": {"layers.0.self_attn.q_proj": {"bits": 3}}}, 3),
        ({**USUAL, "extra_config": {"attn": {"bits": 16, "data_type": "float"}}}, None),
        # A name of another module is no pattern.
        ({**USUAL, "extra_config": {"model.norm": {"bits": 16}}}, 4),
        ({**USUAL, "extra_config": None}, 4),
        ({**USUAL, "block_name_to_quantize": "model.layers"}, 4),
        ({**USUAL, "block_name_to_quantize": ["model.visual", "model.layers"]}, 4),
        ({**USUAL, "block_name_to_quantize": "model.visual"}, None),
        ({**USUAL, "block_name_to_quantize": "model.visual,"}, None),
        ({**USUAL, "to_quant_block_names": "model.visual"}, None),
        ({**GPTQ, "dynamic": {r"+:.*\.0\.": {"bits": 8}, r"-:.*\.0\.": {}}}, 8),
        ({**GPTQ, "dynamic": {r".*q_proj": {"bits": 8}}}, 8),
        ({**GPTQ, "dynamic": {r"-:.*q_proj": {}}}, None),
        # As GPTQModel's own pages have them.
        ({**GPTQ, "dynamic": {r"-:.*mlp\.gate$": {}, r"+:.*\.0\..*q_.*": {"bits": 8}}}, 8),
        ({**GPTQ, "dynamic": {r"+:.*\.18\..*gate.*": {"bits": 8}, r"-:.*\.k.*": {}}}, 4),
        # Matched from the start, not found somewhere.
        ({**GPTQ, "dynamic": {r"-:self_attn": {}}}, 4),
        ({**GPTQ, "modules_in_block_to_quantize": [["mlp.up_proj"], ["self_attn.q_proj"]]}, 4),
        ({**GPTQ, "modules_in_block_to_quantize": ["mlp.up_proj"]}, None),
    ],
)
def test_rules_are_looked_up_as_readers_do(quantization, bits):
    claims = claimed(quantization)
    assert [claim.treatment.bits for claim in claims.values()] == ([bits] if bits else [])


LOOKS_AHEAD = "-:^(?!.*experts).*$"


@pytest.mark.parametrize(
    "quantization",
    [
        {**GPTQ, "dynamic": {LOOKS_AHEAD: {}}},
        {**GPTQ, "dynamic": {r"+:(.)\1.*": {"bits": 8}}},
        {**GPTQ, "dynamic": {"-:k_proj": {}, LOOKS_AHEAD: {}}},
        {**GPTQ, "dynamic": {LOOKS_AHEAD: {}, "+:.*q_proj": {"bits": 8}}},
        # vLLM, by Python, and GPTQModel, by PCRE2, do not read them alike.
        {**GPTQ, "dynamic": {"-:.*q_proj{,1}": {}}},
        {**GPTQ, "dynamic": {"-:.*[a[:alpha:]]": {}}},
        # Nor does Python read them at all.
        {**GPTQ, "dynamic": {"-:^*": {}}},
        {**GPTQ, "dynamic": {"-:*": {}}},
        {**USUAL, "extra_config": {"(": {"bits": 8}}},
        {**USUAL, "extra_config": {"a{99999999999}": {"bits": 8}}},
        {**USUAL, "extra_config": {"(" * 9999: {"bits": 8}}},
        {**USUAL, "extra_config": {"(?<=attn)": {"bits": 16}}},
        {**USUAL, "extra_config": {"é": {"bits": 8}}},
    ],
)
def test_what_a_pattern_that_is_not_read_may_decide_is_not_known(quantization):
    (claim,) = claimed(quantization).values()
    assert isinstance(claim.treatment, Unread)
    assert claim.treatment.reason
    assert claim.shape == ()


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        # A rule before it decides.
        ({**GPTQ, "dynamic": {"+:.*q_proj": {"bits": 8}, LOOKS_AHEAD: {}}}, 8),
        ({**GPTQ, "dynamic": {"-:.*q_proj": {}, LOOKS_AHEAD: {}}}, None),
        ({**USUAL, "extra_config": {f"{LAYER}.q_proj": {"bits": 8}, "(?=q)": {"bits": 2}}}, 8),
        # It says what would be without it.
        ({**GPTQ, "dynamic": {"+:(?!x).*": {"bits": 4}}}, 4),
        ({**GPTQ, "dynamic": {"-:(?!x).*": {}, "-:.*q_proj": {}}}, None),
        ({**USUAL, "extra_config": {"(?!x)": {"bits": 4}, "(?=x)": {"group_size": 32}}}, 4),
    ],
)
def test_what_no_unread_pattern_can_change_is_known(quantization, bits):
    claims = claimed(quantization)
    assert [claim.treatment.bits for claim in claims.values()] == ([bits] if bits else [])


@pytest.mark.parametrize("name", ["é_proj", "a" * 1001, "q\n_proj", "q proj\t"])
def test_strange_names_are_not_known_where_patterns_decide(name):
    odd = {name: PARTS}
    (claim,) = claimed({**GPTQ, "dynamic": {"-:x": {}}}, odd).values()
    assert isinstance(claim.treatment, Unread)
    (claim,) = claimed(GPTQ, odd).values()
    assert claim.treatment.bits == 4


@pytest.mark.parametrize("pattern", [r"\.*", r"\w+", "[^x]+", "(?s).+", r"\Amodel", "model"])
@pytest.mark.parametrize("name", [f"{LAYER}.q_proj", f"{LAYER}.k_proj"])
def test_patterns_are_matched_with_each_name_alone(pattern, name):
    odd = {f"{LAYER}.{last}": PARTS for last in ("a", "k_proj", "q_proj", "z")}
    rules = {**GPTQ, "dynamic": {f"+:{pattern}(?:.q_proj|{re.escape(name)})$": {"bits": 8}}}
    matches = re.compile(f"{pattern}(?:.q_proj|{re.escape(name)})$").match
    expected = {one: 8 if matches(one) else 4 for one in odd}
    assert {one: claim.treatment.bits for one, claim in claimed(rules, odd).items()} == expected


def test_thousands_of_patterns_are_matched_or_refused_in_words():
    """In a moment, or not; see also `test_patterns_of_strangers.py`."""
    names = [f"model.layers.{at // 99}.mlp.experts.{at % 99}.up_proj" for at in range(5_000)]
    many = dict.fromkeys(names, PARTS)
    listed = {f"+:{re.escape(name)}$": {"bits": 8} for name in names[::2]}
    claims = claimed({**GPTQ, "dynamic": listed}, many)
    assert [claim.treatment.bits for claim in claims.values()] == [8, 4] * 2_500
    long = {f"+:{'(.?|a)' * 100}{at}(.*e.{{1,40}}){{9}}z": {} for at in range(1_000)}
    with pytest.raises(ValueError, match=r"1,000 patterns and 5,000 modules take more than"):
        claimed({**GPTQ, "dynamic": long}, many)
    blocks = [f"{at}." for at in range(20_000)]
    with pytest.raises(ValueError, match=r"20,000 names for 5,000 modules"):
        claimed({**GPTQ, "modules_in_block_to_quantize": blocks}, many)


def test_a_head_is_packed_only_if_it_is_said():
    head = {"lm_head": PARTS}
    assert claimed(USUAL, head) == {}
    assert claimed({**USUAL, "block_name_to_quantize": "model.layers"}, head) == {}
    assert "lm_head" in claimed({**USUAL, "extra_config": {"lm_head": {"bits": 4}}}, head)
    assert claimed(GPTQ, head) == {}
    assert "lm_head" in claimed({**GPTQ, "lm_head": True}, head)


def test_a_plain_linear_that_readers_take_for_packed_is_claimed():
    plain: Forms = {
        f"{LAYER}.o_proj": {"weight": ("BF16", (64, 64))},
        "model.layers.0.mlp.gate": {"weight": ("BF16", (4, 64))},
        "model.layers.0.input_layernorm": {"weight": ("BF16", (64,))},
        "lm_head": {"weight": ("BF16", (96, 64))},
    }
    (found,) = claimed(USUAL, plain).items()
    assert found[0] == f"{LAYER}.o_proj"
    assert found[1].shape == ()
    kept = {"extra_config": {f"{LAYER}.o_proj": {"bits": 16, "data_type": "float"}}}
    assert claimed({**USUAL, **kept}, plain) == {}
    # The tensors themselves tell readers of the other dialect.
    assert claimed(GPTQ, plain) == {}


@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        ({}, "its quant_method is None"),
        ([], "its quantization_config is not an object"),
        ("gptq", "its quantization_config is not an object"),
        ({"bits": 4, "group_size": 64}, "its quant_method is None"),
        ({**USUAL, "quant_method": "fp8"}, "its quant_method is 'fp8'"),
        ({**USUAL, "quant_method": ["gptq"]}, "its quant_method is ['gptq']"),
        ({**USUAL, "data_type": "mx_fp"}, "its data_type is 'mx_fp'"),
        ({**USUAL, "packing_format": "auto_round:auto_awq"}, "its packing_format is"),
        ({**USUAL, "packing_format": []}, "its packing_format is []"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "its checkpoint_format is 'marlin'"),
        ({**USUAL, "bits": 5}, "bits 5 are none of 2, 3, 4, 8"),
        ({**USUAL, "bits": True}, "bits True are none of"),
        ({**USUAL, "bits": "4"}, "bits '4' are none of"),
        ({"quant_method": "gptq", "group_size": 32}, "bits None are none of"),
        ({"quant_method": "gptq", "bits": 4}, "group_size None is not a number of values"),
        ({**USUAL, "group_size": 0}, "group_size 0 is not a number of values"),
        # What is numbered by groups of this size would not fit into memory.
        ({**USUAL, "group_size": 2**31}, "group_size 2147483648 is not a number of values"),
        ({**USUAL, "group_size": [128, 128]}, "group_size [128, 128] is not a number of values"),
        ({**USUAL, "sym": "yes"}, "sym 'yes' is neither true nor false"),
        ({**USUAL, "extra_config": {"q_proj": {"bits": 7}}}, "bits 7 are none of"),
        ({**USUAL, "extra_config": {"q_proj": None}}, "no object for 'q_proj'"),
        ({**USUAL, "extra_config": ["q_proj"]}, "its extra_config is not an object"),
        ({**USUAL, "block_name_to_quantize": [1]}, "is not a list of names"),
        ({**GPTQ, "dynamic": {f"-:{'a' * 2**20}b": {}}}, "patterns have more than 1,048,576"),
    ],
)
def test_what_is_no_such_configuration_is_refused_with_the_reason(quantization, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        claimed(quantization)


def test_no_description_claims_nothing():
    assert claimed(None) == {}


@pytest.mark.parametrize("lost", ["qweight", "qzeros", "scales"])
def test_what_is_left_of_a_packed_linear_is_claimed(lost):
    rest = {part: form for part, form in PARTS.items() if part != lost}
    (found,) = claimed(GPTQ, {f"{LAYER}.q_proj": rest}).values()
    assert found.treatment.bits == 4


@pytest.mark.parametrize("words", [(10**15, 0), (0, 10**15), (8, 8, 8)])
def test_words_that_are_no_matrix_tell_no_shape(words):
    odd = {**PARTS, "qweight": ("I32", words), "g_idx": ("I32", (64,))}
    (claim,) = claimed(USUAL, {f"{LAYER}.q_proj": odd}).values()
    assert claim.shape == ()


def test_without_a_quantization_nothing_is_claimed():
    assert FORMATS["gptq"].files().claims({"config.json": b'{"model_type": "llama"}'}, FORMS) == {}
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        FORMATS["gptq"].files().claims({}, FORMS)
