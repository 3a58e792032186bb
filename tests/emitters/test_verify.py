"""Verifying bundles: damage of every kind is found, and errors are those of the definition."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from emitters.core.bundle_reading import bundle_outline
from emitters.core.verify import VerifyReport, verify_bundle
from emitters.numerics.reach import Sums
from policy_dsl.diagnostics import PolicyError
from policy_dsl.sources.reference import open_source
from policyc.cli import main
from policyc.reports import render_text
from policyc.reports.bundle_report import role_errors, verify_blocks, verify_document
from tests.models import TINY, tiny

ROOT = Path(__file__).parent.parent.parent
STOCK = ROOT / "tests" / "golden" / "mlx" / "tiny_minimax_fp8"
POLICY = """\
target mlx_affine
output shard_size 2MiB
experts: 2bit
attention: 4bit
embed, lm_head: 8bit g32
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    policy = folder / "small.qpol"
    policy.write_text(POLICY, encoding="utf-8")
    arguments = ["build", str(policy), "--model", str(TINY), "-o", str(folder / "b"), "-q"]
    assert main(arguments) == 0
    return folder / "b"


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def codes(report: VerifyReport) -> set[str]:
    return {found.code for found in report.findings}


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_a_fine_bundle_passes_every_check(bundle: Path) -> None:
    report = verify_bundle(bundle, jobs=2)
    assert report.ok
    assert report.findings == ()
    assert {check.result for check in report.checks} == {"passed"}
    assert len(shards(bundle)) > 1


def test_one_flipped_bit_is_found_and_its_tensor_named(bundle: Path) -> None:
    shard = shards(bundle)[0]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    report = verify_bundle(bundle, jobs=1)
    assert codes(report) == {"file-changed", "tensor-changed"}
    with safe_open(shard, "numpy") as opened:
        last = max(opened.keys(), key=lambda name: json_place(shard, name))
    assert any(last in found.message for found in report.findings)


def json_place(shard: Path, name: str) -> int:
    content = shard.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return int(header[name]["data_offsets"][1])


