"""`verify --source` decides: values that are not those of the source are errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emitters.core.verify import VerifyReport, verify_bundle
from policy_dsl.sources.reference import open_source
from policyc.cli import main
from tests.emitters.core.small_checkpoints import (
    Tensors,
    llama_config,
    llama_tensors,
    mixtral_config,
    mixtral_tensors,
    write_folder,
    write_shard,
)

Damage = Callable[[Path], None]
SIZE = {"layers": 2, "hidden": 64, "inner": 128, "vocabulary": 96}
Q_PROJ = "model.layers.{}.self_attn.q_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two Llamas of the same shapes, a Mixtral, and an 8 bit bundle of each."""
    folder = tmp_path_factory.mktemp("values")
    tensors = llama_tensors(**SIZE)
    write_folder(folder / "llama", llama_config(**SIZE), tensors)
    other = {name: (dtype, np.roll(array, 7)) for name, (dtype, array) in tensors.items()}
    write_folder(folder / "other", llama_config(**SIZE), other)
    experts = mixtral_tensors(fused=False, inner=64)
    write_folder(folder / "mixtral", mixtral_config(inner=64), experts)
    policy = folder / "p.qpol"
    policy.write_text("target mlx_affine\nall: 8bit\n", encoding="utf-8")
    for name in ("llama", "mixtral"):
        made = ["build", str(policy), "--model", str(folder / name), "-q"]
        assert main([*made, "-o", str(folder / f"{name}-8bit")]) == 0
    return folder


@pytest.fixture
def verified(models: Path, tmp_path: Path) -> Callable[..., VerifyReport]:
    """The report on a damaged copy of a bundle, with or without its record."""

    def verify(
        damage: Damage, *, name: str = "llama", source: str = "", record: bool = False
    ) -> VerifyReport:
        folder = tmp_path / "bundle"
        shutil.copytree(models / f"{name}-8bit", folder)
        damage(folder / "model.safetensors")
        if not record:
            (folder / "policyc.json").unlink()
        return verify_bundle(folder, open_source(str(models / (source or name))), jobs=2)

    return verify


def found(report: VerifyReport) -> set[str]:
    return {one.code for one in report.findings} - {"no-record", "no-tokenizer"}


