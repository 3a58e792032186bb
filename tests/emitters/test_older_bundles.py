"""What earlier versions wrote is read, compared and replaced; its tensors are still the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from older_bundles import TARGETS, unpack

from emitters.core.build import build
from emitters.core.bundle_reading import open_bundle
from emitters.core.record import read_record
from emitters.core.verify import verify_bundle
from policy_dsl.language.load import load
from policy_dsl.sources.reference import open_source
from policyc.cli import main as policyc
from policyc.workflow import plan_for

EACH = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What version 1 wrote."""
    return unpack(tmp_path_factory.mktemp("older"))


@EACH
def test_their_records_are_read_and_their_values_made_again(older: Path, target: str) -> None:
    record = read_record(older / target)
    assert record is not None
    assert (record.policyc, record.codec_version) == ("0.1.0", None)
    assert record.owners.keys() == record.tensors.keys()
    assert verify_bundle(older / target, jobs=1).ok
    report = verify_bundle(older / target, open_source(str(older / "source")), jobs=1)
    assert {found.code for found in report.findings} <= {"no-tokenizer"}
    assert {one.judged_by for one in report.errors or ()} == {"equal", "coded again"}


@EACH
def test_builds_of_today_have_their_tensors_modules_and_files(
    older: Path, target: str, tmp_path: Path
) -> None:
    source = open_source(str(older / "source"))
    plan = plan_for(load(older / f"{target}.yaml"), source, None)
    build(plan, source, out=tmp_path / "out", jobs=1)
    # Opened: what version 1 leaves out is a fact of the scheme.
    opened = open_bundle(older / target), open_bundle(tmp_path / "out")
    old, new = ([one._replace(tensors={}) for one in bundle.modules] for bundle in opened)
    assert new == old
    then, now = (bundle.record for bundle in opened)
    assert then is not None
    assert now is not None
    assert now.tensors == then.tensors
    assert now.owners == then.owners
    assert now.files == then.files
    assert (now.omitted, now.pruning) == (then.omitted, then.pruning)
    assert (now.source, now.source_digest) == (then.source, then.source_digest)


@EACH
def test_they_are_compared_with_plans_of_any_age(
    older: Path, target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(older)
    assert policyc(["plan", f"{target}.yaml", "--model", "source", "--save", "now.json"]) == 0
    plans = f"{target}.plan.json", f"{target}.later.plan.json", "now.json"
    for first, second in ((target, plans[2]), *((plan, plans[2]) for plan in plans[:2])):
        capsys.readouterr()
        assert policyc(["diff", first, second, "--exit-code", "--format", "json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert [document[key] for key in ("changed", "added", "removed")] == [[], [], []]
    assert policyc(["inspect", target, "--format", "json"]) == 0


@EACH
def test_force_replaces_them(older: Path, target: str, tmp_path: Path) -> None:
    source = open_source(str(older / "source"))
    folder = unpack(tmp_path) / target
    build(plan_for(load(older / f"{target}.yaml"), source, None), source, out=folder, force=True)
    document = json.loads((folder / "policyc.json").read_text())
    assert document["schema_version"] == 2
    assert verify_bundle(folder, jobs=1).ok
