"""Policy text in, its usual form out: what statements mean, in DSL and in YAML."""

from __future__ import annotations

import pytest

from policy_dsl.diagnostics import PolicyError, SourceText
from policy_dsl.language.print_policy import print_dsl, print_yaml, rule_text
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.language.read_yaml import read_yaml
from policy_dsl.policy import And, Except, Layers, Name, Or, Policy
from policy_dsl.treatments import Written


def dsl(text: str) -> Policy:
    return read_dsl(SourceText("p.qpol", text), "p")


def yaml(text: str) -> Policy:
    return read_yaml(SourceText("p.yaml", text), "p")


def rules(policy: Policy) -> list[str]:
    return [rule_text(rule) for rule in policy.rules]


def test_the_first_sentence_works_as_it_stands() -> None:
    policy = dsl("down_proj: 4bit mxtq; boundary layers 0-1,60-61: 8bit")
    assert rules(policy) == ["down_proj: 4bit mxtq", "boundary layers 0-1,60-61: 8bit"]
    assert policy.rules[0].treatment == Written("quantize", bits=4, scheme="mxtq")


@pytest.mark.parametrize(
    ("written", "usual"),
    [
        ("a,b:4bit", "a, b: 4bit"),
        ("a in layers 0-1,60-61,b: 4bit", "(a in layers 0-1,60-61), b: 4bit"),
        ("a in layers 0 , -1 , b: 4bit", "(a in layers 0,-1), b: 4bit"),
        ("all except router, norm: 4bit", "all except router, norm: 4bit"),
        ("(all except router), norm: 4bit", "(all except router), norm: 4bit"),
        ("all except a except b, c: 4bit", "all except a, b, c: 4bit"),
        ("a except (b except c): 4bit", "a except (b except c): 4bit"),
        ("a and b in layers 3: 4bit", "a and b in layers 3: 4bit"),
        ("(a, b) in layers 3: 4bit", "(a, b) in layers 3: 4bit"),
        ("((a), (b, c)): 4bit", "a, b, c: 4bit"),
        ("layer 3-3: 4bit", "layers 3: 4bit"),
        ("layers 0..3, +5: 4bit", "layers 0-3,5: 4bit"),
        ("layers -2..-1: 4bit", "layers -2..-1: 4bit"),
        ("layers 3..-1: 4bit", "layers 3..-1: 4bit"),
        ("boundary 2: 8bit", "boundary 2: 8bit"),
        ("attention in middle: 4bit", "attention in middle: 4bit"),
        ("a in (layers 0-1, layers 5): 4bit", "a and (layers 0-1, layers 5): 4bit"),
        ("experts [ 0-15 ].down_proj: 4bit", "experts[0-15].down_proj: 4bit"),
        ("router and family minimax_m2: 8bit", "router and family minimax_m2: 8bit"),
        ('"model.layers.*; # w1": keep', '"model.layers.*; # w1": keep'),
        (r"/model\/\d+;#/: keep", r"/model\/\d+;#/: keep"),
        ("layers where (i<n//8)or((i)%3==2): 4bit", "layers where i < n // 8 or i % 3 == 2: 4bit"),
        ("(layers where i<4 and i>1) and a: 4bit", "(layers where i < 4 and i > 1) and a: 4bit"),
        ("a in layers where i<4, b: 4bit", "(a in layers where i < 4), b: 4bit"),
    ],
)
def test_a_selector_has_one_usual_form(written: str, usual: str) -> None:
    assert rules(dsl(written)) == [usual]
    assert rules(dsl(usual)) == [usual]


def test_in_binds_tighter_than_comma_and_comma_than_except() -> None:
    (rule,) = dsl("a in layers 0-1, b except c, d: 4bit").rules
    left, right = rule.selector.base, rule.selector.excluded
    assert isinstance(rule.selector, Except)
    assert isinstance(left.parts[0], And)
    assert (type(left), left.parts[1]) == (Or, Name("b"))
    assert right == Or((Name("c"), Name("d")))


@pytest.mark.parametrize(
    ("written", "usual"),
    [
        ("mxtq 4bit", "4bit mxtq"),
        ("8bits", "8bit"),
        ("by gptq sym g128 int 4bit", "4bit int g128 sym by gptq"),
        ("mq3-lloyd awq", "mq3-lloyd by awq"),
        ("q8", "q8"),
        ("4bit affine asym opt-rtn", "4bit affine asym by opt-rtn"),
        ("optional keep", "keep optional"),
        ("g64", "g64"),
        ("g-1 opt-rtn-0.12.2 4bit int-v2", "4bit int-v2 g-1 by opt-rtn-0.12.2"),
        ("bf16", "bf16"),
        ("raw", "raw"),
        ("drop optional", "drop optional"),
    ],
)
def test_a_treatment_has_one_usual_form(written: str, usual: str) -> None:
    assert rules(dsl(f"a: {written}")) == [f"a: {usual}"]


