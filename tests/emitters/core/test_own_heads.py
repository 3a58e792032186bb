"""Checkpoints with a head of their own whose config says that the embedding is the head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from small_checkpoints import Array, stored, widened

from emitters.core.build import build
from emitters.core.record import read_record
from policy_dsl import DOCUMENT_SCHEMAS
from policy_dsl.diagnostics import PolicyError
from policyc.cli import main

EIGHT_BITS = {
    "mlx_affine": "all: 8bit g32",
    "gptq": "all except embed, lm_head: 8bit g32",
    "hipfire_hfq": "all: q8",
}
TARGETS = list(EIGHT_BITS)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = dict[str, tuple[str, Array]]
Change = Callable[[Tensors], None]


def policy(target: str, *rules: str) -> str:
    lines = "".join(f"  {rule}\n" for rule in (EIGHT_BITS[target], *rules))
    return f"name: heads\ntarget: {target}\nrules: |\n{lines}"


def same(tensors: Tensors) -> None:
    """A copy of the embedding as the head, as Qwen1.5-0.5B has it."""
    tensors[HEAD] = tensors[EMBED]


def same_in_float32(tensors: Tensors) -> None:
    tensors[HEAD] = "F32", widened(tensors[EMBED][1].tobytes()).reshape(96, 64)


def same_in_fp8(tensors: Tensors) -> None:
    """Codes with scales, and the values that they stand for."""
    codes = np.random.default_rng(5).integers(0x20, 0x60, (96, 64)).astype(np.uint8)
    values = np.ldexp(1 + (codes & 7) / 8, (codes >> 3).astype(int) - 7).astype(np.float32)
    scales = np.ldexp(np.float32(1), np.arange(6).reshape(3, 2) - 4).astype(np.float32)
    tensors[HEAD] = "F8_E4M3", codes
    tensors["lm_head.weight_scale_inv"] = "F32", scales
    tensors[EMBED] = "F32", values * np.kron(scales, np.ones((32, 32), np.float32))


def other(tensors: Tensors) -> None:
    """A head that was trained apart."""


def other_by_one_value(tensors: Tensors) -> None:
    dtype, values = tensors[EMBED]
    tensors[HEAD] = dtype, values.copy()
    tensors[HEAD][1][95, 63] ^= 1


def other_sign_of_fp8(tensors: Tensors) -> None:
    same_in_fp8(tensors)
    tensors[HEAD][1][50, 3] ^= 0x80


@pytest.fixture
def write_tied(write_llama: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a small Llama with a head and a config that says it is tied."""

    def write(change: Change, *, name: str = "source", **keys: Any) -> Path:
        folder = write_llama(change, name=name)
        path = folder / "config.json"
        fp8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 32]}
        config = json.loads(path.read_text()) | {"tie_word_embeddings": True} | keys
        if "fp8" in change.__name__:
            config["quantization_config"] = fp8
        path.write_text(json.dumps(config))
        return folder

    return write


def verified(bundle: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, Any]:
    """The exit code of `verify --source`, and the codes of what it finds."""
    capsys.readouterr()
    code = main(["verify", str(bundle), "--source", str(source), "--format", "json"])
    return code, {found["code"] for found in json.loads(capsys.readouterr().out)["findings"]}


@pytest.mark.parametrize("change", [same, same_in_float32, same_in_fp8])
@pytest.mark.parametrize("target", TARGETS)
def test_an_equal_head_is_left_out_and_recorded(
    write_tied: Any, planned: Any, tmp_path: Path, capsys: Any, change: Change, target: str
) -> None:
    source = write_tied(change)
    plan, inventory = planned(source, policy(target))
    (found,) = [each for each in plan.findings if each.code == "tied-head-left-out"]
    nbytes = inventory.tensors[HEAD].nbytes
    assert f"lm_head.weight is left out ({nbytes / 1000:.2f} kB" in found.message
    build(plan, inventory, out=tmp_path / "out", jobs=1)
    record = json.loads((tmp_path / "out" / "policyc.json").read_text())
    jsonschema.validate(record, json.loads((DOCUMENT_SCHEMAS / "bundle.json").read_text()))
    (left_out,) = record["omitted"]
    assert (left_out["name"], left_out["equals"]) == (HEAD, EMBED)
    assert not any("lm_head" in row[0] for row in record["modules"]["rows"])
    assert verified(tmp_path / "out", source, capsys) == (0, set())


