"""Bundles of the embedded model by every bundled policy, through all commands."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from child_builds import StoppedAt
from imatrix_files import Statistics, legacy_file
from small_checkpoints import Array, bf16, digests

from emitters.core.build import build
from emitters.core.verify import verify_bundle
from emitters.tensor_io.imatrix import open_imatrix
from policy_dsl import DOCUMENT_SCHEMAS
from policy_dsl.diagnostics import PolicyError
from policy_dsl.sources.reference import open_source
from policyc.cli import main
from policyc.reports.bundle_report import role_errors
from tests.models import IMATRIX, TINY, tiny

ROOT = Path(__file__).parents[3]
# policy -> schemes of gate and up, and of down.
TIERS = {
    "hipfire_mq4": ("4bit mq4", "4bit mq4"),
    "hipfire_mq3_lloyd": ("3bit mq3-lloyd", "4bit mq4"),
    "hipfire_mq3": ("3bit mq3-lloyd", "3bit mq3-lloyd"),
    "hipfire_mq2_lloyd": ("2bit mq2-lloyd", "4bit mq4"),
    "hipfire_mq2": ("2bit mq2-lloyd", "3bit mq3-lloyd"),
}
# scheme -> what values of a bell curve lose, |W - D| / |W|.
LOSS = {"4bit mq4": 0.109, "3bit mq3-lloyd": 0.185, "2bit mq2-lloyd": 0.335}
Built = Callable[[str], Path]
Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """(*arguments, code=0) -> what a command prints to stdout; to stderr if it fails."""

    def command(*arguments: object, code: int = 0) -> str:
        assert main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        return captured.out if code == 0 else captured.err

    return command


@pytest.mark.parametrize("policy", TIERS)
def test_a_bundle_is_as_near_to_its_source_as_its_bits_allow(
    demo_bundle: Built, policy: str
) -> None:
    report = verify_bundle(demo_bundle(policy), tiny(), jobs=2)
    assert report.findings == ()
    assert {check.result for check in report.checks} == {"passed"}
    errors = {
        one["role"]: one["relative_frobenius"] or 0 for one in role_errors(report.errors or ())
    }
    # Scales that no source has are no weights, and are divided out.
    assert "awq_scale" not in errors
    inner, down = TIERS[policy]
    for role, scheme in (("gate_proj", inner), ("up_proj", inner), ("down_proj", down)):
        assert errors[f"experts.{role}"] == pytest.approx(LOSS[scheme], rel=0.04)
    for role in ("attention.q_proj", "embed", "lm_head", "router"):
        assert errors[role] == pytest.approx(0.0054, rel=0.1)
    assert errors["norm"] == 0
    assert errors["router_bias"] < 2**-10


@pytest.mark.parametrize("policy", TIERS)
def test_without_its_record_it_is_looked_at_all_the_same(
    demo_bundle: Built, tmp_path: Path, policy: str
) -> None:
    folder = Path(shutil.copytree(demo_bundle(policy), tmp_path / "bare"))
    (folder / "policyc.json").unlink()
    report = verify_bundle(folder, tiny(), jobs=1)
    assert {found.code for found in report.findings} == {"no-record"}
    assert report.errors is not None


def test_columns_are_divided_by_what_is_stored(demo_bundle: Built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_bundle("hipfire_mq4"), tmp_path / "b"))
    (folder / "policyc.json").unlink()
    path, moe = folder / "model.mq4", "model.layers.2.block_sparse_moe"
    info = open_source(str(path)).tensors[f"{moe}.awq_scale_gate_up.weight"]
    with path.open("r+b") as opened:
        opened.seek(info.start)
        scales = np.frombuffer(opened.read(info.nbytes), np.float16)
        opened.seek(info.start)
        opened.write((scales * np.float16(2)).tobytes())
    report = verify_bundle(folder, tiny(), jobs=1)
    # Half of what they were.
    halved = {
        one.module: one.sums.relative
        for one in report.errors or ()
        if 0.45 < (one.sums.relative or 0) < 0.55
    }
    assert halved.keys() == {f"{moe}.experts.{n}.{w}" for n in range(8) for w in ("w1", "w3")}


@pytest.mark.parametrize("policy", ["hipfire_mq2", "hipfire_mq4"])
def test_a_build_is_its_plan(demo_bundle: Built, said: Said, tmp_path: Path, policy: str) -> None:
    # What the build says comes before all else.
    plan, bundle = tmp_path / "plan.json", demo_bundle(policy)
    said("plan", policy, "--model", TINY, "--imatrix", IMATRIX, "--save", plan)
    compared = json.loads(said("diff", plan, bundle, "--format", "json"))
    assert (compared["changed"], compared["added"], compared["removed"]) == ([], [], [])
    inspected = json.loads(said("inspect", bundle, "--format", "json"))
    document = json.loads(plan.read_text(encoding="utf-8"))
    jsonschema.validate(document, json.loads(said("schema", "plan")))
    assert document["statistics"] == {"imatrix": str(IMATRIX)}
    assert document["pending"] == []
    assert inspected["bpw"] == document["totals"]["bpw"]


def test_two_tiers_differ_in_their_experts(demo_bundle: Built, said: Said) -> None:
    text = said("diff", demo_bundle("hipfire_mq2_lloyd"), demo_bundle("hipfire_mq2"))
    assert "4bit mq4 g256 -> 3bit mq3-lloyd g256" in text
    assert "experts.gate_proj" not in text


def test_inspect_shows_what_every_role_got(demo_bundle: Built, said: Said) -> None:
    text = said("inspect", demo_bundle("hipfire_mq2"))
    assert "experts.gate_proj  0-5     2bit mq2-lloyd g256 by awq" in text
    # By itself the file does not know its roles.
    alone = said("inspect", demo_bundle("hipfire_mq2") / "model.mq2")
    assert "hipfire HFQ, arch_id 10: MiniMax-M2" in alone


def test_explain_tells_who_decided_about_an_expert(said: Said) -> None:
    name = "model.layers.3.block_sparse_moe.experts.5.w3"
    text = said("explain", "hipfire_mq2", name, "--model", TINY)
    assert "2bit mq2-lloyd g256 by awq" in text
    assert "alike       48 modules, layers 0-5" in text


def test_the_record_is_whole(demo_bundle: Built) -> None:
    record = json.loads((demo_bundle("hipfire_mq2") / "policyc.json").read_bytes())
    jsonschema.validate(record, json.loads((DOCUMENT_SCHEMAS / "bundle.json").read_text()))
    sha256 = hashlib.sha256(IMATRIX.read_bytes()).hexdigest()
    assert record["statistics"]["imatrix"] == {"file": "imatrix.gguf", "sha256": sha256}
    assert record["files"].keys() == {"model.mq2"}


def interrupted(planned: Any, out: Path, imatrix: Path) -> None:
    """Leaves a build of the embedded model behind that stopped in the middle."""
    with pytest.raises(KeyboardInterrupt):
        build(*planned(TINY, "hipfire_mq2", imatrix=imatrix), out=out, progress=StoppedAt(100))


def test_an_interrupted_build_goes_on(planned, demo_bundle: Built, tmp_path: Path) -> None:
    interrupted(planned, tmp_path / "out", IMATRIX)
    # The same file in another place is the same.
    moved = Path(shutil.copy(IMATRIX, tmp_path / "imatrix.gguf"))
    found = planned(TINY, "hipfire_mq2", imatrix=moved)
    assert build(*found, out=tmp_path / "out", jobs=1).resumed_nbytes > 0
    assert digests(tmp_path / "out") == digests(demo_bundle("hipfire_mq2"))


def test_another_importance_matrix_is_another_build(
    planned, other_imatrix: Path, tmp_path: Path
) -> None:
    interrupted(planned, tmp_path / "out", IMATRIX)
    plan, inventory = planned(TINY, "hipfire_mq2", imatrix=other_imatrix)
    with pytest.raises(PolicyError, match="the unfinished build of another file of statistics"):
        build(plan, inventory, out=tmp_path / "out")
    build(plan, inventory, out=tmp_path / "out", force=True)
    record = json.loads((tmp_path / "out" / "policyc.json").read_bytes())
    assert record["statistics"]["imatrix"]["file"] == other_imatrix.name


@pytest.fixture
def other_imatrix(tmp_path: Path) -> Path:
    """The embedded model's statistics as a legacy file, which keeps no tokens of experts."""
    imatrix = open_imatrix(IMATRIX)
    statistics = {}
    for layer in range(6):
        for word in ("gate", "up"):
            found = imatrix.sums(f"experts.{word}_proj", layer, n_matrices=8, columns=256)
            statistics[found.entry] = Statistics(found.sums, found.counts)
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy_file(statistics))
    return path


