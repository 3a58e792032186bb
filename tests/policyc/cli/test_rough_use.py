"""The command line in rough surroundings: closed streams, full logs, names of any bytes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from policyc.cli import console, main
from tests.models import TINY

ROOT = Path(__file__).parents[3]
POLICY = "target mlx_affine\nvar bits = 4\nall: ${bits}bit\n"


def shell(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What bash does with a line in which `policyc` stands for this program."""
    line = text.replace("policyc", f"'{sys.executable}' -m policyc")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-c", line],
        check=False,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("policyc models >&-", 0),
        ("policyc plan nope.yaml 2>&-", 2),
        ("policyc plan nope.yaml >&- 2>&- <&-", 2),
    ],
)
def test_closed_streams_are_no_crash(line: str, code: int, tmp_path: Path) -> None:
    ran = shell(line, tmp_path)
    assert ran.returncode == code
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("library", ["click", "lark", "numba"])
def test_ctrl_c_while_libraries_load_is_one_line(library: str, tmp_path: Path) -> None:
    """A module of that name stands before the library, and gets the signal while it loads."""
    signal = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / f"{library}.py").write_text(signal, encoding="utf-8")
    (tmp_path / "mine.qpol").write_text(POLICY, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    # Who starts tests in the background ignores SIGINT, and children inherit that.
    program = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from policyc.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", program, "build", tmp_path / "mine.qpol"]
    ran = subprocess.run(
        [*command, "--model", TINY, "-o", tmp_path / "out"],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "interrupted\n")


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no full device here")
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("policyc plan nope.yaml 2> /dev/full", 2),
        ("policyc plan --nope 2> /dev/full", 2),
        ("policyc models > /dev/full", 2),
        ("policyc --help > /dev/full", 2),
    ],
)
def test_a_full_disk_under_the_output(line: str, code: int, tmp_path: Path) -> None:
    ran = shell(line, tmp_path)
    assert ran.returncode == code
    assert "Traceback" not in ran.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / os.fsdecode(b"mod\xffel")
    shutil.copytree(TINY, source)
    policy = tmp_path / os.fsdecode(b"pol\xff.qpol")
    policy.write_text(POLICY, encoding="utf-8")
    out = tmp_path / os.fsdecode(b"out\xff")
    assert main(["build", str(policy), "--model", str(source), "-o", str(out), "-q"]) == 0
    capsys.readouterr()
    assert main(["verify", str(out), "--source", str(source), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    record = json.loads((out / "policyc.json").read_text(encoding="utf-8"))
    assert record["source"]["id"] == r"mod\xffel"


def test_diff_sets_variables_of_the_side_that_has_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "mine.qpol"
    policy.write_text(POLICY, encoding="utf-8")
    sides = ["diff", "mlx_4bit", str(policy), "--model", str(TINY), "--format", "json"]
    assert main([*sides, "--set", "bits=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "8bit affine g64" in {each["after"] for each in found["changed"]}
    assert main([*sides, "--set", "bist=8"]) == 2
    assert 'did you mean \\"bits\\"?' in capsys.readouterr().err


def test_check_tells_every_broken_test_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "mine.qpol"
    tests = "test bpw <= 1\ntest size(vision) < 1GB\ntest router is 8bit\n"
    policy.write_text(POLICY + "attention: 4bit\nattention: 3bit\n" + tests, encoding="utf-8")
    assert main(["check", str(policy), "--model", str(TINY), "--format", "json"]) == 1
    (checked,) = json.loads(capsys.readouterr().out)["policies"]
    codes = [found["code"] for found in checked["findings"]]
    assert codes.count("test-failed") == 2
    assert "test-without-tensors" in codes
    assert "shadowed-rule" in codes


def test_fmt_cannot_check_and_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = tmp_path / "mine.qpol"
    policy.write_text(POLICY, encoding="utf-8")
    assert main(["fmt", "--check", "--to", "yaml", str(policy)]) == 2
    assert "--check: cannot be combined with --to" in capsys.readouterr().err


def test_markdown_keeps_the_lines_of_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "mine.qpol"
    policy.write_text("target mlx_affine\nall: 4bit\nall: 3bit\n", encoding="utf-8")
    assert main(["plan", str(policy), "--model", str(TINY), "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    assert "```text\nwarning[shadowed-rule]" in shown
    assert "2 | all: 4bit\n  | ^^^^^^^^^\n" in shown


@pytest.mark.parametrize(("form", "lines"), [("json", 0), ("text", 1)])
def test_log_lines_of_libraries_do_not_stand_among_json(
    form: str, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    @console.guarded
    def command(*, format: str) -> None:
        logging.getLogger("huggingface_hub").warning("Retrying %s", format)

    command(format=form)
    assert len(caplog.records) == lines
