"""Files of strangers that would cost gigabytes: each command stays below one, and answers."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from policy_dsl.planning.record import record_digest
from policyc.cli import main
from tests.models import TINY

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not say what was used"
)
GIB = 1 << 30
# Runs a command, and says last what it took; of its own process, whoever started it.
PROGRAM = """\
import sys
from policyc.cli import main
code = main(sys.argv[1:])
status = open("/proc/self/status").read()
print(code, int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""


def _answer(*arguments: str | Path) -> tuple[int, str]:
    """The exit code and what was printed; fails if it took a minute or a GiB."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in run.stderr, run.stderr
    code, used = run.stdout.splitlines()[-1].split()
    assert int(used) < GIB
    return int(code), run.stdout + run.stderr


RECORD: dict[str, Any] = {
    "policyc_headers": 1,
    "id": "x",
    "notes": [],
    "config": {"model_type": "llama", "num_hidden_layers": 2},
    "side_files": None,
    "totals": {"tensors": 250_000, "nbytes": 500_000},
    "files": [],
}


def _recorded(*names: str) -> bytes:
    group = {"dtype": "BF16", "shape": [1], "names": names}
    files = [{"file": None, "nbytes": None, "tensors": [group], "order": None}]
    return json.dumps({**RECORD, "files": files}).encode()


def _with(key: str, text: str) -> bytes:
    """A record with something long in place of a value."""
    return json.dumps({**RECORD, key: "@"}).replace('"@"', text).encode()


# What a text is made of, as the largest take a GiB themselves.
DOCUMENTS: dict[str, Callable[[], bytes]] = {
    "it has more than": lambda: b'{"config":{"a":[' + b"[]," * 8_000_000 + b"[]]}}",
    "more than 33554432 bytes": lambda: b" " * 2**28,
    "letters": lambda: _recorded("a" * 1900 + ".{0-199999}"),
    "names of up to 197 characters": lambda: _recorded(
        *(f"{'a' * 190}{number}.{{0-24999}}" for number in range(9))
    ),
    "expands to 1,000,000,000,000 names": lambda: _recorded("{0-999999}.{0-999999}"),
    "notes.0: ": lambda: _with("notes", f"[{'1,' * 1_900_000}1]"),
    "files.0.": lambda: _with("files", f"[{'{},' * 900_000}{{}}]"),
    "side_files.a: not a whole number": lambda: _with(
        "side_files", '{"a":"b"' + ',"x":"b"' * 900_000 + "}"
    ),
    "x: not a known key": lambda: _with("x", "1" + "".join(f',"{n}":1' for n in range(600_001))),
}


@pytest.mark.parametrize("reason", DOCUMENTS)
def test_recorded_headers(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "headers.json.gz"
    path.write_bytes(gzip.compress(DOCUMENTS[reason](), 1))
    code, said = _answer("inspect", path)
    assert (code, "error[bad-recorded-headers]" in said) == (2, True)
    assert reason in said


@pytest.mark.slow
def test_as_many_tensors_as_a_record_may_have(tmp_path: Path) -> None:
    path = tmp_path / "headers.json"
    path.write_bytes(_recorded("model.layers.{0-249}.mlp.experts.{0-999}.up_proj.weight"))
    code, said = _answer("inspect", path)
    assert (code, "250,000 tensors" in said) == (2, True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the example."""
    out = tmp_path_factory.mktemp("built") / "bundle"
    assert main(["build", "config_i", "--model", str(TINY), "-o", str(out), "--quiet"]) == 0
    return out


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy of a bundle."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def _sparse(path: Path, nbytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(nbytes)


def _dense(path: Path, count: int = 300_000) -> None:
    path.write_bytes(b'{"a":[' + b'{"":0},' * count + b"{}]}")


def _long(path: Path, before: bytes = b"") -> None:
    """As many values as the size explains, in a text of some 120 MB."""
    values = b",".join(b'"%x":"model-1.safetensors"' % number for number in range(3_800_000))
    path.write_bytes(b'{%s"weight_map":{%s}}' % (before, values))


def _many_notes(folder: Path) -> None:
    for number in range(40):
        _sparse(folder / f"note{number}.json", 63 * 2**20)


def test_files_times_tensors_are_not_walked(bundle: Path) -> None:
    path = bundle / "policyc.json"
    record = json.loads(path.read_text())
    file = {"nbytes": 0, "sha256": hashlib.sha256().hexdigest()}
    for number in range(20_000):
        (bundle / f"note{number}.txt").touch()
        record["files"][f"note{number}.txt"] = file
    path.write_text(json.dumps({**record, "digest": record_digest(record)}))
    names = [f"added.{number}" for number in range(50_000)]
    empty = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names, empty)).encode()
    shard = len(header).to_bytes(8, "little") + header
    (bundle / "added.safetensors").write_bytes(shard)
    index = bundle / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"] |= dict.fromkeys(names, "added.safetensors")
    index.write_text(json.dumps(said))
    assert _answer("verify", bundle)[0] == 1


