"""HFQ files as sources: found by their first bytes, shown, and never planned from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from policy_dsl.diagnostics import PolicyError
from policy_dsl.roles.classify import classify
from policy_dsl.roles.quantization import quantization_of
from policy_dsl.sources.recorded import write_recorded
from policy_dsl.sources.reference import open_source
from policyc.cli import main

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "hipfire"
MINIMAX = GOLDEN / "tiny-minimax.mq2-lloyd"
LLAMA = GOLDEN / "tiny-llama.mq4"
SCHEMA = ROOT / "policy_dsl" / "document_schemas" / "inspect.json"
Bytes = Callable[..., bytes]
Shown = Callable[..., str]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Shown:
    """(*arguments, code=0) -> what a command prints to stdout, or to stderr if it fails."""

    def command(*arguments: object, code: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return command


def refused(reference: Path) -> list[str]:
    """`code: message` of every defect of a source."""
    with pytest.raises(PolicyError) as caught:
        open_source(str(reference))
    return [f"{found.code}: {found.message}" for found in caught.value.diagnostics]


def test_a_file_is_a_model() -> None:
    found = open_source(str(MINIMAX))
    assert found.id == "tiny-minimax"
    assert found.config["num_local_experts"] == 12
    assert found.file_nbytes == {MINIMAX.name: MINIMAX.stat().st_size}
    assert found.root == GOLDEN
    w1 = found.tensors["model.layers.0.block_sparse_moe.experts.3.w1.weight"]
    assert (w1.dtype, w1.shape, w1.nbytes) == ("MQ2G256Lloyd", (256, 256), 18432)
    assert {info.dtype for info in found.tensors.values()} == {
        "MQ2G256Lloyd",
        "MQ4G256",
        "Q8F16",
        "F16",
    }
    assert found.side_files is not None
    # Other models that lie beside it are no part of this one.
    assert not {LLAMA.name, MINIMAX.name, "awq.safetensors"} & found.side_files.keys()
    assert found.container is not None
    assert found.container._asdict() == {
        "form": "hipfire HFQ",
        "arch_id": 10,
        "family": "MiniMax-M2",
        "tokenizer": True,
        "chat_template": True,
    }


def test_a_folder_with_one_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    # The magic decides, not the name; a config beside it is not the one in the file.
    shutil.copyfile(LLAMA, folder / "weights")
    (folder / "LICENSE").write_text("free")
    (folder / "config.json").write_text('{"model_type": "gemma3"}')
    found = open_source(str(folder))
    assert (found.id, found.config["model_type"]) == ("model", "llama")
    assert found.side_files == {"LICENSE": 4}
    assert open_source(str(folder / "weights")) == replace(found, id="weights")
    shutil.copyfile(LLAMA, folder / "x.mq4")
    assert refused(folder) == [f"several-hfq: {folder} holds several HFQ files: weights, x.mq4"]


def test_safetensors_come_first(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "examples" / "tiny-minimax-m2", folder)
    plain = open_source(str(folder))
    shutil.copyfile(LLAMA, folder / "model.mq4")
    found = open_source(str(folder))
    assert found.tensors == plain.tensors
    assert found.container is None
    shutil.copyfile(LLAMA, folder / "strange.safetensors")
    assert open_source(str(folder / "strange.safetensors")).config["model_type"] == "llama"


@pytest.mark.parametrize("name", ["a.hfq", "a.mq4", "a.mq3-lloyd", "a.q8f16"])
def test_damaged_files_are_called_what_their_names_say(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"")
    reason = "it does not begin with HFQM"
    assert refused(path) == [f"not-hfq: {name} is not a whole HFQ file: {reason}"]
    # A folder of such files holds nothing that is known.
    assert refused(tmp_path)[-1].startswith("no-weights: ")


def test_files_that_may_be_told_only_by_their_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(LLAMA.read_bytes()[:-1])
    [said] = refused(path)
    assert said.startswith('bad-tensor-entry: model.bin: tensor "model.norm.weight": it ends')


def test_inspect_shows_roles_and_dtypes(shown: Shown) -> None:
    text = shown("inspect", MINIMAX)
    for line in (
        r"container   hipfire HFQ, arch_id 10: MiniMax-M2",
        r"embedded    tokenizer, chat template",
        r"family      minimax_m2, 1 layer, 12 experts a layer",
        r"precision   hipfire HFQ",
        r"  experts.down_proj  0       MQ4G256            12     786,432  0.418",
        r"  MQ2G256Lloyd       24  0.442",
        r"awq_scale_gate_up.weight: AWQ scales that activations are divided by",
    ):
        assert line in text
    document = json.loads(shown("inspect", MINIMAX, "--format", "json"))
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    assert document["container"]["arch_id"] == 10
    assert document["findings"] == []
    assert document["parameters"] == 2691212
    assert sum(entry["nbytes"] for entry in document["dtypes"]) == document["nbytes"]
    assert "| MQ2G256Lloyd |" in shown("inspect", MINIMAX, "--format", "markdown")


def test_inspect_shows_files_of_families_without_a_table(
    tmp_path: Path, hfq: Bytes, entry: Bytes, shown: Shown
) -> None:
    path = tmp_path / "draft.hfq"
    metadata = {"config": {"model_type": "never_seen"}, "tokenizer": {"a": 1}}
    entries = entry("some.name", 31, (64, 64), 100), entry("table", 22, (4,), 16)
    path.write_bytes(hfq(*entries, metadata=json.dumps(metadata).encode(), payload=116, arch_id=99))
    text = shown("inspect", path)
    for line in (
        "container  hipfire HFQ, arch_id 99: a family that is not known",
        "embedded   no tokenizer, no chat template",
        "code31        1",
        "warning[hfq-without-roles]: the tensors of draft are shown without roles: no arch",
    ):
        assert line in text
    document = json.loads(shown("inspect", path, "--format", "json"))
    jsonschema.validate(document, json.loads(SCHEMA.read_text()))
    assert (document["family"], document["container"]["family"]) == (None, None)


def test_such_a_source_is_quantized_and_not_planned_from(shown: Shown) -> None:
    found = open_source(str(MINIMAX))
    # Its config is still that of the FP8 checkpoint.
    assert found.config["quantization_config"]["quant_method"] == "fp8"
    assert quantization_of(found) == ("hipfire HFQ", "no")
    said = shown("plan", "config_i", "--model", MINIMAX, code=2)
    assert "error[already-quantized]: tiny-minimax is already quantized (hipfire HFQ)" in said
    assert "--allow-requantize" not in said
    assert said == shown("plan", "config_i", "--model", MINIMAX, "--allow-requantize", code=2)


def test_blocks_have_no_role_in_a_plan_even_where_no_matrix_is_expected() -> None:
    found = open_source(str(LLAMA))
    plain = {name: info._replace(dtype="F16") for name, info in found.tensors.items()}
    norm = plain["model.norm.weight"]._replace(dtype="Q8F16")
    with pytest.raises(PolicyError, match=r"dtype Q8F16 of model\.norm\.weight"):
        classify(replace(found, tensors={**plain, norm.name: norm}))


def test_headers_of_such_a_file_are_not_recorded(shown: Shown, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be recorded: it is a hipfire HFQ file"):
        write_recorded(open_source(str(LLAMA)))
    path = tmp_path / "headers.json"
    assert "unrecordable-source" in shown("inspect", LLAMA, "--save-headers", path, code=2)
    assert not path.exists()
