"""Policies of thousands of rules for models of many layers: right, and in a bounded time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_dsl.diagnostics import PolicyError, SourceText
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.planning.decisions import decide, trace
from policy_dsl.planning.matching import is_boundary
from policy_dsl.roles.classify import Model, classify
from policy_dsl.sources.reference import open_source

ROOT = Path(__file__).parents[3]
N_LAYERS, N_RULES = 1_000, 3_000
LARGE = {
    "boundary layers": [f"q_proj in boundary layers 0-{n % 9},-1: f16" for n in range(N_RULES)],
    "layers that are no boundary": [
        f"q_proj in boundary layers {n % 400 + 1}-{n % 400 + 500}: f16" for n in range(N_RULES)
    ],
    "middle": ["boundary 2: f16", *["mlp in middle: f16", "mlp in middle: bf16"] * 2_000],
    "layers where": [f"o_proj in layers where i < {n % 90 + 1}: f16" for n in range(N_RULES)],
    "single layers": [f"mlp in layers {n % N_LAYERS}: f16" for n in range(N_RULES)],
    "names": [f'"model.layers.{n % N_LAYERS}.mlp.*.weight": f16' for n in range(N_RULES)],
    "expressions": [rf"/.*\.{n % N_LAYERS}\.mlp\..*/: f16" for n in range(N_RULES)],
    "names of nothing": [f'"model.decoder.{n}.*": f16' for n in range(N_RULES)],
    "expressions of nothing": [f"/.*decoder{n}.*/: f16" for n in range(N_RULES)],
    "names that take more": [f'"model.layers.{n % 9 + 1}*": f16' for n in range(N_RULES)],
    "exceptions": [f"all except mlp in layers {n % 90}: f16" for n in range(N_RULES)],
    "all shadowed": ["all: f16", "all: bf16"] * (N_RULES // 2),
    "tests": ["test min_bits(mlp) >= 4"] * 200,
}
FAST = ("single layers", "names of nothing", "tests")
CASES = [
    pytest.param(rules, id=name, marks=[] if name in FAST else pytest.mark.slow)
    for name, rules in LARGE.items()
]
BROAD = {
    "expressions": "/(model|a{0}|lm).*/: 4bit optional",
    "name patterns": '"*weight?{0}": 4bit optional',
    "numbers of experts": "experts[0-{1}]: 4bit optional",
}
SELECTORS = st.sampled_from(
    [
        *("all", "mlp", "down_proj", "attention.q_proj", "router", "norm", "embed, lm_head"),
        *("experts", "experts[0-1]", "experts[1].down_proj", "layers 1", "layers -1", "middle"),
        *("boundary 1", "layers where i % 2 == 0", "/.*q_proj.*/", "family llama", "o_proj"),
        *('"model.layers.0.*"', '"*.experts.2.*"', '"*.weight"', "family minimax_m2"),
        *(r"/model\.layers\.\d\.self_attn\..*/", '"model.norm.weight"', '"nothing"'),
    ]
)
COMBINED = st.recursive(
    SELECTORS,
    lambda inner: st.one_of(
        st.builds("({}) and ({})".format, inner, inner),
        st.builds("({}), ({})".format, inner, inner),
        st.builds("({}) except ({})".format, inner, inner),
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def small() -> Model:
    return classify(open_source(str(ROOT / "examples" / "tiny-minimax-m2")))


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 1,000 layers whose weights are all zero, and take no room on the disk."""
    folder = tmp_path_factory.mktemp("llama")
    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    block = {f"self_attn.{name}": [64, 64] for name in projections} | {
        **{"input_layernorm": [64], "post_attention_layernorm": [64]},
        **{"mlp.gate_proj": [128, 64], "mlp.up_proj": [128, 64], "mlp.down_proj": [64, 128]},
    }
    shapes = {"model.embed_tokens": [256, 64], "model.norm": [64], "lm_head": [256, 64]}
    for layer in range(N_LAYERS):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        place = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        header[f"{name}.weight"] = place
        at += nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": N_LAYERS}
    config = {"model_type": "llama", "tie_word_embeddings": False, **sizes, **heads}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("rules", CASES)
