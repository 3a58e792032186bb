"""Verifying JANGTQ bundles: jang's own pass, and every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import deserialize
from small_checkpoints import Array, write_shard

from emitters.core.bundle_reading import bundle_outline
from emitters.core.verify import VerifyReport, verify_bundle
from policy_dsl.diagnostics import PolicyError
from policy_dsl.sources.reference import open_source
from policyc.reports.bundle_report import role_errors

GOLDEN = Path(__file__).parents[2] / "golden" / "jangtq"
PRESTACKED, APART = "micro_JANGTQ_K", "micro_JANGTQ2_perexpert"
MICRO = (PRESTACKED, APART)
SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
SIDECAR = "jangtq_runtime.safetensors"
MOE = "model.layers.0.block_sparse_moe"
STACK = f"{MOE}.switch_mlp"
NUMPY = {"F32": np.float32, "U32": np.uint32, "F16": np.float16, "U8": np.uint8}
Held = dict[str, tuple[str, Array]]


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[str], Path]:
    """Copies of recorded bundles that a test may damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def found(folder: Path) -> list[tuple[str, str]]:
    """Code and message of everything that verifying finds, but the missing record."""
    report = verify_bundle(folder, jobs=1)
    told = [(one.code, one.message) for one in report.findings]
    return [(code, message) for code, message in told if code != "no-record"]


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def rewrite_tensors(path: Path, change: Callable[[Held], None]) -> None:
    """Changes the tensors of a shard, and the index with them."""
    held: Held = {}
    for name, entry in deserialize(path.read_bytes()):
        flat = np.frombuffer(bytes(entry["data"]), NUMPY[entry["dtype"]])
        held[name] = entry["dtype"], flat.reshape(entry["shape"]).copy()
    change(held)
    write_shard(path, held)
    weight_map = dict.fromkeys(held, path.name)
    if path.name == SHARD:
        rewrite(path.parent / INDEX, lambda index: index.update(weight_map=weight_map))
        rewrite(path.parent / INDEX, lambda index: index["metadata"].update(total_size=0))


def put(document: dict[str, Any], place: str, value: Any) -> None:
    """Sets the entry at a dotted place."""
    *rooms, last = place.split(".")
    for room in rooms:
        document = document[room]
    document[last] = value


@pytest.mark.parametrize("name", MICRO)
def test_bundles_of_jangs_converter_are_fine(name):
    report = verify_bundle(GOLDEN / name, jobs=1)
    assert report.ok
    assert {one.code for one in report.findings} == {"no-record"}
    results = {check.name: check.result for check in report.checks}
    assert results.pop("hashes") == "not possible"
    assert set(results.values()) == {"passed"}
    assert {"widths", "readers"} <= results.keys()


@pytest.mark.parametrize("name", MICRO)
def test_their_values_are_as_near_to_the_source_as_their_widths_allow(built, name):
    """Recorded shards decoded by our decoder, against sources made from the recipe."""
    report = verify_bundle(GOLDEN / name, open_source(str(built(name).source)), jobs=1)
    assert report.ok
    errors = {one["role"]: one["relative_frobenius"] for one in role_errors(report.errors or ())}
    down = (0.09, 0.11) if name == PRESTACKED else (0.32, 0.36)
    for role, (low, high) in {
        "experts.gate_proj": (0.32, 0.36),
        "experts.up_proj": (0.32, 0.36),
        "experts.down_proj": down,
        "attention.q_proj": (0.002, 0.01),
        "embed": (0.002, 0.01),
        "router_bias": (0, 3e-4),
    }.items():
        assert low < errors[role] < high, role
    assert errors["norm"] == 0


@pytest.mark.parametrize("name", MICRO)
def test_widths_and_shapes_follow_from_their_files(name):
    outline = bundle_outline(GOLDEN / name)
    assert outline.target == "jangtq_prestack"
    modules = {one.name: one for one in outline.modules}
    if name == PRESTACKED:
        widths = {"gate_proj": "2bit mxtq", "up_proj": "2bit mxtq", "down_proj": "4bit mxtq"}
        experts = {f"{STACK}.{projection}": width for projection, width in widths.items()}
    else:
        names = (f"{MOE}.experts.{n}.{w}" for n in range(32) for w in ("w1", "w2", "w3"))
        experts = dict.fromkeys(names, "2bit mxtq")
    for path, width in experts.items():
        assert modules[path].treatment == width
        assert modules[path].parameters == 64 * 64 * (32 if name == PRESTACKED else 1)
    assert modules["model.layers.0.self_attn.q_proj"].treatment == "8bit affine g64"
    assert modules[f"{MOE}.gate"].stored == "f16"


