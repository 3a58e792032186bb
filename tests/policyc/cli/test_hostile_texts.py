"""Hostile texts in everything that is read, and what commands then write to a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_checkpoints import Array, llama_config, llama_tensors, write_folder

from policy_dsl.escaping import is_visible
from policy_dsl.planning.record import record_digest
from policyc.cli import main
from tests.models import TINY

BAD = (
    "\x1b[31m\x1b]0;t\x07\nerror[fake]: your disk is empty\r\t\x7f\x9b\u2028\u202e\u200b\ufeff"
    "\u3164|<b>`[a](b)"
)
ROOT = Path(__file__).parents[3]
FORMS = ("text", "json", "markdown")
Place = tuple[str | int, ...]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its recorded headers, a policy, its plan, its bundle."""
    folder = tmp_path_factory.mktemp("hostile")
    size = {"layers": 1, "hidden": 64, "inner": 128, "vocabulary": 96}
    config = {**llama_config(**size), "eos_token_id": 2}
    tensors: dict[str, tuple[str, Array]] = llama_tensors(**size)
    write_folder(folder / "model", config, tensors)
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 4, "content": "<x>", "special": True}],
        "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "<unk>"},
    }
    (folder / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "p.qpol").write_text("target mlx_affine\nall: 8bit\n")
    policy, model = str(folder / "p.qpol"), str(folder / "model")
    plan, bundle, record = (str(folder / name) for name in ("plan.json", "bundle", "r.json"))
    assert main(["plan", policy, "--model", model, "--save", plan]) == 0
    assert main(["build", policy, "--model", model, "-o", bundle, "-q"]) == 0
    assert main(["inspect", model, "--save-headers", record]) == 0
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command and holds what it writes to what a terminal may get."""

    def command(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        # What fmt prints is a policy, whose letters are not looked at one by one.
        seen_whole = str.isprintable if words[0] == "fmt" else is_visible
        for text in (out, err):
            seen = text.split("\n")
            assert [line for line in seen if not seen_whole(line)] == [], words
            assert not any(line.startswith("error[fake]") for line in seen), words
        if "json" in words:
            for text in filter(None, (out, err)):
                json.loads(text)
        if "markdown" in words:
            plain = re.sub(r"^(```+)text\n.*?\n\1$", "", out, flags=re.DOTALL | re.MULTILINE)
            assert "<b>" not in plain, words
            assert not re.search(r"(?<!\\)\[a\]", plain), words
            assert not re.search(r"(?<!\\)`\\?\[", plain), words
        return code, out, err

    return command


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Where a document has texts and keys; of many that are alike, the first."""
    if isinstance(value, str):
        yield place
    entries = enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, dict):
        entries = value.items()
        yield from ((*place, key, "") for key in list(value)[: 3 if len(value) > 24 else 24])
    for number, (key, inner) in enumerate(entries):
        if number < (1 if len(value) > 24 or isinstance(value, list) else 24):
            yield from places(inner, (*place, key))


def hostile(document: Any, place: Place) -> Any:
    """The document with a hostile text at a place; at its key if the place ends with \"\"."""
    document = json.loads(json.dumps(document))
    at = document
    *path, last = place[:-1] if place[-1] == "" else place
    for key in path:
        at = at[key]
    if place[-1] == "":
        at[BAD] = at.pop(last)
    else:
        at[last] = BAD
    return document


DOCUMENTS = {
    "model/config.json": ("inspect model", "plan p.qpol --model model"),
    "model/tokenizer.json": ("plan p.qpol --model model",),
    "model/tokenizer_config.json": ("plan p.qpol --model model",),
    "bundle/config.json": ("verify bundle", "inspect bundle"),
    "bundle/model.safetensors.index.json": ("verify bundle", "inspect bundle"),
    "bundle/policyc.json": ("verify bundle", "inspect bundle", "diff bundle plan.json"),
    "plan.json": ("diff plan.json bundle",),
    "r.json": ("inspect r.json", "plan p.qpol --model r.json"),
}