def test_thousands_of_rules_take_seconds(rules: list[str], many_layers: Path, tmp_path: Path):
    policy = tmp_path / "large.qpol"
    policy.write_text("\n".join(["target mlx_affine", "all: bf16", *rules]))
    command = [sys.executable, "-m", "policyc", "check", policy, "--model", many_layers]
    run = subprocess.run(command, cwd=ROOT, timeout=60, check=False, capture_output=True, text=True)
    assert run.returncode in (0, 1)
    assert "Traceback" not in run.stderr


def test_more_rules_than_can_be_compared_are_refused(small: Model):
    text = "all: f16\n" * (5_000_000 // small.n_layers // 100 + 1)
    policy = read_dsl(SourceText("p.qpol", text), "p")
    many = replace(policy, rules=policy.rules * 100)
    with pytest.raises(PolicyError, match=r"rules; for this model it may have [\d,]+"):
        decide(many, small, "mlx_affine")


@pytest.mark.slow
@pytest.mark.parametrize("rule", BROAD.values(), ids=BROAD)
def test_rules_that_match_all_of_a_large_model_come_to_an_end(rule: str, tmp_path: Path):
    policy = tmp_path / "broad.qpol"
    rules = [rule.format(n, n % 256) for n in range(4_900)]
    policy.write_text("\n".join(["target mlx_affine", "all: 4bit", *rules]))
    command = [sys.executable, "-m", "policyc", "check", policy]
    run = subprocess.run(
        [*command, "--model", "minimax_m2.7"],
        cwd=ROOT,
        timeout=90,
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "error[too-much-to-match]" in run.stdout
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_each_layer_of_a_large_model_may_list_its_own_experts():
    model = classify(open_source("minimax_m2.7"))
    halves = "(experts[0-{0}], experts[{1}-255]) in layers {2}: 8bit"
    rules = [halves.format(100 + n, 101 + n, n) for n in range(model.n_layers)]
    policy = read_dsl(
        SourceText("large.qpol", "\n".join(["target gptq", "all: 4bit", *rules])), "large"
    )
    decided = decide(policy, model, "gptq")
    assert decided.findings == ()
    assert {one.decided_by for one in decided.made if one.tensor.expert == 7} == {*range(1, 63)}


@settings(deadline=None, max_examples=150)
@given(selectors=st.lists(COMBINED, min_size=1, max_size=5), drops=st.booleans())
def test_the_last_rule_that_may_touch_a_tensor_decides_it(
    selectors: list[str], drops: bool, small: Model
):
    rules = [f"{selector}: f16 optional" for selector in selectors]
    rules += ["mtp: drop optional"] if drops else []
    text = "\n".join(["target mlx_affine", "boundary 1 and norm: keep optional", *rules])
    policy = read_dsl(SourceText("p.qpol", text), "p")
    for decision in decide(policy, small, "mlx_affine").made[::7]:
        matching = trace(policy, small, "mlx_affine", decision.tensor)
        expected = [index for index, may in matching if may]
        assert decision.decided_by == (expected[-1] if expected else None)


@pytest.mark.parametrize(
    ("layers", "n_layers", "expected"),
    [
        ({0, 9}, 10, True),
        ({0, 1, 8, 9}, 10, True),
        ({0}, 10, False),
        ({0, 8}, 10, False),
        ({0, 1, 9}, 10, False),
        (set(), 10, False),
        (set(), 0, False),
        ({0}, 1, True),
        ({0, 1, 2}, 3, True),
        ({0, 1}, 3, False),
        ({0, 2}, 3, True),
        (set(range(10)), 10, True),
        (set(range(9)), 10, False),
    ],
)
def test_a_boundary_has_as_many_first_layers_as_last(
    layers: set[int], n_layers: int, expected: bool
):
    assert is_boundary(frozenset(layers), n_layers) is expected
