"""Where findings about rules point: the rule itself, also where one line holds several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import emitters
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import TensorInfo
from policy_dsl.language.load import load, parse_policy
from policy_dsl.plan import coded_modules
from policy_dsl.planning.decisions import explain
from policy_dsl.planning.lint import lint
from policy_dsl.planning.resolve import resolve
from policy_dsl.sources.reference import open_source
from policyc.cli import main
from policyc.reports import render_text
from policyc.reports.plan_report import plan_blocks

TINY = str(Path(__file__).parents[3] / "examples" / "tiny-minimax-m2")


def plan(text, name="p.qpol"):
    policy, _ = parse_policy(text, name)
    return resolve(policy, open_source(TINY), emitters.FORMATS, target="mlx_affine")


def found(text, code, name="p.qpol"):
    return [each for each in plan(text, name).findings if each.code == code]


def test_rules_of_one_line_are_told_apart_by_their_column() -> None:
    made = plan("experts: 4bit; boundary 1: 8bit\nattention: 4bit")
    places = {made.rule_of(module)[0] for module, _ in coded_modules(made.modules)}
    assert places == {"p.qpol:1:1", "p.qpol:1:16", "p.qpol:2"}


def test_a_warning_points_at_the_rule_that_decided() -> None:
    (router,) = found("all: 4bit; router: 6bit", "below-usual-width")
    assert router.span is not None
    assert router.span.location == "p.qpol:1:12"


def test_what_no_rule_reaches_points_at_otherwise() -> None:
    (missed,) = found("otherwise 4bit\nembed: 8bit", "unreached-matrices")
    assert missed.span is not None
    assert missed.span.location == "p.qpol:1:11"


def test_a_refused_otherwise_is_shown_and_not_blamed_for_guarded_tensors() -> None:
    with pytest.raises(PolicyError) as caught:
        plan("otherwise 4bit mxtq\nexperts: 4bit; router: 4bit g100")
    places = {one.code: one.span and one.span.location for one in caught.value.diagnostics}
    assert places == {"foreign-scheme": "p.qpol:1:11", "unsupported-group-size": "p.qpol:2:24"}


def test_a_shadowed_rule_names_the_file_of_the_winner(tmp_path: Path) -> None:
    (tmp_path / "base.qpol").write_text("target mlx_affine\nexperts: 4bit\n", encoding="utf-8")
    child = tmp_path / "child.qpol"
    child.write_text("extends base.qpol\n\nall: 3bit\n", encoding="utf-8")
    made = resolve(load(str(child)), open_source(TINY), emitters.FORMATS)
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


@pytest.mark.parametrize(
    ("target", "text", "roles", "cure"),
    [
        ("gptq", "all: 4bit", "embed", 'write "embed: keep" after it'),
        ("gptq", "all: 8bit; embed: keep; router: 8bit", "router", 'write "router: keep"'),
        ("gptq", "all: 4bit asym by opt-rtn; embed: keep", "lm_head", '"4bit int g128 asym"'),
        ("jangtq_prestack", "all: 4bit mxtq", "attention.v_proj, lm_head", '"4bit" would do'),
        ("hipfire_hfq", "all: 4bit awq; embed, router: q8", "lm_head", '"4bit mq4 g256" would'),
        ("hipfire_hfq", "all: q8", "experts.up_proj", None),
    ],
)
def test_what_readers_refuse_is_one_error_with_what_they_would_take(
    target: str, text: str, roles: str, cure: str | None
) -> None:
    policy, _ = parse_policy(text, "p.qpol")
    with pytest.raises(PolicyError) as caught:
        resolve(policy, open_source(TINY), emitters.FORMATS, target=target)
    (told,) = [one for one in caught.value.diagnostics if one.span]
    assert f"{roles} as " in told.message
    assert (told.suggestion or "").startswith(cure or "")
    assert (told.suggestion is None) == (cure is None)


def test_of_several_targets_the_one_that_cannot_be_written_is_pointed_at() -> None:
    text = "target mlx_affine\nall: 4bit\non gptq { all: 4bit int }\n"
    policy, _ = parse_policy(text, "two.qpol")
    installed = {name: spec for name, spec in emitters.FORMATS.items() if name != "gptq"}
    (found,) = lint(policy, installed)
    assert (found.code, found.span.place[1] if found.span else None) == ("unavailable-target", 3)


def test_a_wrong_target_option_points_at_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "config_i", "--target", "nope"]) == 2
    told = capsys.readouterr().err
    assert 'there is no target "nope"' in told
    assert "-->" not in told


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("model.layers.1.block_sparse_moe.switch_mlp.up_proj.scales", None),
        ("model.layers.1.block_sparse_moe.switch_mlp.up_proj", None),
        ("model.layers.1.block_sparse_moe.experts.3.w3.weight", 3),
        ("model.layers.1.block_sparse_moe.experts.3.w3.weight_scale_inv", 3),
    ],
)
def test_only_an_expert_s_own_name_means_one_expert(name: str, expert: int | None) -> None:
    assert explain(plan("all: 4bit"), name).expert == expert


def test_what_holds_no_weights_is_left_out_with_a_reason() -> None:
    source = open_source(TINY)
    table = TensorInfo("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (8,), 32)
    tensors = {**source.tensors, table.name: table}
    policy, _ = parse_policy("all: 4bit", "p.qpol")
    made = resolve(policy, replace(source, tensors=tensors), emitters.FORMATS, target="mlx_affine")
    assert [each.tensor.name for each in made.omitted] == [table.name]
    assert "no role: 1 tensor, 32 bytes, such as model.layers.0" in render_text(
        plan_blocks(made, ())
    )
    assert explain(made, table.name).subject.omission == made.omitted[0]


@pytest.fixture
def namesakes(tmp_path: Path) -> tuple[Path, str]:
    """A policy that extends one whose file has the same name; the folder of both."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    (tmp_path / "a" / "base.qpol").write_text(
        "target mlx_affine\nall: 4bit\nnorm: keep\nembed: f32\n", encoding="utf-8"
    )
    child = tmp_path / "b" / "base.qpol"
    child.write_text(
        'extends "../a/base.qpol"\nlm_head: keep\nrouter: 6bit\nattention: drop\n', encoding="utf-8"
    )
    return child, str(tmp_path)