@pytest.mark.parametrize(
    ("change", "place"),
    [(other, "at [0, 0]"), (other_by_one_value, "at [95, 63]"), (other_sign_of_fp8, "[50, 3]")],
)
@pytest.mark.parametrize("target", TARGETS)
def test_another_head_stops_the_build_before_it_writes(
    write_tied: Any, planned: Any, tmp_path: Path, change: Change, place: str, target: str
) -> None:
    source = write_tied(change)
    plan, inventory = planned(source, policy(target))
    with pytest.raises(PolicyError) as caught:
        build(plan, inventory, out=tmp_path / "out", jobs=1)
    (found,) = caught.value.diagnostics
    assert found.code == "head-differs"
    assert place in found.message
    assert found.suggestion == 'write "lm_head: keep" to store it, or "lm_head: drop"'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.yaml", "source"]


@pytest.mark.parametrize("named", ["lm_head", '"lm_head.weight"', "/lm_head.*/"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_rule_that_names_the_head_stores_it(
    write_tied: Any, planned: Any, tmp_path: Path, capsys: Any, named: str, target: str
) -> None:
    source = write_tied(other)
    plan, inventory = planned(source, policy(target, f"{named}: keep"))
    assert [each.code for each in plan.findings if "head" in each.code] == []
    assert not plan.omitted
    assert plan.remarks[0][0] == "head"
    out = tmp_path / "out"
    build(plan, inventory, out=out, jobs=1)
    record = read_record(out)
    assert record is not None
    assert record.modules["lm_head"].role == "lm_head"
    assert verified(out, source, capsys) == (0, set())
    if target != "hipfire_hfq":
        config = json.loads((out / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        given = json.loads((source / "config.json").read_text())
        assert stored(out)[HEAD][2] == stored(source)[HEAD][2]
        assert given["tie_word_embeddings"] is True
    else:
        # The container holds the config as one text.
        (container,) = (path for path in out.iterdir() if path.suffix not in (".json", ""))
        assert b'"tie_word_embeddings":false' in container.read_bytes()


@pytest.mark.parametrize("target", TARGETS)
def test_a_dropped_head_is_not_compared(
    write_tied: Any, planned: Any, tmp_path: Path, capsys: Any, target: str
) -> None:
    source = write_tied(other)
    plan, inventory = planned(source, policy(target, "lm_head: drop"))
    assert [each.code for each in plan.findings if "head" in each.code] == []
    build(plan, inventory, out=tmp_path / "out", jobs=1)
    assert verified(tmp_path / "out", source, capsys) == (0, set())
    (omitted,) = json.loads((tmp_path / "out" / "policyc.json").read_text())["omitted"]
    assert "equals" not in omitted


def test_a_bundle_without_a_record_is_held_against_the_head_too(
    write_tied: Any, planned: Any, tmp_path: Path, capsys: Any
) -> None:
    plan, inventory = planned(write_tied(same), policy("mlx_affine"))
    build(plan, inventory, out=tmp_path / "out", jobs=1)
    (tmp_path / "out" / "policyc.json").unlink()
    source = write_tied(other_by_one_value, name="other")
    code, found = verified(tmp_path / "out", source, capsys)
    assert (code, "head-differs" in found) == (1, True)


def test_a_rule_that_only_covers_the_head_does_not_store_it(write_tied: Any, planned: Any) -> None:
    source = write_tied(same)
    for selector in ("all", '"*.weight"', "/.*/", "all except norm"):
        plan, _ = planned(source, policy("mlx_affine", f"{selector}: 4bit g32"))
        assert [one.tensor.name for one in plan.omitted] == [HEAD]
    # An earlier rule that names it decides nothing.
    plan, _ = planned(source, policy("mlx_affine", "lm_head: keep", "all: 4bit g32"))
    assert {one.code for one in plan.findings} == {"tied-head-left-out", "shadowed-rule"}


@pytest.mark.parametrize("silent", [{"tie_word_embeddings": None}, {}])
def test_a_llama_whose_config_does_not_say_tied_keeps_its_head(
    write_llama: Callable[..., Path], planned: Any, silent: dict[str, None]
) -> None:
    folder = write_llama(other)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("tie_word_embeddings", None)
    path.write_text(json.dumps(config | silent))
    plan, _ = planned(folder, policy("mlx_affine"))
    assert "lm_head" in [module.name for module in plan.modules]
    assert not plan.omitted
