"""Pruning as the command line shows it: what was pruned, by which file, and what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from policy_dsl.planning.pruning import highest
from policy_dsl.sources.saliency import ModelShape, read_saliency
from policyc.cli import main
from tests.models import REAP, TINY

ROOT = Path(__file__).parents[3]
MLX = "target mlx_affine\nprune experts to 6 by reap\nall: 4bit g32\n"
# Its output tensors are called like those of the source.
HFQ = "target hipfire_hfq\nprune experts to 6 by reap\nall, router: q8\nexperts: mq4\n"
FIRST = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs a command on a policy's text; exit code, stdout, stderr."""

    def command(name: str, *arguments: object, text: str = MLX) -> tuple[int, str, str]:
        policy = tmp_path / "p.qpol"
        policy.write_text(text, encoding="utf-8")
        typed = [name, policy, *arguments, "--model", TINY]
        code = main([str(one) for one in typed])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def document(out: str) -> Any:
    """The document in a command's output, held against its schema."""
    found = json.loads(out)
    path = ROOT / "policy_dsl" / "document_schemas" / f"{found['kind']}.json"
    jsonschema.validate(found, json.loads(path.read_text(encoding="utf-8")))
    return found


def test_a_plan_says_what_is_pruned_in_few_lines(run: Any) -> None:
    code, out, _ = run("plan", "--saliency", REAP)
    assert code == 0
    assert "(minimax_m2, 6 layers, 6 experts a layer)" in out
    assert "pruned    8 -> 6 experts in 6 layers by reap\n" in out
    assert f"saliency  {REAP}\n" in out
    assert out.count("pruned: 6 of 8 experts stay, by reap") == 3
    assert "experts.up_proj: 12 tensors, 786.62 kB" in out
    assert "Needed before a build" not in out


def test_a_plan_without_saliencies_says_what_it_needs(run: Any) -> None:
    _, out, _ = run("plan")
    assert "by reap; not ranked yet, so planned with the first of each layer\n" in out
    assert "Needed before a build\n  a ranking of the experts" in out
    assert "not known  size of policyc.json" in out
    code, _, err = run("build", "-o", "never")
    assert code == 2
    assert "pending-statistics" in err


def test_the_document_of_a_plan_has_the_old_numbers(run: Any) -> None:
    found = document(run("plan", "--saliency", REAP, "--format", "json")[1])
    (transform,) = found["transforms"]
    assert transform["kept"]["5"] == [1, 2, 3, 5, 6, 7]
    assert (transform["by"], transform["before"], transform["to"]) == ("reap", 8, 6)
    assert found["model"]["experts"] == 6
    assert found["model"]["parameters"] == sum(role["parameters"] for role in found["roles"])
    assert len(found["dropped"]) == 36
    assert found["statistics"] == {"saliency": str(REAP)}
    unknown = document(run("plan", "--format", "json")[1])
    assert unknown["transforms"][0]["kept"] is None
    assert len(unknown["pending"]) == 1


@pytest.mark.parametrize(
    ("text", "name", "expert", "source_expert", "told"),
    [
        (MLX, f"{FIRST}.6.w1.weight", 4, 6, "expert 4, 6 in the source"),
        (MLX, f"{FIRST}.4.w1.weight", None, 4, "expert 4 of the source"),
        (MLX, f"{FIRST}.4.w1.weight_scale_inv", None, 4, "left out  pruned: 6 of 8"),
        (MLX, "model.layers.0.block_sparse_moe.switch_mlp.up_proj", None, None, "6x256x256"),
        (HFQ, f"{FIRST}.6.w1.weight", 4, 6, "expert 4, 6 in the source"),
        (HFQ, f"{FIRST}.4.w1", 4, 6, "expert 4, 6 in the source"),
        (HFQ, f"{FIRST}.4.w1.weight", 4, 6, "is of its expert 4, which is pruned"),
        (HFQ, "*layers.1.*.experts.1.w1.weight", 1, 2, "its expert 1, which is pruned"),
        (HFQ, "*layers.1.*.experts.2.w1.weight", 2, 3, "its expert 2, now expert 1"),
    ],
)
def test_explanations_tell_the_old_number_and_the_new_one(
    run: Any, text: str, name: str, expert: int | None, source_expert: int | None, told: str
) -> None:
    code, out, _ = run("explain", name, "--saliency", REAP, text=text)
    assert code == 0
    assert told in out
    out = run("explain", name, "--saliency", REAP, "--format", "json", text=text)[1]
    found = document(out)
    assert (found["expert"], found["source_expert"]) == (expert, source_expert)
    assert (found["left_out"] is None) == (".4." not in name or text == HFQ)


