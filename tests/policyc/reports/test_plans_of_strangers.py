"""Saved plans that somebody edited: each wrong field is an error that names file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import policyc
from policyc.cli import main
from policyc.reports.plan_json import document_text, plan_document

NUMBERS = (True, -1, 1.0, 1e999, float("nan"), "1", [], {}, 10**60)
TEXTS = (True, 1, 1.5, [], {}, None)
PRUNED = {
    "prune": "experts",
    "by": "reap",
    "before": 8,
    "to": 6,
    "layers": 2,
    "kept": {"0": [0, 1], "1": [1, 2]},
}
# A field of a saved plan -> what it cannot be.
WRONG: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("kind",): (1, None, "diff", []),
    ("schema_version",): (2, True, "1", None, 10**60, [], {}),
    ("policy",): (1, None, [], {}),
    ("policy", "name"): TEXTS,
    ("target",): TEXTS,
    ("model",): (1, None, [], {}),
    ("model", "id"): TEXTS,
    ("model", "experts"): (*NUMBERS, None, 65537),
    ("model", "experts_added"): (*NUMBERS, None, 65537),
    ("tensors",): (1, None, {}, "x", [1], [[]], [None]),
    ("tensors", 0, "name"): TEXTS,
    ("tensors", 0, "module"): TEXTS,
    ("tensors", 0, "role"): TEXTS,
    ("tensors", 0, "treatment"): TEXTS,
    ("tensors", 0, "stored"): TEXTS,
    ("tensors", 0, "rule"): TEXTS,
    ("tensors", 0, "layer"): (*NUMBERS, 65536),
    ("tensors", 0, "nbytes"): (*NUMBERS, None, 2**63),
    ("tensors", 1, "parameters"): (*NUMBERS, None, 2**63),
    ("forms",): (1, None, {}, "x", [1], [{}], []),
    ("forms", 0, "role"): TEXTS,
    ("forms", 0, "treatment"): TEXTS,
    ("forms", 0, "stored"): TEXTS,
    ("forms", 0, "rule"): TEXTS,
    ("forms", 0, "parameters"): (*NUMBERS, None, 2**63),
    ("forms", 0, "parts"): (1, None, {}, "x", [1], [{}]),
    ("forms", 0, "parts", 0, "nbytes"): (*NUMBERS, None, 2**63),
    ("columns",): (1, None, [], {}, ["name"]),
    ("rows",): (1, None, {}, "x", [1], [[]], [None]),
    ("rows", 0, 0): TEXTS,
    ("rows", 0, 1): (*NUMBERS, 65536),
    ("rows", 0, 2): (*NUMBERS, None, 2**63, 10_000),
    ("rows", 0, 3): (1, None, {}, "x", [1]),
    ("rows", 0, 4): (1, None, {}, "x", [1], [[0]], [[0, -1]]),
    ("transforms",): (1, None, {}, "x", [1], [{}]),
    ("transforms", 0, "by"): TEXTS[:-1],
    ("transforms", 0, "before"): (*NUMBERS, None, 0, 65537),
    ("transforms", 0, "to"): (*NUMBERS, None, 0, 65537),
    ("transforms", 0, "layers"): (*NUMBERS, None, 0, 65537),
    ("transforms", 0, "kept"): (
        *(1, [], {}, "x", {"x": [1]}, {"0": 1}, {"0": []}, {"-1": [1]}, {"01": [1]}),
        *({"9" * 5000: [1]}, {"0": [1.0]}, {"0": [-1]}, {"0": [True]}, {"0": [10**60]}),
    ),
}
CASES = [
    pytest.param(place, value, id=f"{'.'.join(map(str, place))}-{str(value)[:20]}")
    for place, values in WRONG.items()
    for value in values
]
# As json.dumps does not write them: no program can hold them, or wants to.
DIGITS = ("1" * 5000, "-" + "1" * 5000, "1" * 65)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """A saved plan with experts that were pruned; True: as older versions saved it."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    command = ["plan", "mlx_4bit", "--model", "examples/tiny-minimax-m2", "--save", str(path)]
    assert main(command) == 0
    older = plan_document(policyc.plan("mlx_4bit", model="examples/tiny-minimax-m2"))
    documents = {True: json.loads(document_text(older)), False: json.loads(path.read_text())}
    return {is_older: {**made, "transforms": [PRUNED]} for is_older, made in documents.items()}


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `diff` says about a file that it refuses."""
    capsys.readouterr()
    assert main(["diff", str(path), str(path)]) == 2
    said = capsys.readouterr().err
    assert "bad-saved-plan" in said
    assert path.name in said
    return said


def changed(saved: dict[bool, Any], place: tuple[str | int, ...], value: object) -> Any:
    """The document that has such a place, with another value there."""
    document: Any = json.loads(json.dumps(saved[place[0] == "tensors"]))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return document


def test_the_plans_that_are_changed_here_are_read_as_the_same(saved: Any, tmp_path: Path) -> None:
    paths = [tmp_path / "older.json", tmp_path / "plan.json"]
    for path, document in zip(paths, saved.values(), strict=True):
        path.write_text(json.dumps(document))
    assert main(["diff", *map(str, paths), "--exit-code"]) == 0


@pytest.mark.parametrize(("place", "value"), CASES)
def test_a_field_of_another_type_or_size_is_named(
    saved: Any, tmp_path: Path, capsys: Any, place: tuple[str | int, ...], value: object
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(changed(saved, place, value)))
    said = refused(path, capsys)
    named = [key for key in place if isinstance(key, str)][-1]
    assert named in said or (named == "kind" and "not a plan" in said)
    assert len(said) < 1000


@pytest.mark.parametrize("digits", DIGITS, ids=["5000", "-5000", "65"])
@pytest.mark.parametrize("field", ["nbytes", "layer", "parameters"])
def test_a_number_of_very_many_digits_is_refused(
    saved: Any, tmp_path: Path, capsys: Any, field: str, digits: str
) -> None:
    path = tmp_path / "plan.json"
    text = json.dumps(changed(saved, ("tensors", 0, field), "DIGITS"))
    path.write_text(text.replace('"DIGITS"', digits))
    assert "digits" in refused(path, capsys)


@pytest.mark.parametrize(
    "place",
    [("tensors", 0, key) for key in ("name", "module", "nbytes", "rule", "parameters")]
    + [("model", "id"), ("policy", "name"), ("target",), ("model",), ("transforms", 0, "to")],
    ids=lambda place: ".".join(map(str, place)),
)
def test_a_field_that_is_missing_is_named(
    saved: Any, tmp_path: Path, capsys: Any, place: Any
) -> None:
    document = changed(saved, place, None)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    del inner[place[-1]]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    assert place[-1] in refused(path, capsys)