LONGEST = "bundle/policyc.json"


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in DOCUMENTS if name != LONGEST),
        pytest.param(LONGEST, marks=pytest.mark.slow),
    ],
)
def test_texts_in_documents(
    name: str, made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    document = json.loads(Path(name).read_text(encoding="utf-8"))
    tried = 0
    for place in places(document):
        written = hostile(document, place)
        if name.endswith("policyc.json") and "digest" in written:
            written["digest"] = record_digest(written)
        Path(name).write_text(json.dumps(written), encoding="utf-8")
        for command in DOCUMENTS[name]:
            run(*command.split(), "--format", FORMS[tried % len(FORMS)])
            tried += 1
    assert tried > 3


def test_values_are_themselves_in_json(
    made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = json.loads((made / "r.json").read_text(encoding="utf-8"))
    record["id"], record["notes"] = BAD, [f"{BAD}\ud800"]
    Path("r.json").write_text(json.dumps(record), encoding="utf-8")
    _, out, _ = run("inspect", "r.json", "--format", "json")
    assert json.loads(out)["id"] == record["id"]
    assert json.loads(out)["notes"] == record["notes"]
    words = ("--model", "r.json", "--save", "saved.json", "--format", "json")
    _, out, _ = run("plan", made / "p.qpol", *words)
    assert json.loads(out)["model"]["id"] == record["id"]
    saved = Path("saved.json").read_bytes().decode("utf-8")
    assert all(map(is_visible, saved.split("\n")))
    assert json.loads(saved)["model"]["id"] == record["id"]
    record["id"] = "\ud800"
    Path("r.json").write_text(json.dumps(record), encoding="utf-8")
    code, _, said = run("plan", made / "p.qpol", "--model", "r.json")
    assert code == 2
    assert r'its id "\ud800" is not a text' in said


def test_texts_in_containers_and_statistics(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # As long as what it replaces, so that the files stay whole.
    odd = {5: "\u202e\x9b", 7: "\u202e\x9b\x7fa"}
    golden = ROOT / "tests" / "golden" / "hipfire"
    content = (golden / "tiny-llama.mq4").read_bytes()
    assert b'"llama"' in content
    Path("x.mq4").write_bytes(content.replace(b'"llama"', f'"{odd[5]}"'.encode()))
    content = (golden / "tiny-minimax-src" / "imatrix.gguf").read_bytes()
    assert b"imatrix" in content
    Path("x.gguf").write_bytes(content.replace(b"imatrix", odd[7].encode()))
    Path("x.json").write_text(json.dumps({"kind": BAD, BAD: {BAD: BAD}}), encoding="utf-8")
    for form in FORMS:
        run("inspect", "x.mq4", "--format", form)
        run("verify", "x.mq4", "--format", form)
    for words in ("hipfire_mq2 --imatrix x.gguf", "reap_w4a16 --saliency x.json"):
        code, _, said = run("plan", *words.split(), "--model", TINY)
        assert code == 2
        assert said


STATEMENTS = (
    "name {}",
    "description {}",
    "model {}",
    "target {}",
    "extends {}",
    "var x = {}",
    "{}: 4bit",
    "all except {}: 4bit",
    "metadata note {}",
    "metadata {} 1",
    "output file_name {}",
    "calibration imatrix {}",
    "runtime {}",
    "test {} is keep",
    "prune experts to 2 by {}",
)
COMMANDS = (
    *(f"check FILE --format {form}" for form in ("text", "json", "github", "sarif")),
    *(f"plan FILE --model model --format {form}" for form in FORMS),
    "explain FILE lm_head.weight --model model",
    "fmt --to yaml FILE",
    "fmt --to dsl FILE",
)


@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("form", ["qpol", "yaml"])
def test_texts_in_policies(
    statement: str, form: str, made: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    text = statement.format(json.dumps(BAD))
    path = Path(f"bad.{form}")
    path.write_text(text if form == "qpol" else f"rules: {json.dumps(text)}", encoding="utf-8")
    for command in COMMANDS:
        run(*command.replace("FILE", str(path)).split())


@pytest.mark.parametrize("char", "\x1b\x07\x00\x7f\x85\x9b\u2028\u2029\u061c\u200f\u202e\u2066")
@pytest.mark.parametrize("form", ["qpol", "yaml"])
def test_a_policy_is_what_it_looks_like(
    char: str, form: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(f"bad.{form}")
    path.write_text(f"description: a  # {char}b\n", encoding="utf-8", newline="")
    for command in ("check", "fmt"):
        _, out, said = run(command, path)
        assert f"error[control-character]: U+{ord(char):04X} is a control" in out + said


@pytest.mark.parametrize(
    "words",
    [
        (BAD,),
        ("plan", BAD),
        ("plan", "p.qpol", "--model", BAD),
        ("plan", "p.qpol", "--model", "model", "--target", BAD),
        ("plan", "p.qpol", "--model", "model", "--set", BAD),
        ("plan", "p.qpol", "--model", "model", "--set", f"x={BAD}"),
        ("plan", "p.qpol", "--model", "model", "--imatrix", BAD),
        ("plan", "p.qpol", "--model", "model", "--saliency", BAD),
        ("plan", "p.qpol", "--model", "model", "--format", BAD),
        ("plan", f"--{BAD}"),
        ("explain", "p.qpol", BAD, "--model", "model"),
        ("check", BAD, "p.qpol"),
        ("diff", "p.qpol", BAD, "--model", "model"),
        ("diff", "bundle", f"{BAD}.json"),
        ("inspect", BAD),
        ("inspect", f"org/{BAD}"),
        ("inspect", "model", "--save-headers", f"{BAD}/x"),
        ("verify", BAD),
        ("verify", "bundle", "--source", BAD),
        ("build", "p.qpol", "--model", "model", "-o", f"model/{BAD}"),
        ("build", "p.qpol", "--model", "model", "--max-memory", BAD),
        ("fmt", BAD),
        ("schema", BAD),
        ("formats", BAD),
    ],
    ids=lambda words: " ".join(words).replace(BAD, "BAD"),
)
def test_words_of_the_command_line(
    words: tuple[str, ...], made: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    for odd in (BAD, "\udcff\udc9b", "-" * 300):
        code, out, said = run(*(word.replace(BAD, odd) for word in words))
        # What a plan does not need is not opened.
        assert code in ((0,) if {*words} & {"--imatrix", "--saliency"} else (1, 2))
        assert out or said


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
@pytest.mark.parametrize("name", [b"\x1b[31m\nerror[fake]: x", b"\xff\xe2\x80\xae", b"<b>|[a](b)"])
def test_names_of_files(
    name: bytes, made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = os.fsdecode(name)
    shutil.copytree(made / "model", tmp_path / odd)
    shutil.copytree(made / "bundle", tmp_path / f"{odd}.bundle")
    shutil.copy(made / "plan.json", tmp_path / f"{odd}.json")
    (tmp_path / f"{odd}.qpol").write_text("target mlx_affine\nal: 8bit\n")
    (tmp_path / f"{odd}.good.qpol").write_text("target mlx_affine\nall: 8bit\n")
    monkeypatch.chdir(tmp_path)
    for form in ("text", "json", "github", "sarif"):
        run("check", f"{odd}.qpol", "--format", form)
    for form in FORMS:
        run("inspect", odd, "--format", form)
        run("inspect", f"{odd}.bundle", "--format", form)
        run("verify", f"{odd}.bundle", "--format", form)
        run("plan", f"{odd}.good.qpol", "--model", odd, "--format", form)
        run("diff", f"{odd}.json", f"{odd}.bundle", "--format", form)
    run("fmt", "--check", f"{odd}.good.qpol")
    run("build", f"{odd}.good.qpol", "--model", odd)
    run("build", f"{odd}.good.qpol", "--model", odd, "-o", f"{odd}.out")
    # Unknown files beside a bundle and a checkpoint are named too.
    for folder in (odd, f"{odd}.bundle"):
        np.save(tmp_path / folder / f"{odd}.npy", np.zeros(1))
    run("verify", f"{odd}.bundle")
    run("plan", f"{odd}.good.qpol", "--model", odd)
