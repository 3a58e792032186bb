"""`policyc check`: policies in files and folders, against their models, in every form."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest

from policyc.cli import main
from tests.models import TINY

ROOT = Path(__file__).parents[3]
GOOD = f"target mlx_affine\nmodel {TINY}\nall: 4bit g32\n"


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `policyc check` on words; exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["check", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def write(path: Path, text: str = GOOD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_is_searched_for_policies(check: Any, tmp_path: Path) -> None:
    write(tmp_path / "a.qpol")
    write(tmp_path / "deep/b.yaml", f"extends: ../a.qpol\nmodel: {TINY}\n")
    write(tmp_path / "deep/broken.yml", "rules: [\n")
    write(tmp_path / "workflow.yml", "on: push\njobs: {}\n")
    write(tmp_path / "compose.yaml", "services:\n  web:\n    extends: {file: a, service: b}\n")
    write(tmp_path / ".hidden/c.qpol")
    write(tmp_path / "env/pyvenv.cfg")
    write(tmp_path / "env/lib/d.qpol")
    outside = write(tmp_path.parent / f"{tmp_path.name}-outside.qpol")
    (tmp_path / "link.qpol").symlink_to(outside)
    code, out, _ = check(tmp_path)
    assert code == 1
    assert [line.split(": ")[0] for line in out.splitlines() if ": no findings" in line] == [
        f"{tmp_path}/a.qpol",
        f"{tmp_path}/deep/b.yaml",
    ]
    assert f"{tmp_path}/deep/broken.yml: 1 error\n" in out
    assert out.endswith("3 policies, 1 error; 2 other YAML files not read\n")


def test_without_a_path_the_current_folder_is_checked(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "p.qpol")
    monkeypatch.chdir(tmp_path)
    code, out, _ = check()
    assert (code, out.splitlines()[-1]) == (0, "1 policy, no findings")


def test_standard_input_is_a_policy(check: Any, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "policyc", "check", "-"]
    ran = subprocess.run(words, input=GOOD, capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("1 policy, no findings\n")


def test_a_policy_is_planned_on_its_own_model(check: Any, tmp_path: Path) -> None:
    """Layers that the model does not have, and a test that fails, need the model."""
    write(tmp_path / "p.qpol", f"{GOOD}attention in layers 0-99: 8bit\n")
    write(tmp_path / "q.qpol", f"{GOOD}test router is 8bit\n")
    code, out, _ = check(tmp_path)
    assert code == 1
    assert "number-outside-model" in out
    assert "test-failed" in out
    assert "1 error (against tiny-minimax-m2 as mlx_affine)" in out
    code, out, _ = check(tmp_path, "--alone")
    assert code == 0
    assert "p.qpol: no findings (its text alone: as asked for)" in out


def test_a_model_that_only_the_hub_has_is_not_fetched(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    write(tmp_path / "p.qpol", "target mlx_affine\nmodel someone/some-model\nall: 4bit\n")
    code, out, _ = check(tmp_path)
    assert code == 0
    assert "its text alone: someone/some-model is not here; --online asks the hub" in out


def test_what_targets_have_alike_is_shown_once(check: Any, tmp_path: Path) -> None:
    rules = "router: 4bit g32\nattention in layers 0-99: 8bit"
    write(tmp_path / "p.qpol", f"targets mlx_affine, gptq\nmodel {TINY}\nall: 4bit\n{rules}\n")
    code, out, _ = check(tmp_path)
    assert code == 1
    assert out.count("number-outside-model") == 1
    assert "for mlx_affine, gptq" in out


ALLOWED = {
    "on its line": "router: 4bit g32  # policyc: allow CODE\n",
    "above it": "# policyc: allow CODE\nrouter: 4bit g32\n",
    "in the policy": "allow CODE\nrouter: 4bit g32\n",
    "among others": "router: 4bit g32 # policyc: allow shadowed-rule, CODE\n",
}


@pytest.mark.parametrize("place", ALLOWED)
def test_a_warning_can_be_accepted(check: Any, tmp_path: Path, place: str) -> None:
    text = f"target mlx_affine\nmodel {TINY}\nall: 4bit g32\n{ALLOWED[place]}"
    path = write(tmp_path / "p.qpol", text.replace("CODE", "below-usual-width"))
    _, out, _ = check(path)
    assert "below-usual-width]" not in out
    assert ("unused-allow" in out) == (place == "among others")
    write(path, text.replace("CODE", "shadowed-rule"))
    code, out, _ = check(path, "--fail-on-warn")
    assert code == 1
    assert "below-usual-width]" in out
    assert "warning[unused-allow]: nothing here has the finding shadowed-rule" in out
    write(path, text.replace("CODE", "below-usual-widht"))
    code, out, _ = check(path)
    assert code == 1
    assert 'error[unknown-code]: there is no finding with the code "below-usual-widht"' in out
    assert 'did you mean "below-usual-width"?' in out
    write(path, text.replace("CODE", "unknown-role"))
    assert "error[error-allowed]" in check(path)[1]


def test_options_accept_and_select(check: Any, tmp_path: Path) -> None:
    rules = "all: 4bit g32\nrouter: 4bit g32\nembed: 2bit g32\nembed: 4bit g32\n"
    path = write(tmp_path / "p.qpol", f"target mlx_affine\nmodel {TINY}\n{rules}")
    _, out, _ = check(path)
    assert out.count("warning[") == 2
    _, out, _ = check(path, "--allow", "below-usual-width")
    assert out.count("warning[") == out.count("warning[shadowed-rule]") == 1
    _, out, _ = check(path, "--select", "below-usual-width")
    assert out.count("warning[") == out.count("warning[below-usual-width]") == 1
    code, _, err = check(path, "--select", "below")
    assert code == 2
    assert 'there is no code "below"' in err


def test_notes_never_fail(check: Any, tmp_path: Path) -> None:
    text = f"target mlx_affine\nmodel {TINY}\nall: 8bit g32\n"
    path = write(tmp_path / "p.qpol", text.replace("8bit g32", "f32"))
    code, out, _ = check(path, "--fail-on-warn")
    assert "note[larger-than-source]" in out
    assert code == 0
    assert check(path, "--format", "github")[1].startswith("::notice ")


BAD = f"{GOOD}attention in layers 0-99: 8bit\n"


def test_json_is_as_its_schema_says(check: Any, tmp_path: Path) -> None:
    found = json.loads(check(write(tmp_path / "p.qpol", BAD), "--format", "json")[1])
    schema = json.loads((ROOT / "policy_dsl/document_schemas/check.json").read_text())
    jsonschema.validate(found, schema)
    assert (found["errors"], found["other_files"]) == (1, 0)


def test_gitlab_gets_the_fields_that_it_needs(check: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "p.qpol", BAD)
    (entry,) = json.loads(check(path, "--format", "gitlab")[1])
    assert entry["check_name"] == "number-outside-model"
    assert entry["severity"] in {"info", "minor", "major", "critical", "blocker"}
    assert entry["location"] == {"path": str(path), "lines": {"begin": 4}}
    assert "outside the model" in entry["description"]
    # The same finding in another line is the same finding.
    write(path, f"# a line more\n{BAD}")
    (again,) = json.loads(check(path, "--format", "gitlab")[1])
    assert again["fingerprint"] == entry["fingerprint"]
    assert again["location"]["lines"] == {"begin": 5}


def test_junit_has_a_suite_for_each_policy(check: Any, tmp_path: Path) -> None:
    write(tmp_path / "bad.qpol", BAD)
    write(tmp_path / "good.qpol")
    code, out, _ = check(tmp_path, "--format", "junit")
    assert code == 1
    suites = ElementTree.parse(io.StringIO(out)).getroot()
    counts = {Path(one.attrib["name"]).name: one.attrib["failures"] for one in suites}
    assert counts == {"bad.qpol": "1", "good.qpol": "0"}
    (failure,) = suites.iter("failure")
    assert failure.attrib["type"] == "number-outside-model"


def test_bundled_policies_have_no_warnings(check: Any) -> None:
    code, out, _ = check(ROOT / "policies", "--fail-on-warn")
    assert code == 0, out