def test_a_cut_shard(bundle: Path) -> None:
    shard = shards(bundle)[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    report = verify_bundle(bundle, jobs=1)
    assert not report.ok
    assert "not-safetensors" in codes(report)


def test_a_missing_shard(bundle: Path) -> None:
    shards(bundle)[0].unlink()
    assert "missing-shard" in codes(verify_bundle(bundle, jobs=1))


def test_a_missing_side_file(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    assert codes(verify_bundle(bundle, jobs=1)) == {"missing-bundle-file"}


def test_a_changed_side_file(bundle: Path) -> None:
    path = bundle / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
    assert codes(verify_bundle(bundle, jobs=1)) == {"file-changed"}


def test_an_added_note_is_a_warning_added_weights_are_an_error(bundle: Path) -> None:
    (bundle / "NOTES.md").write_text("mine", encoding="utf-8")
    report = verify_bundle(bundle, jobs=1)
    assert report.ok
    assert codes(report) == {"unrecorded-file"}
    shutil.copy(shards(bundle)[0], bundle / "model-extra.safetensors")
    assert not verify_bundle(bundle, jobs=1).ok


def test_a_config_that_claims_another_width(bundle: Path) -> None:
    def widen(config: Any) -> None:
        for key in ("quantization", "quantization_config"):
            config[key]["model.layers.1.self_attn.q_proj"]["bits"] = 3

    rewrite(bundle / "config.json", widen)
    report = verify_bundle(bundle, jobs=1)
    assert codes(report) == {"width-disagrees", "file-changed"}
    (found,) = [one for one in report.findings if one.code == "width-disagrees"]
    assert "model.layers.1.self_attn.q_proj" in found.message


def test_a_config_that_names_no_such_module(bundle: Path) -> None:
    def invent(config: Any) -> None:
        for key in ("quantization", "quantization_config"):
            config[key]["model.nowhere"] = {"bits": 4, "group_size": 64, "mode": "affine"}

    rewrite(bundle / "config.json", invent)
    assert "width-disagrees" in codes(verify_bundle(bundle, jobs=1))


def test_a_config_that_says_two_things(bundle: Path) -> None:
    rewrite(bundle / "config.json", lambda config: config["quantization_config"].update(bits=3))
    report = verify_bundle(bundle, jobs=1)
    assert not report.ok
    assert any("quantization_config differ" in found.message for found in report.findings)


def test_codes_that_the_config_does_not_explain(bundle: Path) -> None:
    def forget(config: Any) -> None:
        for key in ("quantization", "quantization_config"):
            del config[key]

    rewrite(bundle / "config.json", forget)
    report = verify_bundle(bundle, jobs=1)
    assert codes(report) == {"width-disagrees", "file-changed"}


def test_an_index_with_another_total(bundle: Path) -> None:
    def lie(index: Any) -> None:
        index["metadata"]["total_size"] += 1

    rewrite(bundle / "model.safetensors.index.json", lie)
    assert codes(verify_bundle(bundle, jobs=1)) == {"index-disagrees", "file-changed"}


def test_an_index_that_lacks_a_tensor_of_a_single_file(tmp_path: Path) -> None:
    shutil.copytree(STOCK / "expected", tmp_path / "b")
    index = tmp_path / "b" / "model.safetensors.index.json"
    rewrite(index, lambda document: document["weight_map"].pop("model.norm.weight"))
    assert codes(verify_bundle(tmp_path / "b", jobs=1)) == {"index-mismatch"}


def test_an_edited_record(bundle: Path) -> None:
    def edit(record: Any) -> None:
        record["policy"]["name"] = "another"

    rewrite(bundle / "policyc.json", edit)
    report = verify_bundle(bundle, jobs=1)
    assert codes(report) == {"bad-record"}
    assert "own digest" in report.findings[0].message


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"schema_version": 1}', b"\xff"])
def test_a_broken_record(bundle: Path, content: bytes) -> None:
    (bundle / "policyc.json").write_bytes(content)
    assert codes(verify_bundle(bundle, jobs=1)) == {"bad-record"}


def test_a_record_of_a_later_version_is_told_as_such(bundle: Path) -> None:
    rewrite(bundle / "policyc.json", lambda record: record.update(schema_version=3))
    (found,) = verify_bundle(bundle, jobs=1).findings
    assert "its schema_version is 3; this policyc reads 1 and 2" in found.message


def test_without_a_record_the_rest_is_checked(bundle: Path) -> None:
    (bundle / "policyc.json").unlink()
    report = verify_bundle(bundle, tiny(), jobs=2)
    assert report.ok
    results = {check.name: check.result for check in report.checks}
    assert results.pop("hashes") == "not possible"
    assert set(results.values()) == {"passed"}
    assert codes(report) == {"no-record"}


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="not-a-bundle"):
        verify_bundle(TINY, jobs=1)
    with pytest.raises(PolicyError, match="not-a-bundle"):
        verify_bundle(tmp_path / "nowhere", jobs=1)


def test_a_bundle_of_another_tool() -> None:
    """Made by mlx-lm; its own loader took it, so nothing may be wrong with it."""
    source = open_source(str(STOCK / "source"))
    report = verify_bundle(STOCK / "expected", source, jobs=1)
    assert report.ok
    by_role = {one["role"]: one["relative_frobenius"] for one in role_errors(report.errors or ())}
    assert by_role["norm"] == 0
    assert 0.03 < (by_role["attention.q_proj"] or 0) < 0.1
    assert bundle_outline(STOCK / "expected").bpw is not None


