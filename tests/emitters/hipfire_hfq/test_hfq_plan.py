"""Policy text in, plan out, for HFQ files: schemes, sizes, refusals, and what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import mixtral_config, mixtral_tensors, write_folder

from emitters import FORMATS
from emitters.core.build import build
from policy_dsl.diagnostics import PolicyError
from policy_dsl.inventory import Inventory
from policy_dsl.language.load import load, parse_policy
from policy_dsl.plan import Module, Plan
from policy_dsl.planning.decisions import explain
from policy_dsl.planning.resolve import resolve
from policy_dsl.sources.reference import open_source
from policy_dsl.treatments import describe
from policyc.reports import render_text
from policyc.reports.plan_report import explain_blocks, explain_document, plan_blocks
from tests.models import minimax, tiny

MOE = "model.layers.3.block_sparse_moe"
USUAL = """\
experts: mq4
experts.gate_proj, experts.up_proj: 2bit by awq
attention, embed, lm_head, router: q8
norm, router_bias: f16
"""
# Every byte but the metadata's JSON, which holds the tokenizer.
PUBLISHED = {
    "hipfire_mq4": (123_626_274_734, "model.mq4"),
    "hipfire_mq3_lloyd": (109_583_744_942, "model.mq3-lloyd"),
    "hipfire_mq3": (102_562_480_046, "model.mq3"),
    "hipfire_mq2_lloyd": (86_179_528_622, "model.mq2-lloyd"),
    "hipfire_mq2": (79_158_263_726, "model.mq2"),
}


def planned(text: str, inventory: Inventory | None = None, **statistics: str) -> Plan:
    policy, _ = parse_policy(text, "p.qpol")
    model = inventory or tiny()
    return resolve(policy, model, FORMATS, target="hipfire_hfq", statistics=statistics)


def module(plan: Plan, name: str) -> Module:
    (found,) = [one for one in plan.modules if one.name == name]
    return found


def errors_of(text: str, inventory: Inventory | None = None) -> list[tuple[str, str]]:
    with pytest.raises(PolicyError) as caught:
        planned(text, inventory)
    found = caught.value.diagnostics
    return [(one.code, one.message) for one in found if one.severity == "error"]


@pytest.mark.parametrize(
    ("text", "role", "treatment"),
    [
        ("experts: 2bit", "experts.down_proj", "2bit mq2-lloyd g256"),
        ("experts: 3bit", "experts.gate_proj", "3bit mq3-lloyd g256"),
        ("experts: 4bit", "experts.up_proj", "4bit mq4 g256"),
        ("experts: 6bit", "experts.up_proj", "6bit mq6 g256"),
        ("experts: mq4", "experts.up_proj", "4bit mq4 g256"),
        ("attention: 8bit", "attention.q_proj", "8bit q8 g32"),
        ("attention: hfq4", "attention.q_proj", "4bit hfq4 g256"),
        ("attention: hfq4 g128", "attention.q_proj", "4bit hfq4 g128"),
        ("attention: 3bit mq3", "attention.q_proj", "3bit mq3 g256"),
        ("lm_head: f16", "lm_head", "f16"),
        ("norm: f32", "norm", "f32"),
        ("router_bias: f32", "router_bias", "f32"),
    ],
)
def test_gaps_are_filled_by_width(text: str, role: str, treatment: str) -> None:
    plan = planned(USUAL + "experts.gate_proj, experts.up_proj: mq4\n" + text)
    assert {describe(one.treatment) for one in plan.modules if one.role == role} == {treatment}


@pytest.mark.parametrize(
    ("text", "code", "told"),
    [
        ("router: f16", "unsupported-treatment", "garbage from routers that are not q8"),
        ("router: mq4", "unsupported-treatment", "garbage from routers that are not q8"),
        ("router: keep", "unsupported-treatment", "garbage from routers that are not q8"),
        ("embed: mq4", "unsupported-treatment", "looks rows up as q8"),
        ("embed: f16", "unsupported-treatment", "looks rows up as q8"),
        ("experts: hfq4", "unsupported-treatment", "kernels for experts are mq4, mq6"),
        ("experts: 2bit mq2", "unsupported-treatment", "kernels for experts are mq4, mq6"),
        ("experts: q8", "unsupported-treatment", "kernels for experts are mq4, mq6"),
        ("experts: keep", "unsupported-treatment", "kernels for experts are mq4, mq6"),
        ("experts.down_proj: mq4 by awq", "unsupported-treatment", "AWQ for gate and up"),
        ("attention: mq4 by awq", "unsupported-treatment", "AWQ for gate and up"),
        ("lm_head: f32", "unsupported-treatment", "refuse float32 matrices"),
        ("attention: bf16", "unsupported-dtype", "it stores f16, f32"),
        ("lm_head: raw", "raw-unreadable", "BF16"),
        ("attention: 5bit", "unsupported-bits", ""),
        ("attention: mq4 g128", "unsupported-group-size", ""),
        ("attention: 4bit hfq4 by awq", "unsupported-method", ""),
        ("attention: 4bit affine", "foreign-scheme", "mlx_affine"),
        ("norm: q8", "not-a-matrix", ""),
        ("experts[0-3]: mq6", "mixed-stack", ""),
        ("experts.gate_proj: 3bit", "conflict", "gate and up of a layer must be stored alike"),
        ("experts.up_proj: 2bit", "conflict", "(layer 0 and 5 more)"),
        ("experts.up_proj in layers 4-5: mq4", "conflict", "(layer 4 and 1 more)"),
    ],
)
def test_what_loaders_would_misread_is_an_error(text: str, code: str, told: str) -> None:
    found = errors_of(USUAL + text)
    assert {one for one, _ in found} == {code}
    assert told in found[0][1]


def test_layers_may_differ() -> None:
    plan = planned(USUAL + "experts in layers 4-5: mq6; attention in layers 0-1: mq4")
    assert describe(module(plan, f"{MOE}.experts.7.w2").treatment) == "4bit mq4 g256"
    other = f"{MOE}.experts.7.w2".replace(".3.", ".4.")
    assert describe(module(plan, other).treatment) == "6bit mq6 g256"


def test_rotated_rows_are_whole_blocks(write_llama) -> None:
    llama = open_source(str(write_llama(hidden=384)))
    assert {code for code, _ in errors_of("all: mq4", llama)} == {"group-does-not-divide"}
    plan = planned("all: hfq6; embed: q8; norm: f16", llama)
    assert {one.together for one in plan.modules if one.role == "lm_head"} == {2}
    (refusal,) = plan.refusals
    assert refusal.reason.endswith("are not whole blocks of 256 values")


def test_a_family_without_known_rules_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "mixtral"
    write_folder(folder, mixtral_config(inner=256), mixtral_tensors(fused=False, inner=256))
    (found,) = errors_of("all: q8", open_source(str(folder)))
    reason = "family mixtral: its tensor rules in HFQ files are not known"
    assert found == ("unsupported-family", f"hipfire_hfq does not take {reason}")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name != "hipfire_mq4"]


@pytest.mark.parametrize("policy", ["hipfire_mq4", *SLOW])
def test_the_real_model_has_the_published_sizes(policy: str) -> None:
    plan = resolve(load(policy), minimax(), FORMATS)
    nbytes, name = PUBLISHED[policy]
    (file,) = [one for one in plan.files if one.least]
    assert (file.name, file.nbytes, file.least) == (name, None, nbytes)
    assert sum(len(one.tensors) for one in plan.modules) == 48_301
    assert plan.findings == ()
    assert plan.refusals == ()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", "model.mq2-lloyd"),
        ("experts.down_proj: 3bit", "model.mq2"),
        ("experts.down_proj: 2bit", "model.hfq"),
        ("experts in layers 4-5: mq4", "model.hfq"),
        ("experts: mq6", "model.hfq"),
        ('output file_name "mine.hfq"', "mine.hfq"),
    ],
)
def test_a_file_is_called_after_its_tier(text: str, name: str) -> None:
    assert [file.name for file in planned(USUAL + text).tensor_files] == [name]


@pytest.mark.parametrize(
    "name",
    [
        *("a/b.hfq", "/tmp/b.hfq", "../b.hfq", "a\\b.hfq", ".hidden", ".."),
        *("policyc.json", "POLICYC.JSON"),
        *("config.json", "model.safetensors", "a.py", " a.hfq", "a.hfq ", "a\u200bb"),
        "x" * 256,
    ],
)
def test_a_file_has_a_plain_visible_name_of_its_own(name: str) -> None:
    written = name.replace("\\", "\\\\")
    (found,) = errors_of(f'output file_name "{written}"\n{USUAL}')
    assert found[0] == "bad-file-name"
    shown = name.replace("\u200b", "\\u200b")
    assert found[1].startswith(f'the file cannot be called "{shown}": ')


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "COPYING"])
def test_a_file_has_no_name_of_what_the_bundle_copies(name: str) -> None:
    with pytest.raises(PolicyError, match="bad-file-name") as caught:
        planned(f'output file_name "{name}"\n{USUAL}')
    assert caught.value.diagnostics[0].span is not None


def test_a_plan_needs_no_statistics_and_a_build_does(tmp_path: Path) -> None:
    plan = planned(USUAL)
    (cure,) = plan.pending
    assert cure.startswith("an importance matrix: run llama.cpp's llama-imatrix")
    assert f"Needed before a build\n  {cure}" in render_text(plan_blocks(plan))
    with pytest.raises(PolicyError) as caught:
        build(plan, tiny(), out=tmp_path / "out")
    (found,) = caught.value.diagnostics
    assert found.code == "pending-statistics"
    wanted = f"the build needs statistics that are not there: {cure}"
    assert found.message == wanted
    assert list(tmp_path.iterdir()) == []


def test_without_awq_nothing_is_needed() -> None:
    plan = planned(USUAL + "experts: mq4")
    assert (plan.pending, plan.statistics, plan.remarks) == ((), (), ())
    assert not any(one.role == "awq_scale" for one in plan.modules)


def test_what_is_given_counts_more_than_what_is_written() -> None:
    text = 'calibration imatrix "written.gguf"\n' + USUAL
    (written,) = planned(text).statistics
    (given,) = planned(text, imatrix="given.gguf").statistics
    assert (written.path, written.span is None) == ("written.gguf", False)
    assert (given.path, given.span) == ("given.gguf", None)
    assert planned(text).pending == ()
    assert "imatrix  given.gguf" in render_text(plan_blocks(planned(text, imatrix="given.gguf")))


@pytest.mark.parametrize(
    ("text", "given"), [("", {"imatrix": "x.gguf"}), ('calibration imatrix "x.gguf"\n', {})]
)
def test_statistics_that_nothing_needs_are_told(text: str, given: dict[str, str]) -> None:
    found = planned(f"{text}{USUAL}experts: mq4", **given).findings
    (told,) = [one.message for one in found if one.code == "unused-statistics"]
    assert told == "no treatment of this plan needs imatrix: x.gguf is not read"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "alpha 0.55, gate and up share a scale, applied by the float16 values"),
        ("calibration awq_alpha 0.5", "alpha 0.5, gate"),
        ("calibration awq_scales upstream", "before they are rounded to what is stored"),
    ],
)
def test_a_plan_says_how_scales_are_made(text: str, told: str) -> None:
    ((key, value),) = planned(f"{text}\n{USUAL}").remarks
    assert key == "awq"
    assert told in value


def test_a_layer_has_one_scale_and_it_is_explained() -> None:
    plan = planned(USUAL)
    scales = [one for one in plan.modules if one.role == "awq_scale"]
    assert [one.layer for one in scales] == list(range(6))
    assert {(one.parameters, one.shape, one.dtype) for one in scales} == {(0, (256,), "F16")}
    found = explain(plan, f"{MOE}.awq_scale_gate_up.weight")
    assert found.alike == tuple(scales)
    assert "from no tensor of the source" in render_text(explain_blocks(found, plan))
    assert explain_document(found, plan)["rule"] == "p.qpol:2"


def test_kernels_for_eight_experts_are_warned_about() -> None:
    """The embedded model routes to two; Lloyd's kernels take any number."""
    text = f"runtime hipfire\n{USUAL}"
    # The target has no other reader: it need not be named.
    for rules in (text, USUAL):
        (told,) = [one for one in planned(rules).findings if one.code == "runtime-refuses"]
        assert "its mq4 kernels route to 8 experts, this model to 2" in told.message
    plan = planned(text + "experts.down_proj: 3bit")
    assert plan.refusals == ()


def test_tensors_stand_in_the_order_of_their_names() -> None:
    plan = planned(USUAL)
    places = {one.name: one.start for module in plan.modules for one in module.tensors}
    order = sorted(places, key=lambda name: places[name])
    scales = [name for name in order if "awq_scale" in name]
    rest = [name for name in order if name not in scales]
    assert rest == sorted(rest)
    for name in scales:
        # Where it is needed first.
        following = order[order.index(name) + 1]
        assert following == name.replace("awq_scale_gate_up", "experts.0.w1")