@pytest.mark.parametrize(
    ("code", "place"),
    [
        ("below-usual-width", "b/base.qpol:3:1"),
        ("dropped-tensors", "b/base.qpol:4:1"),
        ("larger-than-source", "a/base.qpol:4:1"),
    ],
)
def test_warnings_tell_files_of_one_name_apart(namesakes, code: str, place: str) -> None:
    policy, folder = namesakes
    made = resolve(load(policy), open_source(TINY), emitters.FORMATS, target="mlx_affine")
    spans = [
        one.span.location.removeprefix(f"{folder}/") for one in made.findings if one.code == code
    ]
    assert [span.replace("b/../a", "a") for span in spans] == [place]


def test_rules_in_files_of_one_name_show_their_folders(namesakes) -> None:
    policy, _ = namesakes
    made = resolve(load(policy), open_source(TINY), emitters.FORMATS, target="mlx_affine")
    rules = {module.role: made.rule_of(module)[0] for module in made.modules}
    assert rules["norm"] == "a/base.qpol:3"
    assert rules["router"] == "b/base.qpol:3"
    place = next(made.rule_of(module)[1] for module in made.modules if module.role == "router")
    assert place is not None
    assert place["path"].endswith("b/base.qpol")
    assert (place["line"], place["column"]) == (3, 1)
    assert "b/base.qpol:3\n" in render_text(plan_blocks(made))


def test_a_shadowed_rule_names_the_winner_in_a_file_of_the_same_name(namesakes) -> None:
    policy, _ = namesakes
    policy.write_text('extends "../a/base.qpol"\nembed: 8bit\n', encoding="utf-8")
    made = resolve(load(policy), open_source(TINY), emitters.FORMATS, target="mlx_affine")
    (shadowed,) = [one for one in made.findings if one.code == "shadowed-rule"]
    assert "b/base.qpol:2" in shadowed.message


def test_defects_of_rules_in_files_of_one_name_are_two(namesakes) -> None:
    policy, _ = namesakes
    (policy.parents[1] / "a" / "base.qpol").write_text("target mlx_affine\nembed: 4bit g100\n")
    policy.write_text('extends "../a/base.qpol"\nlm_head: 4bit g100\n', encoding="utf-8")
    with pytest.raises(PolicyError) as caught:
        resolve(load(policy), open_source(TINY), emitters.FORMATS, target="mlx_affine")
    assert [one.code for one in caught.value.diagnostics] == ["unsupported-group-size"] * 2
