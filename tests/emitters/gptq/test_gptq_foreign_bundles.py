"""Packed checkpoints of other tools: groups of any columns, described in other places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_checkpoints import stored, widened

from emitters.core.bundle_reading import open_bundle
from emitters.core.decoding import Decoder
from emitters.core.verify import verify_bundle
from policy_dsl.diagnostics import PolicyError
from policy_dsl.sources.reference import open_source

GROUP = 32
ENTRY = {
    "bits": 4,
    "group_size": GROUP,
    "desc_act": True,
    "sym": True,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
}
# As AutoGPTQ wrote it before it said who it was.
OLD = {"bits": 4, "group_size": GROUP, "desc_act": True, "sym": True, "damp_percent": 0.01}


def words(codes: np.ndarray, axis: int) -> np.ndarray:
    """int32 words of eight 4-bit codes along an axis."""
    moved = np.moveaxis(codes, axis, 0).astype(np.uint64)
    eights = moved.reshape(-1, 8, moved.shape[1])
    packed = sum(eights[:, i] << np.uint64(4 * i) for i in range(8))
    return np.ascontiguousarray(np.moveaxis(packed.astype(np.uint32).view(np.int32), 0, axis))


@pytest.fixture
def packed(write_llama) -> Callable[..., tuple[Path, Path, dict[str, np.ndarray]]]:
    """Writes a source and its packed checkpoint; gives both, and the values of its matrices.

    order(columns) -> the sequence in which columns are put into groups.
    """

    def make(
        order: Callable[[int], np.ndarray],
        *,
        version: int = 1,
        change: Callable[[dict[str, np.ndarray]], None] | None = None,
        files: dict[str, Any] | None = None,
        **entry: object,
    ):
        source, folder = write_llama(name="source"), write_llama(name="packed")
        config = json.loads((folder / "config.json").read_text())
        if files is None:
            config["quantization_config"] = {**ENTRY, **entry}
        (folder / "config.json").write_text(json.dumps(config))
        for name, content in (files or {}).items():
            (folder / name).write_text(json.dumps(content))
        tensors, values = {}, {}
        for name, (_, shape, content) in stored(source).items():
            matrix = widened(content).reshape(shape)
            if "_proj" not in name:
                tensors[name] = matrix.astype(np.float32)
                continue
            index = np.empty(shape[1], np.int32)
            index[order(shape[1])] = np.arange(shape[1]) // GROUP
            groups = range(shape[1] // GROUP)
            largest = [np.abs(matrix[:, index == group]).max(1) for group in groups]
            scales = (np.stack(largest) / 7.5).astype(np.float16)
            spread = scales.astype(np.float32)[index].T
            codes = np.clip(np.rint(matrix / spread + 8), 0, 15)
            base = name.removesuffix("weight")
            tensors[f"{base}qweight"] = words(codes.T, 0)
            tensors[f"{base}qzeros"] = words(np.full(scales.shape, 8 - (version == 1)), 1)
            tensors[f"{base}scales"], tensors[f"{base}g_idx"] = scales, index
            values[base[:-1]] = ((codes - 8) * spread).astype(np.float16).astype(np.float32)
        if change is not None:
            change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return source, folder, values

    return make


def shuffled(columns: int) -> np.ndarray:
    return np.random.default_rng(columns).permutation(columns)


def codes(source: Path, folder: Path) -> list[str]:
    report = verify_bundle(folder, open_source(str(source)), jobs=1)
    return [one.code for one in report.findings if one.code != "no-record"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", [shuffled, np.arange], ids=["shuffled", "in order"])
def test_columns_are_decoded_by_their_own_group(order, version, packed):
    form = {1: "gptq", 2: "gptq_v2"}[version]
    source, folder, values = packed(order, version=version, checkpoint_format=form)
    bundle = open_bundle(folder)
    decoder = Decoder(bundle)
    modules = {module.name: module for module in bundle.modules}
    assert len(values) == 14
    for name, wanted in values.items():
        module = modules[name]
        for first in (0, 32):
            np.testing.assert_array_equal(decoder.rows(module, first, 32), wanted[first:][:32])
    assert codes(source, folder) == []


def test_a_wrong_code_is_found_in_its_column(packed):
    def flip(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.up_proj.qweight"][0, 0] ^= 7

    source, folder, _ = packed(shuffled, change=flip)
    assert codes(source, folder) == ["codes-not-nearest"]


@pytest.mark.parametrize("number", [99, -1])
def test_groups_that_are_not_there_are_named(number, packed):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.mlp.up_proj.g_idx"][3] = number

    source, folder, _ = packed(shuffled, change=change)
    report = verify_bundle(folder, open_source(str(source)), jobs=1)
    assert "does not number groups of 32 columns each" in str(report.findings)


def test_without_act_order_in_the_config_groups_are_neighbours(packed):
    source, folder, _ = packed(shuffled, desc_act=False)
    assert codes(source, folder) == ["incomplete-module"]


@pytest.mark.parametrize("file", ["quantize_config.json", "quantization_config.json"])
def test_a_sidecar_alone_describes_it(file, packed):
    entry = OLD if file == "quantize_config.json" else {**ENTRY, "desc_act": True}
    source, folder, _ = packed(shuffled, files={file: entry})
    assert codes(source, folder) == ["metadata-elsewhere"]


def test_a_description_in_the_text_config_counts(packed):
    source, folder, _ = packed(shuffled, files={})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] = {"quantization_config": ENTRY}
    (folder / "config.json").write_text(json.dumps(config))
    assert codes(source, folder) == []


def test_awq_is_refused_by_name(packed):
    source, folder, _ = packed(shuffled, quant_method="awq", version=1)
    with pytest.raises(PolicyError, match=r"quantized \(awq \(bits 4, group_size 32\)\)"):
        verify_bundle(folder, open_source(str(source)), jobs=1)


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ({"checkpoint_format": "marlin"}, "its checkpoint_format is 'marlin'"),
        ({"bits": 5}, "bits 5 are none of 2, 3, 4, 8"),
    ],
)
def test_what_is_not_read_of_the_format_is_named(packed, entry, why):
    source, folder, _ = packed(shuffled, **entry)
    with pytest.raises(PolicyError) as caught:
        verify_bundle(folder, open_source(str(source)), jobs=1)
    (found,) = caught.value.diagnostics
    assert found.notes == (f"gptq does not read it: {why}",)