def test_what_a_file_lacks_is_told_when_a_build_starts(
    other_imatrix: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ("--model", str(TINY), "--imatrix", str(other_imatrix))
    assert main(["plan", "hipfire_mq4", *given]) == 0
    assert "warning[imatrix-without-counts]" in capsys.readouterr().out
    assert main(["plan", "hipfire_mq4", *given, "--fail-on-warn"]) == 1
    capsys.readouterr()
    assert main(["build", "hipfire_mq4", *given, "-o", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().err
    assert "warning[imatrix-without-counts]" in told
    # Before the work, not after it.
    assert told.index("imatrix-without-counts") < told.index("encode")


@pytest.mark.parametrize("command", ["plan", "build"])
def test_a_file_that_is_not_there_or_no_matrix(said: Said, tmp_path: Path, command: str) -> None:
    given = (command, "hipfire_mq2", "--model", TINY, "--imatrix")
    assert "error[unreadable-file]" in said(*given, tmp_path / "nowhere.gguf", code=2)
    text = said(*given, TINY / "config.json", code=2)
    assert "error[not-an-imatrix]" in text


def test_a_plan_does_not_need_the_file_that_a_policy_names(said: Said, tmp_path: Path) -> None:
    policy = tmp_path / "p.qpol"
    policy.write_text('extends hipfire_mq2\ncalibration imatrix "later.gguf"\n')
    document = json.loads(said("plan", policy, "--model", TINY, "--format", "json"))
    assert document["pending"] == []
    text = said("build", policy, "--model", TINY, "-o", tmp_path / "out", code=2)
    assert "error[unreadable-file]" in text
    assert "p.qpol:2:22" in text


def test_a_file_of_a_policy_lies_beside_it_and_an_options_where_one_is(
    said: Said, demo_bundle: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "policies", tmp_path / "here"
    beside.mkdir()
    here.mkdir()
    shutil.copy(IMATRIX, beside / "m.gguf")
    policy = beside / "p.qpol"
    policy.write_text('extends hipfire_mq2\ncalibration imatrix "m.gguf"\n')
    monkeypatch.chdir(here)
    said("build", policy, "--model", TINY, "-o", "one", "-q")
    shutil.move(beside / "m.gguf", here / "n.gguf")
    said("build", policy, "--model", TINY, "--imatrix", "n.gguf", "-o", "two", "-q")
    same = digests(demo_bundle("hipfire_mq2"))["model.mq2"]
    assert digests(here / "one")["model.mq2"] == digests(here / "two")["model.mq2"] == same


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"a": NaN}'),
        ("tokenizer_config.json", b'{"a": "\\ud800"}'),
        ("generation_config.json", b"[" * 100_000),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_side_files_that_no_reader_could_read(
    said: Said, tmp_path: Path, file: str, content: bytes
) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    (source / file).write_bytes(content)
    text = said("plan", "hipfire_mq2", "--model", source, code=2)
    assert file in text
    assert "error[" in text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", "{{ messages }}"),
        ("chat_template.json", '{"chat_template": "{{ messages }}"}'),
    ],
)
def test_a_template_without_a_tokenizer_config_is_not_lost(
    write_llama, planned, tmp_path: Path, file: str, content: str
) -> None:
    source = write_llama(hidden=256, inner=256)
    (source / file).write_text(content)
    policy = "name: q\ntarget: hipfire_hfq\nrules: |\n  all: q8\n  norm: f16\n"
    build(*planned(source, policy), out=tmp_path / "out")
    found = open_source(str(tmp_path / "out"))
    assert found.container is not None
    assert found.container.chat_template


@pytest.mark.parametrize(
    ("rules", "value", "dtype"),
    [
        ("all: q8", 1e8, "8bit q8 g32"),
        ("all: 2bit; embed: q8", 3e6, "2bit mq2-lloyd g256"),
        ("all: 4bit; embed: q8", 3e38, "4bit mq4 g256"),
    ],
)
def test_weights_that_a_block_has_no_numbers_for_are_refused(
    write_llama, planned, tmp_path: Path, rules: str, value: float, dtype: str
) -> None:
    def change(tensors: dict[str, tuple[str, Array]]) -> None:
        bits = tensors["lm_head.weight"][1]
        bits[77, :2] = bf16(np.array([value, -value], np.float32))

    source = write_llama(change, hidden=256, inner=256)
    policy = f"name: q\ntarget: hipfire_hfq\nrules: |\n  {rules}\n  norm: f16\n"
    with pytest.raises(PolicyError) as caught:
        build(*planned(source, policy), out=tmp_path / "out")
    (found,) = caught.value.diagnostics
    assert found.code == "value-overflow"
    assert 'tensor "lm_head.weight"' in found.message
    assert "row [77, 0]" in found.message
    assert found.message.endswith(f"too large for {dtype}")