def test_errors_follow_from_the_definition(built: Path) -> None:
    """Against plain numpy over the whole of one matrix, decoded by the formula."""
    name = "model.embed_tokens"
    report = verify_bundle(built, tiny(), jobs=1)
    (found,) = [one.sums for one in report.errors or () if one.module == name]
    index = json.loads((TINY / "model.safetensors.index.json").read_text(encoding="utf-8"))
    source = bf16(TINY / index["weight_map"][f"{name}.weight"], f"{name}.weight")
    shard = next(path for path in shards(built) if name in str(header(path)))
    packed = raw(shard, f"{name}.weight").view(np.uint8)
    scales, biases = (bf16(shard, f"{name}.{part}") for part in ("scales", "biases"))
    groups = packed.reshape(*scales.shape, 32).astype(np.float32)
    product = round_bf16(groups * scales[..., None])
    decoded = round_bf16(product + biases[..., None]).reshape(source.shape)
    difference = decoded.astype(np.float64) - source
    relative = np.linalg.norm(difference) / np.linalg.norm(source.astype(np.float64))
    assert found.relative == pytest.approx(relative, rel=1e-9)
    assert found.largest == np.abs(difference).max()
    assert found.values == source.size


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8 : 8 + length]))


def raw(path: Path, name: str) -> Any:
    entry = header(path)[name]
    content = path.read_bytes()
    base = 8 + int.from_bytes(content[:8], "little")
    start, stop = entry["data_offsets"]
    return np.frombuffer(content[base + start : base + stop], np.uint8)


def bf16(path: Path, name: str) -> Any:
    bits = raw(path, name).view(np.uint16).astype(np.uint32) << 16
    return bits.view(np.float32).reshape(header(path)[name]["shape"])


def round_bf16(values: Any) -> Any:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded & 0xFFFF0000).view(np.float32)


def test_another_source_is_noticed(built: Path) -> None:
    report = verify_bundle(built, open_source(str(STOCK / "source")), jobs=1)
    assert not report.ok
    assert "not-comparable" in codes(report)


def test_a_source_without_weights_cannot_be_compared(built: Path) -> None:
    with pytest.raises(PolicyError, match="not-comparable"):
        verify_bundle(built, open_source("minimax_m2.7"), jobs=1)


def test_values_that_are_no_numbers_are_an_error(bundle: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.scales"
    shard = next(path for path in shards(bundle) if name in header(path))
    content = bytearray(shard.read_bytes())
    base = 8 + int.from_bytes(content[:8], "little")
    at = base + header(shard)[name]["data_offsets"][0]
    content[at : at + 2] = (0x7FC0).to_bytes(2, "little")
    shard.write_bytes(content)
    report = verify_bundle(bundle, tiny(), jobs=1)
    (found,) = [one for one in report.findings if one.code == "non-finite-decoded"]
    assert "64 values" in found.message


def test_workers_do_not_change_the_errors(built: Path) -> None:
    source = tiny()
    one, four = (verify_bundle(built, source, jobs=jobs).errors for jobs in (1, 4))
    assert one == four


def test_a_role_adds_up_its_modules() -> None:
    one = Sums(source=3.0, decoded=3.0, difference=1.0, product=2.5, largest=0.5, values=4)
    other = Sums(source=1.0, decoded=1.0, difference=0.0, product=1.0, largest=0.0, values=4)
    both = one + other
    assert both.relative == 0.5
    assert both.cosine == pytest.approx(3.5 / 4)
    assert (both.largest, both.values) == (0.5, 8)
    assert Sums().relative is None


def test_text_and_document_tell_the_same(built: Path) -> None:
    report = verify_bundle(built, tiny(), jobs=2)
    document, text = verify_document(report), render_text(verify_blocks(report))
    assert document["ok"] is True
    for row in document["errors"]["roles"]:
        assert row["role"] in text
    assert len(document["errors"]["modules"]) == len(report.errors or ())


def test_verify_uses_the_cores_that_build_uses(bundle, monkeypatch) -> None:
    used = []

    def counting(*arguments: Any, jobs: int, **options: Any) -> VerifyReport:
        used.append(jobs)
        return verify_bundle(*arguments, jobs=jobs, **options)

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("emitters.core.verify.verify_bundle", counting)
    assert main(["verify", str(bundle)]) == 0
    assert main(["verify", str(bundle), "--jobs", "2"]) == 0
    assert used == [3, 2]