def test_without_a_ranking_nothing_is_told_for_sure(run: Any, tmp_path: Path) -> None:
    how = "by reap; not ranked yet, so planned with the first of each layer"
    unranked = f"8 -> 6 experts in 6 layers {how}"
    for name in (f"{FIRST}.1.w1.weight", f"{FIRST}.7.w1.weight"):
        assert unranked in run("explain", name)[1]
        assert unranked not in run("explain", name, "--saliency", REAP)[1]
    found = document(run("explain", f"{FIRST}.7.w1.weight", "--format", "json")[1])
    assert found["left_out"] == "pruned: 6 of 8 experts stay, by reap (not ranked yet)"
    whole = tmp_path / "whole.qpol"
    whole.write_text("target mlx_affine\nall: 4bit g32\n", encoding="utf-8")
    assert unranked in run("diff", whole)[1]


def test_a_difference_says_that_experts_were_pruned(run: Any, tmp_path: Path) -> None:
    whole = tmp_path / "whole.qpol"
    whole.write_text("target mlx_affine\nall: 4bit g32\n", encoding="utf-8")
    code, out, _ = run("diff", whole, "--saliency", REAP, "--exit-code")
    assert code == 1
    assert ", 8 -> 6 experts in 6 layers by reap\n" in out
    assert "experts  6 -> 8 a layer" in out
    found = document(run("diff", whole, "--saliency", REAP, "--format", "json")[1])
    assert found["experts"] == "6 -> 8 a layer"
    assert (found["a"]["experts"], found["b"]["experts"]) == (6, 8)


def test_a_difference_knows_other_experts_of_the_same_count(run: Any, tmp_path: Path) -> None:
    saved, other = tmp_path / "saved.json", tmp_path / "other.qpol"
    assert run("plan", "--saliency", REAP, "--save", saved)[0] == 0
    other.write_text(MLX.replace("to 6 by reap", "keep 0-3,6-7"), encoding="utf-8")
    code, out, _ = run("diff", saved, "--exit-code")
    # Nobody chose them yet: nothing is known to differ.
    assert code == 0
    code, out, _ = run("diff", other, "--saliency", REAP, "--exit-code")
    assert code == 1
    assert "experts  6 a layer, not the same ones in layers 1-5\n" in out
    assert "no tensor is treated differently" not in out
    assert run("diff", saved, "--saliency", REAP, "--exit-code")[0] == 0


def test_nothing_is_said_of_experts_that_nobody_knows(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    assert run("build", "--saliency", REAP, "-o", known, "-q")[0] == 0
    shutil.copytree(known, unknown)
    (unknown / "policyc.json").unlink()
    for sides in ((known, unknown), (unknown, known)):
        assert main(["diff", *map(str, sides), "--format", "json"]) == 0
        assert document(capsys.readouterr().out)["experts"] is None
    assert main(["verify", str(unknown), "--source", str(TINY)]) == 1
    # No module was compared, so there is nothing to put into tables.
    assert "relative error" not in capsys.readouterr().out


def test_a_bundle_is_inspected_and_compared_with_its_policy(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    assert run("build", "--saliency", REAP, "-o", out, "-q")[0] == 0
    assert run("diff", out, "--saliency", REAP, "--exit-code")[0] == 0
    assert main(["inspect", str(out)]) == 0
    assert main(["verify", str(out), "--source", str(TINY), "-q"]) == 0


def test_inspecting_tells_what_was_pruned(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("build", "--saliency", REAP, "-o", tmp_path / "out", "-q")[0] == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "pruned   8 -> 6 experts in 6 layers by reap\n" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "out"), "--format", "json"]) == 0
    (transform,) = document(capsys.readouterr().out)["transforms"]
    assert transform["kept"]["0"] == [0, 1, 2, 3, 6, 7]


