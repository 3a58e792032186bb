"""The command line as its users see it: results, exit codes, documents, errors."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from policyc.cli import console, main
from tests.models import TINY

ROOT = Path(__file__).parents[3]
POLICY = """\
name: small
target: mlx_affine
vars: {middle: 4}
rules: |
  experts: ${middle}bit
  attention: 4bit
  boundary 1: 8bit
  embed, lm_head: 8bit
tests:
  - router is keep
  - bpw <= 9
"""


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def command(*arguments: object) -> Ran:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return command


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(POLICY, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "small.yaml"
    path.write_text(POLICY, encoding="utf-8")
    out = folder / "bundle"
    arguments = ["build", str(path), "--model", str(TINY), "-o", str(out), "-q", "-j", "2"]
    assert main(arguments) == 0
    return out


def fits_its_schema(document: Any) -> bool:
    path = ROOT / "policy_dsl" / "document_schemas" / f"{document['kind']}.json"
    jsonschema.validate(document, json.loads(path.read_text(encoding="utf-8")))
    return True


class TestHelp:
    def test_every_command_explains_itself(self, run: Any) -> None:
        listed = re.findall(r"^  (\w+)  ", run("--help").out.split("Commands:")[1], re.M)
        assert {"check", "plan", "explain", "build", "verify", "diff", "inspect"} <= set(listed)
        assert {"fmt", "schema", "formats", "models"} <= set(listed)
        for name in listed:
            assert len(run(name, "--help").out.splitlines()) > 5

    def test_version(self, run: Any) -> None:
        assert re.fullmatch(r"policyc \d+\.\d+\.\d+\n", run("--version").out)

    @pytest.mark.parametrize(
        "arguments", [["nonsense"], ["plan"], ["plan", "a", "--format", "xml"], ["plan", "a", "-z"]]
    )
    def test_wrong_usage_is_code_2_on_stderr(self, run: Any, arguments: list[str]) -> None:
        ran = run(*arguments)
        assert (ran.code, ran.out) == (2, "")
        assert "Usage" in ran.err

    @pytest.mark.parametrize(
        ("arguments", "where"),
        [
            (["plan", "config_i", "--model", ""], "--model"),
            (["plan", "config_i", "--imatrix", ""], "--imatrix"),
            (["plan", "config_i", "--saliency", ""], "--saliency"),
            (["plan", "config_i", "--target", ""], "--target"),
            (["plan", "config_i", "--save", ""], "--save"),
            (["build", "config_i", "-o", "", "--force"], "--output"),
            (["check", ""], "PATH"),
            (["explain", "config_i", ""], "TENSOR"),
            (["verify", ""], "BUNDLE"),
            (["verify", "bundle", "--source", ""], "--source"),
            (["inspect", ""], "CHECKPOINT"),
            (["inspect", "bundle", "--save-headers", ""], "--save-headers"),
            (["diff", "config_i", ""], "B"),
            (["fmt", ""], "FILE"),
            (["schema", ""], "DOCUMENT"),
            (["formats", ""], "TARGET"),
        ],
    )
    def test_an_empty_word_is_wrong_usage(self, run: Any, arguments: list[str], where: str) -> None:
        """What is left of `"$OUT"` where no one set it; as a path it is the current folder."""
        ran = run(*arguments)
        assert (ran.code, ran.out) == (2, "")
        assert re.search(rf"Invalid value for '\[?{where}.*: it is empty", ran.err)


class TestPlan:
    def test_the_catalog_model_is_planned_to_the_published_size(self, run: Any) -> None:
        ran = run("plan", "config_i")
        assert ran.code == 0
        assert "230.12 GB = 214.32 GiB -> 92.87 GB = 86.49 GiB, 59.6 % smaller" in ran.out
        assert "3.2488 bpw (8 x bytes of all output tensors / 228,689,764,864" in ran.out

    def test_document(self, run: Any, policy: Path) -> None:
        ran = run("plan", policy, "--model", TINY, "--format", "json", "--tensors")
        assert ran.code == 0
        document = ran.document
        assert fits_its_schema(document)
        assert document["totals"]["tensor_nbytes"] == sum(t["nbytes"] for t in document["tensors"])
        assert [test["passed"] for test in document["tests"]] == [True, True]
        assert "tensors" not in run("plan", policy, "--model", TINY, "--format", "json").document

    def test_every_tensor_names_its_sources_and_its_rule(self, run: Any, policy: Path) -> None:
        ran = run("plan", policy, "--model", TINY, "--format", "json", "--tensors")
        experts = [t for t in ran.document["tensors"] if t["role"] == "experts.down_proj"]
        assert len(experts[0]["sources"]) == 2 * 8
        assert {row["rule"] for row in experts} == {"small.yaml:5", "small.yaml:7"}

    def test_a_failing_test_is_code_1_and_the_plan_is_still_shown(
        self, run: Any, policy: Path
    ) -> None:
        policy.write_text(POLICY.replace("bpw <= 9", "bpw <= 2"), encoding="utf-8")
        ran = run("plan", policy, "--model", TINY)
        assert ran.code == 1
        assert re.search(r"FAILED  bpw <= 2  \(it is [\d.]+\)", ran.out)

    def test_variables_are_set(self, run: Any, policy: Path) -> None:
        ran = run("plan", policy, "--model", TINY, "--set", "middle=2")
        assert "2bit affine g64" in ran.out
        wrong = run("plan", policy, "--model", TINY, "--set", "middel=2")
        assert wrong.code == 2
        assert 'did you mean "middle"?' in wrong.err
        assert run("plan", policy, "--model", TINY, "--set", "middle").code == 2

    def test_a_saved_plan_is_whole(self, run: Any, policy: Path, tmp_path: Path) -> None:
        saved = tmp_path / "plan.json"
        assert run("plan", policy, "--model", TINY, "--save", saved).code == 0
        document = json.loads(saved.read_text(encoding="utf-8"))
        assert fits_its_schema(document)
        assert document["forms"]
        assert sum(len(row[-1]) for row in document["rows"]) == document["totals"]["tensors"]

    def test_a_plan_that_cannot_be_saved_is_code_2(
        self, run: Any, policy: Path, tmp_path: Path
    ) -> None:
        ran = run("plan", policy, "--model", TINY, "--save", tmp_path / "no" / "plan.json")
        assert ran.code == 2
        assert "error[system-refused]" in ran.err

    def test_markdown(self, run: Any, policy: Path) -> None:
        ran = run("plan", policy, "--model", TINY, "--format", "markdown")
        assert "| role | layers | treatment |" in ran.out

    def test_no_model(self, run: Any, policy: Path) -> None:
        ran = run("plan", policy)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("error[no-model]")

    def test_errors_are_json_where_json_is_asked_for(self, run: Any, policy: Path) -> None:
        policy.write_text("target: mlx_affine\nrules: |\n  expert: 4bit\n", encoding="utf-8")
        ran = run("plan", policy, "--model", TINY, "--format", "json")
        assert (ran.code, ran.out) == (2, "")
        document = json.loads(ran.err)
        assert fits_its_schema(document)
        (found,) = document["findings"]
        assert (found["code"], found["line"], found["column"]) == ("unknown-role", 3, 3)

    def test_the_same_input_gives_the_same_text(self, run: Any, policy: Path) -> None:
        first, second = (run("plan", policy, "--model", TINY) for _ in range(2))
        assert first == second
        assert "\x1b" not in first.out


class TestCheck:
    def test_a_fine_policy(self, run: Any, policy: Path) -> None:
        ran = run("check", policy, "--model", TINY)
        assert ran.code == 0
        assert "tiny-minimax-m2 as mlx_affine" in ran.out

    def test_all_defects_of_all_policies_at_once(
        self, run: Any, policy: Path, tmp_path: Path
    ) -> None:
        one, other = tmp_path / "one.qpol", tmp_path / "other.qpol"
        one.write_text("target mlx_affine\nexperts.dwon_proj: 4bit\nall: 7bit affine\n")
        other.write_text("target mlx_affine\ngate: 4bit\n")
        ran = run("check", one, policy, other, "--format", "json")
        assert ran.code == 1
        assert fits_its_schema(ran.document)
        found = [[each["code"] for each in p["findings"]] for p in ran.document["policies"]]
        assert [len(codes) for codes in found] == [2, 0, 1]
        assert ran.document["errors"] == 3

    def test_the_sentence_of_another_target(self, run: Any, tmp_path: Path) -> None:
        path = tmp_path / "s.qpol"
        path.write_text("down_proj: 4bit mxtq; boundary layers 0-1,60-61: 8bit\n")
        for model in ([], ["--model", "minimax_m2.7"]):
            ran = run("check", path, "--target", "mlx_affine", *model)
            assert ran.code == 1
            assert ran.out.count("error[") == 1
            assert "scheme mxtq belongs to target jangtq_prestack" in ran.out

    def test_github_annotations(self, run: Any, policy: Path) -> None:
        policy.write_text("target: mlx_affine\nrules: |\n  all: 7bit affine\n", encoding="utf-8")
        ran = run("check", policy, "--format", "github")
        assert ran.code == 1
        assert re.match(
            r"::error file=.*small\.yaml,line=3,col=\d+,title=unsupported-bits::", ran.out
        )

    def test_sarif(self, run: Any, policy: Path) -> None:
        policy.write_text("target: mlx_affine\nrules: |\n  all: 7bit affine\n", encoding="utf-8")
        log = run("check", policy, "--format", "sarif").document
        assert log["version"] == "2.1.0"
        (result,) = log["runs"][0]["results"]
        rules = log["runs"][0]["tool"]["driver"]["rules"]
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"] == "unsupported-bits"
        region = result["locations"][0]["physicalLocation"]["region"]
        assert region["startLine"] == 3

    def test_warnings_count_only_if_asked(self, run: Any, policy: Path) -> None:
        quantized = POLICY.replace("  attention: 4bit", "  attention, router: 4bit")
        policy.write_text(quantized.replace("  - router is keep\n", ""), encoding="utf-8")
        arguments = ("check", policy, "--model", TINY)
        assert run(*arguments).code == 0
        assert run(*arguments, "--fail-on-warn").code == 1

    def test_a_failing_test_is_an_error(self, run: Any, policy: Path) -> None:
        policy.write_text(POLICY.replace("bpw <= 9", "bpw <= 2"), encoding="utf-8")
        ran = run("check", policy, "--model", TINY)
        assert ran.code == 1
        assert "error[test-failed]: the test `bpw <= 2` fails" in ran.out

    def test_a_missing_file_is_a_finding(self, run: Any) -> None:
        ran = run("check", "nowhere.yaml")
        assert ran.code == 1
        assert "nowhere.yaml" in ran.out


class TestExplain:
    def test_source_output_and_scale_names_mean_the_same(self, run: Any, policy: Path) -> None:
        source = "model.layers.2.block_sparse_moe.experts.3.w2.weight"
        output = "model.layers.2.block_sparse_moe.switch_mlp.down_proj"
        names = [source, f"{source}_scale_inv", output, f"{output}.scales"]
        ran = [run("explain", policy, name, "--model", TINY, "--format", "json") for name in names]
        assert {one.document["module"] for one in ran} == {output}
        assert ran[0].document["expert"] == ran[1].document["expert"] == 3

    def test_rules_that_lost_and_bytes(self, run: Any, policy: Path) -> None:
        name = "model.layers.0.self_attn.q_proj.weight"
        document = run("explain", policy, name, "--model", TINY, "--format", "json").document
        assert fits_its_schema(document)
        outcomes = [(rule["text"], rule["outcome"]) for rule in document["rules"]]
        assert outcomes == [("attention: 4bit", "lost"), ("boundary 1: 8bit", "decided")]
        assert sum(tensor["nbytes"] for tensor in document["tensors"]) == document["nbytes"]

    def test_the_guard_is_named(self, run: Any, policy: Path) -> None:
        name = "model.layers.0.block_sparse_moe.gate.weight"
        ran = run("explain", policy, name, "--model", TINY)
        assert "the guard: router is kept unless a rule names it" in ran.out

    def test_a_glob_with_one_meaning(self, run: Any, policy: Path) -> None:
        ran = run("explain", policy, "model.layers.[1-4].self_attn.q_proj", "--model", TINY)
        assert ran.code == 0
        assert "4 modules, layers 1-4" in ran.out

    def test_a_glob_with_several_meanings(self, run: Any, policy: Path) -> None:
        ran = run("explain", policy, "model.layers.*.self_attn.q_proj", "--model", TINY)
        assert ran.code == 2
        assert "means 2 different decisions" in ran.err

    def test_a_typo(self, run: Any, policy: Path) -> None:
        ran = run("explain", policy, "model.layers.3.self_attn.q_prj.weight", "--model", TINY)
        assert ran.code == 2
        assert 'did you mean "model.layers.3.self_attn.q_proj.weight"?' in ran.err


class TestBuildAndVerify:
    def test_the_result_is_on_stdout(self, run: Any, policy: Path, tmp_path: Path) -> None:
        out = tmp_path / "my bundle"
        ran = run("build", policy, "--model", TINY, "-o", out, "--format", "json", "-j", 1)
        assert ran.code == 0
        document = ran.document
        assert fits_its_schema(document)
        on_disk = {path.name: path.stat().st_size for path in out.iterdir()}
        assert document["files"] == on_disk
        assert document["verify"].startswith("policyc verify '")
        planned = run("plan", policy, "--model", TINY, "--format", "json").document
        assert planned["totals"]["file_nbytes"] == sum(on_disk.values())

    def test_progress_is_json_where_asked_for(self, run: Any, policy: Path, tmp_path: Path) -> None:
        arguments = ("build", policy, "--model", TINY, "-o", tmp_path / "b", "--progress", "json")
        lines = [json.loads(line) for line in run(*arguments).err.splitlines()]
        assert all(fits_its_schema(line) for line in lines)
        assert {line["stage"] for line in lines if line["kind"] == "progress"} >= {"encode"}

    def test_what_is_there_is_not_overwritten(self, run: Any, policy: Path, bundle: Path) -> None:
        ran = run("build", policy, "--model", TINY, "-o", bundle)
        assert ran.code == 2
        assert "--force" in ran.err

    def test_no_build_after_a_failing_test(self, run: Any, policy: Path, tmp_path: Path) -> None:
        policy.write_text(POLICY.replace("bpw <= 9", "bpw <= 2"), encoding="utf-8")
        ran = run("build", policy, "--model", TINY, "-o", tmp_path / "b")
        assert ran.code == 1
        assert not (tmp_path / "b").exists()

    @pytest.mark.parametrize("size", ["much", "-1", "12 parsec"])
    def test_a_size_that_is_none(self, run: Any, policy: Path, size: str) -> None:
        ran = run("build", policy, "--model", TINY, "--max-memory", size)
        assert ran.code == 2

    def test_a_fine_bundle(self, run: Any, bundle: Path) -> None:
        ran = run("verify", bundle)
        assert ran.code == 0
        assert "all is well" in ran.out

    def test_errors_against_the_source(self, run: Any, bundle: Path) -> None:
        ran = run("verify", bundle, "--source", TINY, "--format", "json")
        assert ran.code == 0
        assert fits_its_schema(ran.document)
        roles = {row["role"]: row for row in ran.document["errors"]["roles"]}
        assert roles["norm"]["relative_frobenius"] == 0
        assert 0.01 < roles["experts.gate_proj"]["relative_frobenius"] < 0.2

    def test_no_bundle(self, run: Any, tmp_path: Path) -> None:
        assert run("verify", tmp_path / "nothing").code == 2
        assert run("verify", TINY).code == 2


class TestDiff:
    def test_policy_saved_plan_and_bundle_are_equal(
        self, run: Any, policy: Path, bundle: Path, tmp_path: Path
    ) -> None:
        saved = tmp_path / "plan.json"
        run("plan", policy, "--model", TINY, "--save", saved)
        for a, b in ((policy, saved), (saved, bundle), (bundle, policy)):
            ran = run("diff", a, b, "--model", TINY, "--exit-code", "--format", "json")
            assert ran.code == 0
            assert fits_its_schema(ran.document)
            assert ran.document["changed"] == []

    def test_a_changed_treatment(self, run: Any, policy: Path, bundle: Path) -> None:
        policy.write_text(POLICY.replace("middle: 4", "middle: 3"), encoding="utf-8")
        ran = run("diff", bundle, policy, "--model", TINY, "--format", "json", "--exit-code")
        assert ran.code == 1
        changed = ran.document["changed"]
        assert {change["role"] for change in changed} == {
            "experts.gate_proj",
            "experts.up_proj",
            "experts.down_proj",
        }
        assert all(change["layers"] == [1, 2, 3, 4] for change in changed)
        assert ran.document["nbytes_delta"] == sum(c["nbytes_delta"] for c in changed) < 0

    def test_what_is_no_plan(self, run: Any, tmp_path: Path) -> None:
        wrong = tmp_path / "wrong.json"
        wrong.write_text("{}")
        assert run("diff", wrong, wrong).code == 2


class TestInspect:
    def test_a_source(self, run: Any) -> None:
        document = run("inspect", TINY, "--format", "json").document
        assert fits_its_schema(document)
        assert (document["family"], document["layers"], document["experts"]) == ("minimax_m2", 6, 8)
        assert sum(role["parameters"] for role in document["roles"]) == document["parameters"]
        assert sum(role["nbytes"] for role in document["roles"]) == document["nbytes"]

    def test_recorded_headers_stand_for_the_model(
        self, run: Any, policy: Path, tmp_path: Path
    ) -> None:
        recorded = tmp_path / "tiny.json"
        assert run("inspect", TINY, "--save-headers", recorded).code == 0
        plans = [
            run("plan", policy, "--model", model, "--format", "json").document["totals"]
            for model in (TINY, recorded)
        ]
        assert plans[0] == plans[1]

    def test_a_bundle(self, run: Any, bundle: Path) -> None:
        ran = run("inspect", bundle, "--format", "json")
        assert fits_its_schema(ran.document)
        assert ran.document["title"].startswith("small (")

    def test_nothing(self, run: Any, tmp_path: Path) -> None:
        assert run("inspect", tmp_path).code == 2


class TestFmt:
    def test_files_are_rewritten_once(self, run: Any, policy: Path) -> None:
        assert run("fmt", "--check", policy).code == 1
        assert policy.read_text(encoding="utf-8") == POLICY
        assert run("fmt", policy).code == 0
        assert run("fmt", "--check", policy).code == 0

    def test_there_and_back(self, run: Any, policy: Path, tmp_path: Path) -> None:
        run("fmt", policy)
        other = tmp_path / "small.qpol"
        other.write_text(run("fmt", "--to", "dsl", policy).out, encoding="utf-8")
        assert run("fmt", "--to", "yaml", other).out == policy.read_text(encoding="utf-8")

    def test_stdin(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        given = io.TextIOWrapper(io.BytesIO(b"experts  :  4bit\n"))
        monkeypatch.setattr(sys, "stdin", given)
        assert run("fmt", "-").out == "experts: 4bit\n"

    @pytest.mark.parametrize(
        ("given", "code"), [(b"#" * (2**20 + 1), "too-large"), (b"# \xff", "not-utf8")]
    )
    def test_stdin_is_held_to_what_files_are(
        self, run: Any, monkeypatch: pytest.MonkeyPatch, given: bytes, code: str
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        found = run("fmt", "-")
        assert (found.code, f"error[{code}]: stdin" in found.err) == (2, True)

    def test_what_the_shell_passes_is_printed(self, run: Any) -> None:
        receiver, sender = os.pipe()
        os.write(sender, b"experts  :  4bit\n")
        os.close(sender)
        assert run("fmt", f"/dev/fd/{receiver}").out == "experts: 4bit\n"
        os.close(receiver)

    def test_a_broken_file_is_left_as_it_is(self, run: Any, policy: Path) -> None:
        policy.write_text("rules: [", encoding="utf-8")
        assert run("fmt", policy).code == 2
        assert policy.read_text(encoding="utf-8") == "rules: ["


class TestCatalogs:
    @pytest.mark.parametrize("command", ["formats", "models"])
    def test_lists(self, run: Any, command: str) -> None:
        assert fits_its_schema(run(command, "--format", "json").document)
        assert run(command).code == run(command, "--format", "markdown").code == 0

    def test_refused_families_say_why(self, run: Any) -> None:
        assert re.search(r"gpt_oss: its experts", run("formats", "gptq").out)

    def test_models_say_which_targets_build_a_family(self, run: Any) -> None:
        families = run("models", "--format", "json").document["families"]
        targets = {one["target"]: one for one in families if one["family"] == "kimi_linear"}
        assert targets["mlx_affine"]["model_types"] == ["kimi_linear"]
        assert targets["mlx_affine"]["readers"] == ["mlx-lm", "mlx-swift-lm"]
        assert targets["gptq"]["readers"] == ["vllm"]
        refused = targets["jangtq_prestack"]
        assert (refused["supported"], refused["readers"]) == (False, [])
        assert "mlx-lm's class calls them otherwise" in refused["reason"]
        shown = run("models").out
        assert re.search(r"^ +kimi_linear +kimi_linear +yes +no +no +yes$", shown, re.M)
        assert re.search(r"its experts are stored as interleaved rows.*: gpt_oss$", shown, re.M)

    def test_schemas_are_schemas(self, run: Any) -> None:
        for path in (ROOT / "policy_dsl" / "document_schemas").glob("*.json"):
            schema = run("schema", path.stem).document
            jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.Draft202012Validator.check_schema(run("schema").document)

    def test_the_schema_of_a_record(self, run: Any, bundle: Path) -> None:
        record = json.loads((bundle / "policyc.json").read_text(encoding="utf-8"))
        jsonschema.validate(record, run("schema", record["kind"]).document)

    def test_an_unknown_schema(self, run: Any) -> None:
        assert 'did you mean "plan"?' in run("schema", "plann").err


def start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "policyc", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, **{**pipes, **options})


class TestProgram:
    """What only a real program shows."""

    def test_a_reader_that_goes_away(self, policy: Path) -> None:
        ran = start("plan", policy, "--model", TINY, "--tensors")
        assert ran.stdout is not None
        ran.stdout.close()
        assert ran.stderr is not None
        errors = ran.stderr.read()
        assert (ran.wait(), errors) == (console.READER_GONE, b"")

    def test_a_terminal_that_lacks_characters(self, policy: Path) -> None:
        environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
        ran = start("plan", "mlx_mixed_2_6", "--model", TINY, env=environment)
        out, err = ran.communicate()
        assert (ran.returncode, err) == (0, b"")
        assert b"Totals" in out