@pytest.mark.parametrize("name", [*MICRO, "tiny8_bf16_JANGTQ2", "tiny32_odd_bf16_JANGTQ_K"])
def test_built_bundles_are_fine_with_and_without_a_record(built, tmp_path, name):
    made = built(name)
    report = verify_bundle(made.bundle, open_source(str(made.source)), jobs=2)
    assert report.ok
    assert report.findings == ()
    assert {check.result for check in report.checks} == {"passed"}
    shutil.copytree(made.bundle, tmp_path / "bare")
    (tmp_path / "bare" / "policyc.json").unlink()
    assert found(tmp_path / "bare") == []


@pytest.mark.parametrize(
    ("name", "module"), [(PRESTACKED, f"{STACK}.down_proj"), (APART, f"{MOE}.experts.7.w3")]
)
def test_another_width_beside_the_codes(bundle, name, module):
    folder = bundle(name)

    def change(held: Held) -> None:
        held[f"{module}.tq_bits"][1][0] = 3

    rewrite_tensors(folder / SHARD, change)
    ((code, message),) = found(folder)
    assert code == "incomplete-module"
    assert f"module {module}: its tq_bits does not hold" in message


@pytest.mark.parametrize("part", ["tq_packed", "tq_norms", "tq_bits"])
def test_codes_without_one_of_their_parts(bundle, part):
    folder = bundle(PRESTACKED)
    module = f"{STACK}.up_proj"
    rewrite_tensors(folder / SHARD, lambda held: held.pop(f"{module}.{part}"))
    told = dict(found(folder))
    parts = ["tq_bits", "tq_norms", "tq_packed"]
    left = ", ".join(one for one in parts if one != part)
    wanted = f"module {module}: it has {left}; it should have {', '.join(parts)}"
    assert told["incomplete-module"] == wanted


def test_affine_codes_without_scales(bundle):
    folder = bundle(PRESTACKED)
    rewrite_tensors(folder / SHARD, lambda held: held.pop("lm_head.scales"))
    wanted = "module lm_head: it has biases, weight; it should have biases, scales, weight"
    assert ("incomplete-module", wanted) in found(folder)


def test_norms_of_another_length(bundle):
    folder = bundle(PRESTACKED)

    def change(held: Held) -> None:
        dtype, norms = held[f"{STACK}.up_proj.tq_norms"]
        held[f"{STACK}.up_proj.tq_norms"] = dtype, norms[:, 1:]

    rewrite_tensors(folder / SHARD, change)
    assert {code for code, _ in found(folder)} == {"incomplete-module", "width-disagrees"}


def test_a_config_with_another_width(bundle):
    folder = bundle(PRESTACKED)
    place = "mxtq_bits.routed_expert.down_proj"
    rewrite(folder / "config.json", lambda config: put(config, place, 2))
    told = found(folder)
    assert {code for code, _ in told} == {"incomplete-module", "width-disagrees"}
    assert all(f"module {STACK}.down_proj" in message for _, message in told)


@pytest.mark.parametrize("value", [32, 65, 0, -5, 10**10])
def test_rows_of_another_length_than_the_record_says(built, tmp_path, value):
    folder = Path(shutil.copytree(built(PRESTACKED).bundle, tmp_path / "bundle"))
    rewrite(folder / "config.json", lambda config: put(config, "hidden_size", value))
    (told,) = (one for one in verify_bundle(folder, jobs=1).findings if one.code[:4] != "file")
    assert (told.code, told.message) == (
        "width-disagrees",
        f"module {STACK}.gate_proj: the tensors say the shape [32, 64, 64],"
        f" config.json says the shape [32, 64, {value}]",
    )
    assert told.notes == (f"in all 2: {STACK}.gate_proj, {STACK}.up_proj",)


