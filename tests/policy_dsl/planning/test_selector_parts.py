"""Every part of a selector that is written for one model matches something in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

import emitters
from policy_dsl.diagnostics import Diagnostic, PolicyError, SourceText
from policy_dsl.inventory import Inventory
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.plan import Plan
from policy_dsl.planning.assertions import findings_of_tests
from policy_dsl.planning.decisions import decide
from policy_dsl.planning.resolve import resolve
from policy_dsl.policy import Policy
from policy_dsl.roles.classify import Model, classify
from tests.models import minimax, tiny

ROOT = Path(__file__).parents[3]
SPECS = emitters.FORMATS
HEAD = "target mlx_affine\n"


@cache
def minimax_model() -> Model:
    """MiniMax-M2.7 by its recorded headers: 62 layers of 256 experts."""
    return classify(minimax())


def policy_of(rules: str) -> Policy:
    return read_dsl(SourceText("p.qpol", HEAD + rules), "p")


def plan_of(rules: str, source: Inventory | None = None) -> Plan:
    return resolve(policy_of(rules), source or tiny(), SPECS)


def found_in(rules: str, source: Inventory | None = None) -> tuple[Diagnostic, ...]:
    """The findings about names, patterns and parts."""
    try:
        findings = plan_of(rules, source).findings
    except PolicyError as error:
        findings = error.diagnostics
    return tuple(each for each in findings if each.code.split("-")[0] in ("pattern", "part"))


def marked(found: Diagnostic) -> str:
    """What the caret is under."""
    assert found.span is not None
    return found.span.source.text[found.span.start : found.span.end]


# Rules on a recorded model whose pattern matches nothing, what is told of it, what to write.
CURES = [
    ('all except "*lm_head": 4bit', '"*lm_head.weight"', "with .weight at the end 1 would"),
    ("all except /lm_head/: 4bit", r"/lm_head\.weight/", "against the whole name"),
    (
        'all: 4bit\n"model.layers.0.mlp.*", "blk.1.ffn_down.weight": 8bit',
        "(mlp.down_proj in layers 1)",
        "is llama.cpp's name: the role is mlp.down_proj",
    ),
    ('all: 4bit\n"blk.*.ffn_down.weight": 8bit', "mlp.down_proj", "is llama.cpp's name"),
    ('all: 4bit\n"blk.*.ffn_down": 8bit', "mlp.down_proj", "is llama.cpp's name"),
    ('all: 4bit\n"token_embd.weight": 8bit', "embed", "the role is embed"),
    (
        'all: 4bit\nattention and "blk.*.attn_qkv.weight": 8bit',
        "(attention.q_proj, attention.k_proj, attention.v_proj)",
        "is llama.cpp's name",
    ),
    ("all: 4bit\n/blk\\.[0-9]\\.ffn_up/: 8bit", "mlp.up_proj", "is llama.cpp's name"),
    ('all: 4bit\n"*down_proj": 8bit', '"*down_proj.weight"', "with .weight at the end 3 would"),
    ('all: 4bit\n"re:.*down_proj$": 8bit', r"/.*down_proj\.weight/", "another tool's notation"),
    ('all: 4bit\n"re:.*mlp.*": keep', r"/.*mlp.*/", "another tool's notation"),
    ('all: 4bit\n"re:^lm_head": 8bit', r"/lm_head\.weight/", "another tool's notation"),
    ('all: 4bit\n"re:.*ffn_gate": 8bit', "mlp.gate_proj", "is llama.cpp's name"),
    ("all: 4bit\n/layers.1/: 8bit", "/.*layers.1.*/", "against the whole name"),
    ('all: 4bit\n"layers.1.mlp.up_proj.weight": 8bit', '"*.layers.1.mlp.up_proj.weight"', ""),
    ('all: 4bit\n"layers.1.*": 8bit', '"*.layers.1.*"', "against the whole name"),
    ('all: 4bit\n"*.model.layers.0.mlp.*": 8bit', '"model.layers.0.mlp.*"', "whole name"),
    ('all: 4bit\n"model.layers.0.mlp": 8bit', '"model.layers.0.mlp.*"', "whole name"),
    ('all: 4bit\n"model.decoder.layers.0.mlp.*": 8bit', '"model.layers.0.mlp.*"', ""),
    ('all: 4bit\n"language_model.model.layers.0.mlp.*": 8bit', '"model.layers.0.mlp.*"', ""),
    ('all: 4bit\n"*.mlp.dwon_proj.weight": 8bit', '"*.mlp.down_proj.weight"', ""),
    ('all: 4bit\n"model\\\\.layers\\\\.0\\\\..*": 8bit', r"/model\.layers\.0\..*/", ""),
    ('all except (router, (norm, "*head")): 4bit', '"*head.weight"', "1 would"),
    ('all: 4bit\n(mlp except ("*.up_proj", attention)): 8bit', '"*.up_proj.weight"', ""),
]


@pytest.mark.parametrize(("rules", "cure", "note"), CURES)
def test_a_pattern_that_matches_no_name_is_an_error_whose_cure_works(
    recorded: Callable[..., Any], rules: str, cure: str, note: str
) -> None:
    source, _ = recorded("llama")
    (found,) = found_in(rules, source)
    assert (found.code, found.severity) == ("pattern-matches-nothing", "error")
    assert note in " ".join(found.notes)
    assert found.suggestion in (f"write {cure}", f"did you mean {cure}?")
    # Typed as it is offered, it is a policy that nothing is wrong with.
    assert found.span is not None
    start, end = found.span.start - len(HEAD), found.span.end - len(HEAD)
    cured = rules[:start] + cure + rules[end:]
    assert found_in(cured, source) == ()
    assert plan_of(cured, source).modules


@pytest.mark.parametrize(
    ("rules", "caret"),
    [
        # after a comma, after `and`, after `except`, in parentheses, in lists of numbers
        ('all: 4bit\n"*.0.mlp.*", "*.7.mlp.*": 8bit', '"*.7.mlp.*"'),
        ('all: 4bit\nmlp and ("*.0.mlp.*", "*.7.mlp.*"): 8bit', '"*.7.mlp.*"'),
        ('all except (mlp, ("*.9.*" in layers 0)): 4bit', '"*.9.*"'),
        ('all except attention, "*.o.*": 4bit', '"*.o.*"'),
        # each matches something, and both together nothing
        ('all: 4bit\nmlp, ("*.0.*" in layers 1): 8bit', '"*.0.*" in layers 1'),
        ('all: 4bit\nmlp and ("*.0.*", "*.self_attn.*"): 8bit', '"*.self_attn.*"'),
        ("all except embed, (attention and /.*mlp.*/): 4bit", "attention and /.*mlp.*/"),
        # only what it may not touch
        ('all: 4bit\nmlp, "*norm*": 8bit', '"*norm*"'),
        ("all: 4bit\nmlp, /.*norm.*/: 8bit", "/.*norm.*/"),
    ],
)
def test_every_part_that_is_written_for_one_model_matches_something(
    recorded: Callable[..., Any], rules: str, caret: str
) -> None:
    source, _ = recorded("llama")
    (found,) = found_in(rules, source)
    assert found.severity == "error"
    assert marked(found) == caret
    assert found_in(re.sub(r"(\dbit)$", r"\1 optional", rules), source) == ()


@pytest.mark.parametrize(
    "rules",
    [
        # Roles, boundaries and families are for many models.
        "all except router, (shared_experts, vision), audio, mtp: 4bit",
        "all: 4bit\nmlp, experts: 8bit",
        "all: 4bit\nmlp, (experts in boundary 1): 8bit",
        'all: 4bit\nmlp, ("*.block_sparse_moe.*" and family mixtral): 8bit',
        'all: 4bit\nmlp, ("*.w1.weight" and (family mixtral, family minimax_m2)): 8bit',
        # A part may match what another part matches too.
        'all: 4bit\nall, "*.mlp.*", "*.0.*": 8bit',
        'all except "*norm*", "*.weight": 4bit optional',
        'all: 4bit\nnorm and "*.0.*": f16',
        'all: 4bit\n"*.input_layernorm.weight" in layers 0: f16',
    ],
)
def test_what_serves_many_models_may_match_nothing(
    recorded: Callable[..., Any], rules: str
) -> None:
    assert found_in(rules, recorded("llama")[0]) == ()


def test_numbers_outside_of_the_model_are_found_in_every_part() -> None:
    rules = "all: 4bit\nattention in layers 0-1, 9, (experts[3,12] except layers 44): 8bit"
    found = decide(policy_of(rules), classify(tiny()), "mlx_affine").findings
    assert [(one.code, marked(one)) for one in found] == [
        ("number-outside-model", "layers 0-1, 9"),
        ("number-outside-model", "experts[3,12]"),
        ("number-outside-model", "layers 44"),
    ]


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ("experts[0-3]", "experts 0-3 are outside the model, which has no experts"),
        ("layers 0-99", "layers 0-99 are outside the model, which has layers 0-2"),
        ("layers 7", "layer 7 is outside the model, which has layers 0-2"),
        ("layers -9..-1", "layers -9..-1 are outside the model, which has layers 0-2"),
    ],
)
def test_numbers_outside_of_the_model_are_said_as_they_are_written(
    recorded: Callable[..., Any], selector: str, said: str
) -> None:
    model = classify(recorded("llama")[0])
    found = decide(policy_of(f"all: 4bit\n{selector}: 8bit"), model, "mlx_affine").findings
    assert said in [one.message for one in found]


def test_selectors_of_tests_are_looked_at_too() -> None:
    plan = plan_of('all: 4bit\ntest min_bits(experts, "*w9*") >= 3\ntest "lm_head" is keep')
    found = findings_of_tests(plan)
    assert [one.code for one in found] == ["pattern-matches-nothing"] * 2
    # `optional` is a word of rules.
    assert [one.suggestion for one in found] == [None, 'write "lm_head.weight"']


@pytest.mark.parametrize(
    ("pattern", "numbers", "narrower"),
    [
        ('"model.layers.1*"', "layers 10-19", '"model.layers.1.*"'),
        ('"*.layers.6*.self_attn.*"', "layers 60-61", '"*.layers.6.self_attn.*"'),
        (r"/model\.layers\.2.*/", "layers 20-29", r"/model\.layers\.2\..*/"),
        ('"*.experts.25*"', "experts 250-255", '"*.experts.25.*"'),
    ],
)
def test_a_star_that_continues_a_number_is_warned_about(
    pattern: str, numbers: str, narrower: str
) -> None:
    for rules in (f"all: 4bit\n{pattern}: 8bit", f"all except {pattern}: 4bit"):
        found = decide(policy_of(rules), minimax_model(), "mlx_affine").findings
        (warned,) = [each for each in found if each.code == "pattern-takes-more"]
        assert (warned.severity, warned.suggestion) == ("warning", f"write {narrower}")
        assert warned.message == f"{pattern} also takes {numbers}"
        cured = policy_of(rules.replace(pattern, narrower))
        assert not [
            each
            for each in decide(cured, minimax_model(), "mlx_affine").findings
            if each.code.startswith("pattern")
        ]


def test_a_star_that_continues_no_number_is_not() -> None:
    rules = 'all: 4bit\n"*.layers.7*", "*.layers.1.*", "*.w1*", /.*\\.layers\\.9.*/: 8bit'
    found = decide(policy_of(rules), minimax_model(), "mlx_affine").findings
    assert [each.code for each in found if each.code.startswith("pattern")] == []


def test_what_a_pattern_matches_besides_weights_is_said(
    changed: Callable[..., Any], tensor: Callable[..., Any]
) -> None:
    table = tensor("model.layers.0.self_attn.rotary_emb.inv_freq", [8], "F32")
    source = changed("llama", with_tensors=[table])
    (found,) = found_in('all: 4bit\nmlp, "*.inv_freq": keep', source)
    assert "is not a weight of the model: rotary table" in found.notes[0]
    rules = policy_of('experts: 4bit\nattention, "*.w1.weight_scale_inv": keep')
    (scale,) = decide(rules, minimax_model(), "mlx_affine").findings
    assert "is read with its weight" in scale.notes[0]


def test_a_long_list_of_names_of_another_model_is_few_findings() -> None:
    names = ", ".join(f'"transformer.h.{layer}.mlp.c_fc.weight"' for layer in range(500))
    policy, model = policy_of(f"all except {names}: 4bit"), minimax_model()
    start = perf_counter()
    found = decide(policy, model, "mlx_affine").findings
    assert perf_counter() - start < 20
    assert {each.code for each in found} == {"pattern-matches-nothing"}
    assert len(found) == 10
    assert found[-1].notes[-1].startswith("490 more patterns of this rule match nothing")


def test_many_patterns_take_little_time_on_a_large_model() -> None:
    start = perf_counter()
    decide(policy_of("all: 4bit\nboundary 2: 8bit"), minimax_model(), "mlx_affine")
    plain = perf_counter() - start
    patterns = ", ".join(f'"*.layers.{layer}.*.w2.weight"' for layer in range(62))
    start = perf_counter()
    decide(policy_of(f"all: 4bit\n{patterns}: 8bit"), minimax_model(), "mlx_affine")
    # 62 patterns and 48,000 names: some tenths of a second, where trying each took seconds.
    assert perf_counter() - start < 40 * plain + 1