@pytest.mark.parametrize(
    ("item", "statement"),
    [
        ("down_proj: 4bit mxtq", "down_proj: 4bit mxtq"),
        ("'down_proj: 4bit  # why'", "down_proj: 4bit"),
        ('"lm_head.weight": 8bit', '"lm_head.weight": 8bit'),
        ("'*.w1.weight': 8bit", '"*.w1.weight": 8bit'),
        ("experts.w1, experts.w3 in layers 0-1: 2bit", None),
        ("{match: a, bits: 3, scheme: affine, group_size: 64}", "a: 3bit affine g64"),
        ("{match: a, layers: 2-59, bits: 3}", "a in layers 2-59: 3bit"),
        ("{match: 'a, b', layers: 2-59, bits: 3}", "(a, b) in layers 2-59: 3bit"),
        ("{match: a, layers: 5, dtype: f16}", "a in layers 5: f16"),
        ("{match: a, layers: [0-1, -1], treatment: keep}", "a in layers 0-1,-1: keep"),
        ("{match: a, layers: boundary 2, treatment: 8bit}", "a in boundary 2: 8bit"),
        ("{match: a, layers: where i < 3, bits: 8}", "a in layers where i < 3: 8bit"),
        ("{match: 'model.*.w1', method: awq}", '"model.*.w1": by awq'),
        ("{match: a, bits: 4, symmetric: true, optional: true}", "a: 4bit sym optional"),
        ("{match: a, bits: 4, symmetric: false, optional: false}", "a: 4bit asym"),
    ],
)
def test_items_of_yaml_rules_say_what_statements_say(item: str, statement: str | None) -> None:
    text = f"rules:\n  - {item}\n"
    if statement is None:
        with pytest.raises(PolicyError, match="ambiguous-in"):
            yaml(text)
        return
    assert rules(yaml(text)) == [statement]


def test_a_block_text_may_be_indented_folded_or_quoted() -> None:
    wanted = ["a: 4bit", "b: 8bit"]
    assert rules(yaml("rules: |\n    a: 4bit\n    b: 8bit\n")) == wanted
    assert rules(yaml("rules: >-\n  a:\n  4bit;\n  b: 8bit\n")) == wanted
    assert rules(yaml('rules: "a: 4bit; b: 8bit"\n')) == wanted


def test_values_are_taken_as_the_key_wants_them() -> None:
    policy = yaml("name: 007\ndescription: no\nmodel: 2.50\nruntimes: on\n")
    assert (policy.name, policy.description, policy.model) == ("007", "no", "2.50")
    assert policy.runtimes == ("on",)


def test_rules_know_where_their_parts_stand() -> None:
    (rule,) = yaml("name: x\nrules: |\n  # c\n  (a, b) in layers 0-1: 8bit\n").rules
    assert rule.span.location == "p.yaml:4:3"
    assert rule.treatment_span.location == "p.yaml:4:25"
    places = {type(node): span.location for node, span in rule.name_spans}
    assert places[Layers] == "p.yaml:4:13"


def test_variables_are_texts_that_are_replaced_before_reading() -> None:
    policy = dsl(
        'var w = 3\nvar s = "affine g64"\nvar last = -1\na in layers 0..${last}: ${w}bit ${s}'
    )
    assert policy.rules[0].treatment == Written("quantize", 3, "affine", 64)
    assert rules(policy) == ["a in layers 0..${last}: ${w}bit ${s}"]
    assert dsl('metadata a "$${w}"\na: 4bit').metadata == (("a", "${w}"),)


def test_targets_and_blocks_say_the_same_in_both_notations() -> None:
    one = dsl("a: 4bit\ntarget mlx_affine\non gptq { b: keep; c: keep }\nd: 8bit\n")
    other = yaml(
        "rules: ['a: 4bit', 'd: 8bit']\n"
        "targets: {mlx_affine: {}, gptq: {rules: ['b: keep', 'c: keep']}}\n"
    )
    assert one == other
    assert [rule.target for rule in one.rules] == [None, None, "gptq", "gptq"]


def test_a_target_keeps_its_variable_and_one_mistake_in_it_is_one_error() -> None:
    policy = yaml("name: x\nvars: {t: gptq}\ntarget: ${t}\nrules: ['a: 4bit']\n")
    assert policy.targets == ("gptq",)
    assert 'target: "${t}"' in print_yaml(policy)
    assert dsl(print_dsl(policy)) == policy
    for text in ("target ${t}", "runtime ${t}", "name ${t}", "default bits ${t}"):
        with pytest.raises(PolicyError) as raised:
            dsl(f"{text}\na: 4bit\n")
        assert [each.code for each in raised.value.diagnostics] == ["unknown-variable"]
