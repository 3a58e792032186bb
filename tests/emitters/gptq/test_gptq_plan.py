"""Plans of the target: published sizes of MiniMax-M2.7, and what a policy's words become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from policyc.cli import main

# Bytes of tensors and headers of the published pruned checkpoint, in 23 shards.
PUBLISHED = 91_512_175_232


def test_the_pruned_model_is_as_large_as_the_published_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "reap_w4a16", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["model"]["parameters"] == 172_507_452_032
    assert plan["totals"]["tensor_nbytes"] == 91_498_201_600
    assert plan["totals"]["tensors"] == 108_255
    shards = [file["nbytes"] for file in plan["files"] if file["kind"] == "tensors"]
    assert len(shards) == 23
    assert abs(sum(shards) / PUBLISHED - 1) < 1e-5
    assert max(shards) < 4_000_000_000 + 1_000_000
    # Nobody has ranked the experts yet.
    assert any("--saliency" in cure for cure in plan["pending"])


def test_every_linear_of_the_whole_model_is_packed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "w4a16", "--model", "MiniMaxAI/MiniMax-M2.7", "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["totals"]["tensors"] == 143_967
    packed = {role["role"]: role["bpw"] for role in plan["roles"]}
    for role, bpw in packed.items():
        if role.startswith(("experts", "attention")):
            assert bpw == 4.15625
    assert plan["pending"] == []


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ("embed: 4bit", "unsupported-treatment"),
        ("router: 4bit", "unsupported-treatment"),
        ("all: 4bit g96", "unsupported-group-size"),
        ("all: 4bit by gptq", "unsupported-method"),
        ("all: 5bit", "unsupported-bits"),
        ("all: 4bit asym by opt-rtn", "unsupported-treatment"),
        ("attention: 4bit int\nexperts: 4bit int-v2", "conflict"),
    ],
)
def test_what_no_reader_takes_is_an_error(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rule: str, code: str
) -> None:
    policy = tmp_path / "p.qpol"
    policy.write_text(f"target gptq\n{rule}\n")
    assert main(["plan", str(policy), "--model", str(demo)]) == 2
    assert f"error[{code}]" in capsys.readouterr().err


def test_a_policy_that_names_vllm_is_held_to_it(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "p.qpol"
    rules = "all: 4bit int\nexperts.down_proj: 8bit int\nembed, lm_head: keep\n"
    policy.write_text(f"target gptq\n{rules}")
    assert main(["plan", str(policy), "--model", str(demo)]) == 0
    assert "vllm" in capsys.readouterr().out
    policy.write_text(f"target gptq\nruntime vllm\n{rules}")
    for command, code in (("plan", 2), ("check", 1)):
        assert main([command, str(policy), "--model", str(demo)]) == code
        told = capsys.readouterr()
        assert "error[runtime-cannot]: vllm cannot hold this" in told.out + told.err
        assert "p.qpol:2" in told.out + told.err