@pytest.mark.parametrize("command", ["check", "plan", "explain", "build", "diff"])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no", "it is not safetensors, and it is not JSON"),
        (b'{"raep": []}', 'did you mean "raep"?'),
        (b'{"reap": [[1, 2, 3]]}', "it has 1 layers, the model has 6"),
        (b'{"reap": {"0": [1, 1, 1, 1, 1, 1, NaN, 1]}}', "expert 6 of layer 0 has nan"),
    ],
)
@pytest.mark.parametrize("written", [False, True], ids=["option", "policy"])
def test_a_bad_file_is_an_error_with_its_place(
    run: Any, tmp_path: Path, command: str, content: bytes, told: str, *, written: bool
) -> None:
    path = tmp_path / "ranks.json"
    path.write_bytes(content)
    more = {"explain": ["lm_head.weight"], "diff": ["mlx_4bit"]}.get(command, [])
    if written:
        # Looked for beside the policy.
        code, out, err = run(command, *more, text=f'{MLX}calibration saliency "ranks.json"\n')
    else:
        code, out, err = run(command, *more, "--saliency", path)
    assert code == (1 if command == "check" else 2)
    assert told in out + err
    assert ("p.qpol:4:" in out + err) == written
    assert "Traceback" not in out + err


def test_a_policy_is_planned_without_the_file_that_it_names(run: Any, tmp_path: Path) -> None:
    text = f'{MLX}calibration saliency "ranks.json"\n'
    code, out, _ = run("plan", text=text)
    assert code == 0
    assert "ranks.json, which the policy names, is not here" in out
    code, _, err = run("build", "-o", tmp_path / "out", text=text)
    assert code == 2
    assert "error[pending-statistics]" in err
    # What the command line names is meant to be there.
    code, _, err = run("plan", "--saliency", "ranks.json", text=text)
    assert code == 2
    assert "cannot read ranks.json" in err


def test_check_finds_what_cannot_be_pruned(run: Any) -> None:
    code, out, _ = run("check", text=MLX.replace("to 6", "to 1"))
    assert code == 1
    assert "[prune-below-routed]: experts cannot be pruned to 1: num_experts_per_tok" in out
    assert "p.qpol:2:1" in out
    assert run("check", "--saliency", REAP)[0] == 0


def test_a_ranking_beside_policies_that_ask_for_none(run: Any) -> None:
    text = "target mlx_affine\nall: 4bit g32"
    code, out, _ = run("plan", "--saliency", "gone.json", text=text)
    assert code == 0
    assert "warning[unused-statistics]" in out


def test_the_page_shows_policies_and_files_that_work(run: Any, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8")
    (policy,) = re.findall(r"```qpol\n(.*?)```", page, re.S)
    assert run("plan", text=policy.replace("192", "6"))[0] == 0
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.S)
    schema = json.loads((ROOT / "policy_dsl/document_schemas/saliency.json").read_text())
    jsonschema.validate(json.loads(shown), schema)
    path = tmp_path / "shown.json"
    path.write_text(shown, encoding="utf-8")
    shape = ModelShape((0, 1), 2, 4)
    assert read_saliency(path, "keep").kept(shape, 3) == {0: (0, 2, 3), 1: (0, 1, 2)}
    # The example says the same twice.
    ranks = read_saliency(path, "reap").ranks(shape)
    best = {layer: highest(row, 3) for layer, row in ranks.items()}
    assert best == read_saliency(path, "keep").kept(shape, 3)