def tensors_of(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    held = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, stop = entry["data_offsets"]
            raw = np.frombuffer(content[start + first : start + stop], np.uint8).copy()
            held[name] = entry["dtype"], raw.reshape(*entry["shape"][:-1], -1)
    return held


def changed(change: Callable[[dict[str, np.ndarray]], None]) -> Damage:
    """A damage to the bytes of tensors, by name, in place; dtypes and shapes stay."""

    def damage(path: Path) -> None:
        held = tensors_of(path)
        change({name: array for name, (_, array) in held.items()})
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        for name, (_, array) in held.items():
            first, stop = header[name]["data_offsets"]
            content[start + first : start + stop] = array.tobytes()
        path.write_bytes(content)

    return damage


def swap(one: str, other: str) -> Damage:
    def change(held: dict[str, np.ndarray]) -> None:
        for part in ("weight", "scales", "biases"):
            first, second = held[f"{one}.{part}"], held[f"{other}.{part}"]
            first[:], second[:] = second.copy(), first.copy()

    return changed(change)


def test_an_untouched_bundle_is_right_with_and_without_its_record(verified) -> None:
    report = verified(lambda path: None, record=True)
    assert report.ok
    assert {one.judged_by for one in report.errors or ()} == {"equal", "coded again"}


def test_without_a_record_codes_must_be_the_nearest_ones(verified) -> None:
    report = verified(lambda path: None)
    assert report.ok
    assert {one.judged_by for one in report.errors or ()} == {"equal", "nearest codes"}


def test_swapped_layers(verified) -> None:
    report = verified(swap(Q_PROJ.format(0), Q_PROJ.format(1)))
    assert found(report) == {"unlike-source"}
    assert all(Q_PROJ.format(at) in str(report.findings) for at in (0, 1))


def test_swapped_query_and_output_of_one_shape(verified) -> None:
    report = verified(swap(Q_PROJ.format(0), "model.layers.0.self_attn.o_proj"))
    assert found(report) == {"unlike-source"}


def test_two_swapped_experts_of_a_stack(verified) -> None:
    def change(held: dict[str, np.ndarray]) -> None:
        for part in ("weight", "scales", "biases"):
            stack = held[f"model.layers.0.block_sparse_moe.switch_mlp.up_proj.{part}"]
            stack[[1, 2]] = stack[[2, 1]]

    report = verified(changed(change), name="mixtral")
    assert found(report) == {"unlike-source"}
    (finding,) = [one for one in report.findings if one.code == "unlike-source"]
    assert ["up_proj[1]" in finding.notes[0], "up_proj[2]" in finding.notes[1]] == [True, True]


def test_a_row_is_counted_within_the_matrix_that_is_named(verified) -> None:
    name = "model.layers.0.block_sparse_moe.switch_mlp.up_proj"

    def change(held: dict[str, np.ndarray]) -> None:
        held[f"{name}.weight"][2, 5, 4] ^= 1

    report = verified(changed(change), name="mixtral", record=True)
    (finding,) = [one for one in report.findings if one.code == "codes-differ"]
    place = "model.layers.0.block_sparse_moe.experts.2.w3.weight[5, 4]"
    assert finding.notes == (f"{name}[2]: 1 value, the first at row 5, column 4, of {place}",)


def test_a_norm_of_zeros(verified) -> None:
    report = verified(changed(lambda held: held["model.norm.weight"].fill(0)))
    assert found(report) == {"nothing-left"}


def test_one_bit_of_a_norm(verified) -> None:
    def change(held: dict[str, np.ndarray]) -> None:
        held["model.norm.weight"][0] ^= 1

    assert found(verified(changed(change))) == {"values-differ"}


@pytest.mark.parametrize(("bit", "codes"), [(0x80, {"codes-not-nearest"}), (1, set())])
def test_one_bit_of_a_code(verified, bit: int, codes: set[str]) -> None:
    """The lowest of 8 bits moves a value no farther than bfloat16 rounds scales."""

    def change(held: dict[str, np.ndarray]) -> None:
        weight = held[f"{Q_PROJ.format(1)}.weight"]
        weight.reshape(-1)[int(weight.reshape(-1).argmax())] ^= bit

    assert found(verified(changed(change))) == codes


def test_one_bit_of_a_code_with_a_record(verified) -> None:
    def change(held: dict[str, np.ndarray]) -> None:
        held[f"{Q_PROJ.format(1)}.weight"][3, 4] ^= 1

    report = verified(changed(change), record=True)
    assert found(report) == {"file-changed", "tensor-changed", "codes-differ"}
    (finding,) = [one for one in report.findings if one.code == "codes-differ"]
    assert "1 value of 1 tensor" in finding.message
    assert "row 3, column 4" in finding.notes[0]


@pytest.mark.parametrize("record", [True, False])
def test_another_model_of_the_same_shapes(verified, record: bool) -> None:
    report = verified(lambda path: None, source="other", record=record)
    assert found(report) == {"values-differ", "codes-differ" if record else "unlike-source"}


def test_a_source_that_the_record_does_not_name(models: Path, tmp_path: Path, verified) -> None:
    shutil.copytree(models / "llama", models / "again", dirs_exist_ok=True)
    config = json.loads((models / "llama" / "config.json").read_text())
    (models / "again" / "config.json").write_text(json.dumps({**config, "note": 1}))
    report = verified(lambda path: None, source="again", record=True)
    assert found(report) == {"other-source"}


def test_source_tensors_that_the_bundle_lacks_are_counted(verified) -> None:
    def damage(path: Path) -> None:
        kept: Tensors = {
            name: (dtype, array.view({"U32": "u4"}.get(dtype, "u2")))
            for name, (dtype, array) in tensors_of(path).items()
            if "layers.1.mlp.up" not in name and "layers.0.input" not in name
        }
        write_shard(path, kept)
        (path.parent / "model.safetensors.index.json").unlink()
        config = json.loads((path.parent / "config.json").read_text())
        for key in ("quantization", "quantization_config"):
            config[key].pop("model.layers.1.mlp.up_proj")
        (path.parent / "config.json").write_text(json.dumps(config))

    report = verified(damage)
    (finding,) = [one for one in report.findings if one.code == "source-tensors-missing"]
    assert "the bundle lacks 2 tensors of the source" in finding.message
    assert not report.ok


@pytest.mark.parametrize(
    ("bundle", "source"),
    [
        ("gptq_e2e/autoround_w4g128", "gptq_e2e/source_bf16"),
        ("gptq_e2e/autoround_w4g128_from_fp8", "gptq_e2e/source_fp8"),
        ("gptq_e2e/autoround_w4g32_mixed", "gptq_e2e/source_bf16"),
        ("mlx/tiny_minimax_fp8/expected", "mlx/tiny_minimax_fp8/source"),
    ],
)
def test_what_other_tools_round_is_within_its_bounds(bundle: str, source: str) -> None:
    golden = Path(__file__).parents[1] / "golden"
    report = verify_bundle(golden / bundle, open_source(str(golden / source)), jobs=1)
    assert {one.judged_by for one in report.errors or ()} == {"equal", "nearest codes"}
    assert [one for one in report.errors or () if one.wrong] == []