def test_a_config_with_another_affine_width(bundle):
    folder = bundle(PRESTACKED)
    rewrite(folder / "config.json", lambda config: put(config, "quantization.bits", 4))
    told = [one for one in verify_bundle(folder, jobs=1).findings if one.count > 1]
    # Embeddings, the head, and four matrices of attention; no experts.
    assert {(one.code, one.count) for one in told} == {
        ("incomplete-module", 6),
        ("width-disagrees", 6),
    }
    assert not any("switch_mlp" in name for one in told for name in one.examples)


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("jang_config.json", "mxtq_bits.routed_expert.gate_proj"),
        ("config.json", "quantization.mxtq_bits.routed_expert.up_proj"),
        ("config.json", "quantization.routed_expert_bits.down_proj"),
    ],
)
def test_places_that_tell_several_widths(bundle, file, place):
    """Each reader has its favourite, so jang may load what Swift decodes as noise."""
    folder = bundle(PRESTACKED)
    rewrite(folder / file, lambda document: put(document, place, 3))
    ((code, message),) = found(folder)
    assert code == "bad-bundle-metadata"
    assert "the width of experts differs from place to place" in message


def test_widths_as_older_writers_told_them(bundle):
    """The first converter named one width, for affine modules a wrong one, and no more."""

    def old(config: dict[str, Any]) -> None:
        config["quantization"] = {"group_size": 64, "bits": 2}
        del config["mxtq_bits"], config["weight_format"]

    folder = bundle(APART)
    rewrite(folder / "config.json", old)
    assert found(folder) == []
    rewrite(folder / "config.json", lambda config: put(config, "mxtq_bits", 2))
    assert found(folder) == []


@pytest.mark.parametrize("name", MICRO)
@pytest.mark.parametrize("file", ["jangtq_runtime.safetensors", "jang_config.json"])
def test_a_file_that_readers_need(bundle, name, file):
    folder = bundle(name)
    (folder / file).unlink()
    ((code, message),) = found(folder)
    assert code == "bad-bundle-metadata"
    assert message.startswith(f"{file}: it is missing")


def test_a_runtime_file_with_other_tables(bundle):
    folder = bundle(PRESTACKED)

    def change(held: Held) -> None:
        held["codebook.64.2"][1][1] += np.float32(1e-6)
        held["signs.64.42"] = "F32", held["signs.64.42"][1][1:]
        del held["codebook.64.4"]

    rewrite_tensors(folder / SIDECAR, change)
    assert [message for _, message in found(folder)] == [
        f"{SIDECAR}: signs.64.42 is F32 [63], not F32 [64]",
        f"{SIDECAR}: codebook.64.2 does not hold the values that the codes were made with",
        f"{SIDECAR}: it has no codebook.64.4",
    ]


@pytest.mark.parametrize("kept", [0, 4, 100])
def test_a_cut_runtime_file(bundle, kept):
    folder = bundle(PRESTACKED)
    (folder / SIDECAR).write_bytes((folder / SIDECAR).read_bytes()[:kept])
    assert {code for code, _ in found(folder)} == {"not-safetensors"}


def test_a_shard_whose_name_jang_does_not_look_for(bundle):
    folder = bundle(PRESTACKED)
    (folder / SHARD).rename(folder / "model.safetensors")
    held = dict.fromkeys(json.loads((folder / INDEX).read_bytes())["weight_map"])
    weight_map = dict.fromkeys(held, "model.safetensors")
    rewrite(folder / INDEX, lambda index: index.update(weight_map=weight_map))
    ((code, message),) = found(folder)
    assert code == "bad-bundle-metadata"
    assert message.startswith("model.safetensors: jang's loader reads model-*.safetensors only")


def test_a_cache_of_stacks_beside_the_stacks(bundle):
    folder = bundle(PRESTACKED)
    shutil.copy(folder / SHARD, folder / "jangtq_stacked.safetensors")
    ((_, message),) = found(folder)
    assert message.startswith("jangtq_stacked.safetensors: ")


@pytest.mark.parametrize("name", MICRO)
def test_a_config_with_another_count_of_experts(bundle, name):
    folder = bundle(name)
    rewrite(folder / "config.json", lambda config: put(config, "num_local_experts", 31))
    (told,) = (one for one in verify_bundle(folder, jobs=1).findings if one.code != "no-record")
    assert "it has 31 experts" in told.message
    assert told.count == 3


