"""Where findings about rules point: the rule itself, also where one line holds several."""

from __future__ import annotations

from pathlib import Path

import pytest

import emitters
from policy_dsl.cli import main
from policy_dsl.diagnostics import PolicyError
from policy_dsl.language.load import load, parse_policy
from policy_dsl.planning.resolve import resolve
from policy_dsl.sources.reference import open_source

TINY = str(Path(__file__).parents[2] / "examples" / "tiny-minimax-m2")


def plan(text, name="p.qpol"):
    policy, _ = parse_policy(text, name)
    return resolve(policy, open_source(TINY), emitters.specs(), target="mlx_affine")


def found(text, code, name="p.qpol"):
    return [each for each in plan(text, name).findings if each.code == code]


def test_rules_of_one_line_are_told_apart_by_their_column() -> None:
    made = plan("experts: 4bit; boundary 1: 8bit\nattention: 4bit").modules
    places = {module.rule for module in made if module.treatment.action == "quantize"}
    assert places == {"p.qpol:1:1", "p.qpol:1:16", "p.qpol:2"}


def test_a_warning_points_at_the_rule_that_decided() -> None:
    (router,) = found("all: 4bit; router: 8bit", "router-quantized")
    assert router.span is not None
    assert router.span.location == "p.qpol:1:12"


def test_what_no_rule_reaches_points_at_otherwise() -> None:
    (missed,) = found("otherwise 4bit\nembed: 8bit", "unreached-matrices")
    assert missed.span is not None
    assert missed.span.location == "p.qpol:1:11"


def test_a_shadowed_rule_names_the_file_of_the_winner(tmp_path: Path) -> None:
    (tmp_path / "base.qpol").write_text("target mlx_affine\nexperts: 4bit\n", encoding="utf-8")
    child = tmp_path / "child.qpol"
    child.write_text("extends base.qpol\n\nall: 3bit\n", encoding="utf-8")
    made = resolve(load(str(child)), open_source(TINY), emitters.specs())
    (shadowed,) = [each for each in made.findings if each.code == "shadowed-rule"]
    assert "child.qpol:3" in shadowed.message
    assert shadowed.span is not None
    assert shadowed.span.location.endswith("base.qpol:2:1")


def test_one_mistake_about_stacks_is_told_once() -> None:
    with pytest.raises(PolicyError) as caught:
        plan("all: 4bit; experts[0-1]: 8bit")
    (mixed,) = caught.value.diagnostics
    assert mixed.code == "mixed-stack"
    assert mixed.notes[0] == "decided by p.qpol:1:12 and p.qpol:1:1"
    assert mixed.notes[1].endswith("more")


def test_a_wrong_target_option_points_at_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "config_i", "--target", "nope"]) == 2
    told = capsys.readouterr().err
    assert 'there is no target "nope"' in told
    assert "-->" not in told