def _large(name: str, nbytes: int) -> Callable[[Path], None]:
    return lambda folder: _sparse(folder / name, nbytes)


def _without_record(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        (folder / "policyc.json").unlink()
        change(folder)

    return both


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        (_large("policyc.json", 2 * GIB), (1, 2)),
        (lambda folder: _dense(folder / "policyc.json"), (1, 2)),
        (lambda folder: _dense(folder / "config.json"), (1, 0)),
        (_large("config.json", 2 * GIB), (1, 2)),
        (_large("model.safetensors.index.json", 2 * GIB), (1, 2)),
        (lambda folder: _long(folder / "policyc.json"), (1, 2)),
        (lambda folder: _long(folder / "model.safetensors.index.json"), (1, 2)),
        # Only metadata of the format that a record names are read.
        (_large("quantize_config.json", 2 * GIB), (0, 0)),
        (_without_record(_large("quantize_config.json", 2 * GIB)), (1, 2)),
        (_many_notes, (0, 0)),
    ],
)
def test_bundles(bundle: Path, change: Callable[[Path], None], codes: tuple[int, int]) -> None:
    change(bundle)
    assert (_answer("verify", bundle)[0], _answer("inspect", bundle)[0]) == codes


def test_many_side_files_are_not_held_at_once(bundle: Path) -> None:
    # Each takes 150 MB.
    for number in range(7):
        _dense(bundle / f"tokenizer.{number}.json", 770_000)
    assert _answer("verify", bundle)[0] == 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_sources(tmp_path: Path, name: str) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    (source / name).write_bytes(b'{"a":[' + b"[]," * 8_000_000 + b"[]]}")
    code, said = _answer("plan", "config_i", "--model", source)
    assert (code, f"{name}: it has more than" in said) == (2, True)


@pytest.fixture(scope="module")
def plan_document() -> dict[str, Any]:
    """A saved plan as the program prints it."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        main(["plan", "config_i", "--model", str(TINY), "--format", "json", "--tensors"])
    document: dict[str, Any] = json.loads(printed.getvalue())
    return document


PRUNED = '[{"prune":"experts","by":null,"before":1,"to":1,"layers":1,"kept":{@}}]'
# Each value is wrong by itself: as defects all of them would take gigabytes.
DEFECTS = {
    "tensors.0.name: ": lambda: ("tensors", f"[{'{},' * 900_000}{{}}]"),
    "tensors.0: ": lambda: ("tensors", f"[{'1,' * 1_900_000}1]"),
    "transforms.0: ": lambda: ("transforms", f"[{'1,' * 1_900_000}1]"),
    "transforms.0.kept.1.0: ": lambda: (
        "transforms",
        PRUNED.replace("@", f'"1":[{"-1," * 1_900_000}1]'),
    ),
    "600,000 entries": lambda: (
        "transforms",
        PRUNED.replace("@", ",".join(f'"x{layer}":1' for layer in range(600_000))),
    ),
}


@pytest.mark.parametrize("reason", DEFECTS)
def test_saved_plans_with_many_defects(
    tmp_path: Path, plan_document: dict[str, Any], reason: str
) -> None:
    key, text = DEFECTS[reason]()
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({**plan_document, key: "@"}).replace('"@"', text))
    code, said = _answer("diff", plan, "config_i")
    assert (code, "error[bad-saved-plan]" in said) == (2, True)
    assert reason in said


def test_saved_plans(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    _sparse(plan, 2 * GIB)
    code, said = _answer("diff", plan, "config_i")
    assert (code, "over the limit" in said) == (2, True)
    _long(plan, b'"kind":"plan",')
    code, said = _answer("diff", plan, "config_i")
    assert (code, "it has more than 6,000,000" in said) == (2, True)
    plan.write_bytes(b'{"kind":"plan","tensors":[' + b"[]," * 8_000_000 + b"[]]}")
    code, said = _answer("diff", plan, "config_i")
    assert (code, "it has more than" in said) == (2, True)