def test_an_expert_that_is_missing(bundle):
    folder = bundle(APART)

    def change(held: Held) -> None:
        for part in ("tq_packed", "tq_norms", "tq_bits"):
            del held[f"{MOE}.experts.5.w2.{part}"]

    rewrite_tensors(folder / SHARD, change)
    ((_, message),) = found(folder)
    assert f"{MOE}.experts.*.w2" in message


def test_experts_apart_under_the_other_layouts_name(bundle):
    folder = bundle(APART)
    place = "routed_expert_layout"
    rewrite(folder / "jang_config.json", lambda jang: put(jang, place, "prestacked"))
    ((_, message),) = found(folder)
    assert message == "jang_config.json: it says prestacked, but experts are apart"


@pytest.mark.parametrize(
    ("file", "place", "value"),
    [
        ("jang_config.json", "mxtq_seed", 7),
        ("jang_config.json", "mxtq_seed", "42"),
        ("jang_config.json", "modules", [1]),
        ("jang_config.json", "modules", {"a": {"scheme": "mxtq"}}),
        ("jang_config.json", "mxtq_bits", [2]),
        ("config.json", "mxtq_bits.routed_expert", 64),
        ("config.json", "mxtq_bits.routed_expert", 0),
        ("config.json", "mxtq_bits.routed_expert", "2"),
        ("config.json", "quantization", 8),
        ("config.json", "quantization.bits", None),
        ("config.json", "quantization.group_size", float("inf")),
        ("config.json", "hidden_size", None),
        ("config.json", "text_config", 3),
    ],
)
def test_entries_that_are_none(bundle, file, place, value):
    """Whatever stands there, it is told, and not taken for a bundle of another format."""
    folder = bundle(PRESTACKED)
    rewrite(folder / file, lambda document: put(document, place, value))
    ((code, message),) = found(folder)
    assert code == "bad-bundle-metadata"
    assert any(key in message for key in place.split("."))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_broken_jang_config(bundle, content):
    folder = bundle(PRESTACKED)
    (folder / "jang_config.json").write_bytes(content)
    assert {code for code, _ in found(folder)} == {"bad-bundle-metadata"}


def test_without_either_mark_it_is_no_bundle_of_this_format(bundle):
    folder = bundle(PRESTACKED)
    (folder / "jang_config.json").unlink()
    for key in ("weight_format", "quantization"):
        rewrite(folder / "config.json", lambda config, key=key: config.pop(key))
    with pytest.raises(PolicyError, match="not-a-bundle"):
        verify_bundle(folder, jobs=1)


def test_another_source_is_noticed(built):
    other = open_source(str(built("tiny32_odd_bf16_JANGTQ_K").source))
    report: VerifyReport = verify_bundle(GOLDEN / PRESTACKED, other, jobs=1)
    assert not report.ok
    (told,) = [one for one in report.findings if one.code == "not-comparable"]
    assert "the shapes of " in told.message


@pytest.mark.parametrize("record", [True, False])
def test_an_added_expert_that_does_not_decode_to_zeros(built, tmp_path, record):
    made = built("tiny8_bf16_JANGTQ2")
    folder = Path(shutil.copytree(made.bundle, tmp_path / "bundle"))
    if not record:
        (folder / "policyc.json").unlink()
    name = f"{STACK}.up_proj.tq_norms"

    def change(held: Held) -> None:
        # All codes are the same, which the rotation gathers in one value.
        held[name][1][20, 3] = 1

    shards = folder.glob("*.safetensors")
    (shard,) = [path for path in shards if name.encode() in path.read_bytes()]
    rewrite_tensors(shard, change)
    report = verify_bundle(folder, open_source(str(made.source)), jobs=1)
    (told,) = [one for one in report.findings if one.code == "added-not-zero"]
    assert told.message == "not zero in added experts: 1 value of 1 tensor or matrix"
    assert told.notes[0].startswith(f"{STACK}.up_proj[20]: ")
    assert ", the first at row 3, column " in told.notes[0]
    assert told.notes[0].endswith("; this expert was added and must decode to zeros")
    assert {"unlike-source", "codes-differ"}.isdisjoint(one.code for one in report.findings)
