"""What people give instead of a checkpoint is called what it is, with a cure to be typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from policy_dsl.diagnostics import Diagnostic, PolicyError
from policy_dsl.sources.reference import open_source

COMMIT = "ab" * 20


def refused(path: Path) -> Diagnostic:
    """The one defect of what a path leads to."""
    with pytest.raises(PolicyError) as caught:
        open_source(str(path))
    (found,) = caught.value.diagnostics
    assert "--allow-requantize" not in str(found.suggestion)
    return found


def checkpoint(folder: Path) -> Path:
    """A small checkpoint."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": np.zeros(4, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"peft_type": "LORA", "base_model_name_or_path": "org/base"},
            "a LoRA adapter for org/base",
        ),
        ({"fine_tune_type": "lora", "model": "org/base"}, "a LoRA adapter for org/base"),
        ({"peft_type": "IA3", "base_model_name_or_path": None}, "an adapter"),
    ],
)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapters.safetensors"])
@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter(
    tmp_path: Path, config: dict[str, str], said: str, file: str, with_config: bool
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"layers.0.lora_A": np.zeros(4, np.float32)}, tmp_path / file)
    if with_config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path, tmp_path / file):
        found = refused(path)
        assert found.message == f"{tmp_path} is {said}, not a checkpoint"
        assert "merge it" in str(found.suggestion)


def test_an_adapter_beside_whole_weights_is_a_stray(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    save_file({"b": np.zeros(4, np.float32)}, folder / "adapter_model.safetensors")
    (found,) = open_source(str(folder)).findings
    assert found.code == "stray-safetensors"


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("model-q4.gguf", "a GGUF model of llama.cpp"),
        ("model.ONNX", "an ONNX model"),
        ("tf_model.h5", "a TensorFlow checkpoint"),
        ("flax_model.msgpack", "a Flax checkpoint"),
        ("weights.npz", "a NumPy archive"),
        ("model.tflite", "a TensorFlow Lite model"),
    ],
)
@pytest.mark.parametrize("with_config", [False, True])
def test_other_formats(tmp_path: Path, file: str, said: str, with_config: bool) -> None:
    (tmp_path / file).write_bytes(bytes(20))
    if with_config:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for path in (tmp_path, tmp_path / file):
        assert said in refused(path).message
        assert "safetensors checkpoint" in str(refused(path).suggestion)


def test_gguf_by_its_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.q4"
    path.write_bytes(b"GGUF" + bytes(20))
    assert "a GGUF model" in refused(path).message


def test_formats_beside_a_checkpoint_do_not_matter(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / "model.gguf").write_bytes(b"GGUF")
    (folder / "model.onnx").write_bytes(b"")
    assert list(open_source(str(folder)).tensors) == ["a"]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"PK")
    assert refused(tmp_path / file).code == "pickled-weights"


def test_a_pipeline_and_an_openvino_model(tmp_path: Path) -> None:
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    (tmp_path / "openvino_model.bin").write_bytes(b"")
    assert "an OpenVINO model" in refused(tmp_path).message
    (tmp_path / "model_index.json").write_text("{}")
    assert "a pipeline of diffusers" in refused(tmp_path).message


def test_the_folder_of_a_model_in_the_hubs_cache(tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--org--name"
    snapshot = checkpoint(model / "snapshots" / COMMIT)
    checkpoint(model / "snapshots" / ("cd" * 20))
    both = f"its snapshot is {snapshot} or {model / 'snapshots' / ('cd' * 20)}"
    assert refused(model).suggestion == both
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    assert refused(model).suggestion == f"its snapshot is {snapshot}"
    assert refused(tmp_path / "hub").suggestion == "give the name of a model in it, org/name"
    assert open_source(str(snapshot)).tensors


def test_a_folder_around_checkpoints(tmp_path: Path) -> None:
    for name in ("one", "two"):
        checkpoint(tmp_path / name)
    wanted = f"give {tmp_path / 'one'} or {tmp_path / 'two'}"
    assert refused(tmp_path).suggestion == wanted


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_one_file_of_a_checkpoint(tmp_path: Path, file: str) -> None:
    folder = checkpoint(tmp_path / "m")
    (folder / file).write_text("{}")
    assert refused(folder / file).suggestion == f"give the folder, {folder}"
