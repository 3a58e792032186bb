"""Rules for tensors that a target leaves out: warned about, and without effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import emitters
from policy_dsl.diagnostics import Diagnostic, SourceText
from policy_dsl.inventory import Inventory
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.plan import Plan
from policy_dsl.planning.decisions import explain
from policy_dsl.planning.resolve import resolve

SPECS = emitters.FORMATS


def plan_of(rules: str, source: Inventory, target: str = "mlx_affine") -> Plan:
    return resolve(read_dsl(SourceText("p.qpol", rules), "p"), source, SPECS, target=target)


def warned(plan: Plan) -> tuple[Diagnostic, ...]:
    return tuple(each for each in plan.findings if each.code == "rule-without-effect")


# mlx-lm looks for the first full layer of a Gemma; the recorded one has three layers.
PATTERN = {"sliding_window_pattern": 3}


@pytest.fixture
def gemma(changed: Callable[..., Any]) -> Inventory:
    """A Gemma 3 with a vision tower."""
    source: Inventory = changed("gemma3")
    text = source.config["text_config"] | PATTERN
    return replace(source, config={**source.config, "text_config": text})


@pytest.fixture
def with_mtp(changed: Callable[..., Any], mtp_block: Callable[..., Any]) -> Callable[..., Any]:
    """A recorded model of a family with an MTP block."""

    def make(case: str) -> Inventory:
        block = mtp_block("model.layers.3.", case, 2)
        found: Inventory = changed(case, with_tensors=block, config={"num_nextn_predict_layers": 1})
        return found

    return make


@pytest.mark.parametrize("treatment", ["keep", "4bit g32", "bf16", "raw", "keep optional"])
def test_a_rule_for_a_tower_that_is_left_out_is_a_warning(gemma: Inventory, treatment: str) -> None:
    plan = plan_of(f"all: 8bit g32\nvision: {treatment}", gemma)
    (found,) = warned(plan)
    count = sum(1 for one in plan.omitted if one.role.startswith("vision."))
    assert found.severity == "warning"
    assert found.message == (
        f"the rule decides {count} tensors that mlx_affine leaves out: mlx-lm builds the "
        "language model only"
    )
    assert found.span is not None
    assert found.span.location.startswith("p.qpol:2:9")
    # What is offered is a policy without the warning.
    assert found.suggestion == 'write "drop"'
    assert plan_of("all: 8bit g32\nvision: drop", gemma).findings == ()


def test_explain_does_not_say_that_it_decided(gemma: Inventory) -> None:
    plan = plan_of("all: 8bit g32\nvision: keep", gemma)
    name = next(one.tensor.name for one in plan.omitted if one.role == "vision.fc1")
    outcomes = [rule.outcome for rule in explain(plan, name).rules]
    assert outcomes == ["lost", "without effect"]
    covered = plan_of("all: 8bit g32", gemma)
    assert [rule.outcome for rule in explain(covered, name).rules] == ["without effect"]
    dropped = plan_of("all: 8bit g32\nvision: drop", gemma)
    assert [rule.outcome for rule in explain(dropped, name).rules] == ["lost", "decided"]


@pytest.mark.parametrize(
    ("rules", "suggestion"),
    [
        ("all: 8bit g32\nmlp, vision: keep", 'write "vision: drop" after it'),
        ("all: 8bit g32\nvision.fc1: keep", 'write "drop"'),
        ('all: 8bit g32\n"*vision_tower.*": keep', 'write "drop"'),
        ("all: 8bit g32\n/.*vision_tower.*fc2.*/: keep", 'write "drop"'),
        ('all: 8bit g32\n(mlp, "*.fc1.weight"): keep', 'write "vision: drop" after it'),
        ("all: 8bit g32\nvision.norm: keep", 'write "drop"'),
    ],
)
def test_names_and_patterns_of_what_is_left_out_count(
    gemma: Inventory, rules: str, suggestion: str
) -> None:
    (found,) = warned(plan_of(rules, gemma))
    assert found.suggestion == suggestion
    cured = rules.rpartition(":")[0] + ": drop"
    if suggestion.endswith("after it"):
        cured = rules + "\nvision: drop"
    assert warned(plan_of(cured, gemma)) == ()


@pytest.mark.parametrize(
    "rules",
    [
        "all: 8bit g32",
        'all: 8bit g32\n"*": 4bit g32',
        '"*.weight": 8bit g32',
        "/.*/: 8bit g32",
        "all except vision: 8bit g32",
        "all: 8bit g32\nmlp: keep",
        "family gemma3: 8bit g32",
    ],
)
def test_rules_that_only_cover_it_are_not_warned_about(gemma: Inventory, rules: str) -> None:
    assert warned(plan_of(rules, gemma)) == ()


@pytest.mark.parametrize(
    ("case", "target", "width", "reason"),
    [
        ("glm4_moe", "mlx_affine", "4bit g32", "mlx-lm has no multi-token prediction"),
        ("glm4_moe", "jangtq_prestack", "8bit", "jang's loader has no multi-token prediction"),
        ("deepseek_v3", "jangtq_prestack", "8bit", "jang's loader has no multi-token"),
    ],
)
def test_mtp_blocks_are_left_out_by_these_targets(
    with_mtp: Callable[..., Any], case: str, target: str, width: str, reason: str
) -> None:
    source = with_mtp(case)
    base = "experts: 2bit\nembed, lm_head: 8bit\n"
    if target == "mlx_affine":
        base = "all: 4bit g32\n"
    for rule in (f"mtp: {width}", f'"model.layers.3.*": {width}', "mtp.router: f16"):
        (found,) = warned(plan_of(base + rule, source, target))
        assert reason in found.message
    assert warned(plan_of(base, source, target)) == ()
    assert warned(plan_of(f"{base}mtp: drop", source, target)) == ()


def test_a_target_that_has_a_place_for_them_says_nothing(with_mtp: Callable[..., Any]) -> None:
    plan = plan_of("attention: 4bit g32\nmtp: keep", with_mtp("glm4_moe"), "gptq")
    assert warned(plan) == ()


@pytest.mark.parametrize("rule", ["lm_head: 8bit g32", '"language_model.lm_head.weight": bf16'])
@pytest.mark.parametrize("nested", [True, False])
def test_the_key_is_written_where_readers_look(
    changed: Callable[..., Any], tensor: Callable[..., Any], rule: str, nested: bool
) -> None:
    given = changed("gemma3")
    embed = next(one for one in given.tensors.values() if "embed_tokens" in one.name)
    head = tensor("language_model.lm_head.weight", embed.shape)
    key = {"tie_word_embeddings": True}
    text = {name: one for name, one in given.config["text_config"].items() if "tie" not in name}
    config = {"text_config": text | PATTERN | (key if nested else {})}
    source = changed("gemma3", with_tensors=[head], config=config)
    left = {name: value for name, value in source.config.items() if "tie" not in name}
    source = Inventory(source.id, left, source.tensors)
    # Without the key, Gemma is tied by transformers' default.
    plan = plan_of("all: 8bit g32", source)
    assert [one.code for one in plan.findings] == ["tied-head-left-out"]
    plan = plan_of(f"all: 8bit g32\n{rule}", source)
    assert plan.findings == ()
    config = json.loads(emitters.FORMATS["mlx_affine"].files().metadata(plan)["config.json"])
    where = config["text_config"] if nested else config
    assert where["tie_word_embeddings"] is False
    assert "lm_head" in {module.name.rpartition(".")[2] for module in plan.modules}
