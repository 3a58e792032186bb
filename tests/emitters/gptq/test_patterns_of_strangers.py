"""Folders whose config.json has patterns of a stranger: what verify and others make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[3]
LAYER = "model.layers.0.self_attn"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
COMMANDS = {
    "verify": lambda folder: ["verify", folder],
    "inspect": lambda folder: ["inspect", folder],
    "diff": lambda folder: ["diff", folder, folder],
}


def bundle(folder: Path, names: list[str], **quantization: object) -> str:
    config = {"model_type": "llama", "quantization_config": {**GPTQ, **quantization}}
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors[f"{name}.qweight"] = np.zeros((8, 64), np.int32)
        tensors[f"{name}.qzeros"] = np.full((2, 8), 0x77777777, np.int32)
        tensors[f"{name}.scales"] = np.ones((2, 64), np.float16)
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def policyc(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "policyc", *arguments]
    return subprocess.run(
        command, cwd=ROOT, timeout=60, check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "pattern", ["+:(a+)+$", "+:(.|.)+$", f"+:{'.?' * 60}Z", "+:(a|aa)*Z", f"+:{'.*' * 40}Z"]
)
def test_no_pattern_takes_exponential_time(command: str, pattern: str, tmp_path: Path):
    folder = bundle(tmp_path, ["a" * 60 + "b", "b" * 900], dynamic={pattern: {}})
    run = policyc(*COMMANDS[command](folder))
    assert "Traceback" not in run.stderr
    assert run.returncode in (0, 1)


@pytest.mark.parametrize(("command", "code"), [("verify", 1), ("inspect", 2), ("diff", 2)])
def test_a_pattern_that_is_not_read_is_one_finding(command: str, code: int, tmp_path: Path):
    rules = {r"+:.*\.v_proj$": {"bits": 8}, "-:^(?!.*experts).*$": {}, r"-:(.)\1": {}}
    names = [f"{LAYER}.{last}_proj" for last in "qkv"]
    folder = bundle(tmp_path, names, dynamic=rules)
    run = policyc(*COMMANDS[command](folder))
    text = run.stdout + run.stderr
    assert run.returncode == code
    assert text.count("[unknown-pattern]") == 1
    assert "how 2 modules are stored depends on a pattern that is not read" in text
    assert f"not known: {LAYER}.k_proj, {LAYER}.q_proj\n" in text


def test_inspect_shows_what_is_known_beside_what_is_not(tmp_path: Path):
    rules = {r"+:.*\.v_proj$": {"sym": False}, "-:^(?!.*experts).*$": {}}
    folder = bundle(tmp_path, [f"{LAYER}.{last}_proj" for last in "qkv"], dynamic=rules)
    shown = json.loads(policyc("inspect", folder, "--format", "json").stdout)
    treatments = {group["role"]: group["treatment"] for group in shown["groups"]}
    name = "model.layers.{}.self_attn"
    assert treatments[f"{name}.q_proj"] == treatments[f"{name}.k_proj"] == "unknown"
    assert treatments[f"{name}.v_proj"] == "4bit int g32 asym"
    assert shown["bpw"] is None


def test_what_takes_too_long_is_refused_in_words(tmp_path: Path):
    long = {f"+:{at}{'(.?|a)' * 90}(.*e.{{1,40}}){{9}}z": {} for at in range(3_000)}
    run = policyc("verify", bundle(tmp_path, [f"{LAYER}.q_proj"], dynamic=long))
    assert run.returncode == 2
    assert "gptq does not read it: its patterns have more than 1,048,576" in run.stderr
