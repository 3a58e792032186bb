"""Recorded headers, saliencies, headers of shards: a wrong field is named with its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from policy_dsl.diagnostics import PolicyError
from policy_dsl.sources.recorded import read_recorded
from policy_dsl.sources.safetensors_header import parse_header
from policy_dsl.sources.saliency import ModelShape, read_saliency
from policyc.cli import main

NAN, INFINITE, HUGE = float("nan"), float("inf"), 10**60
NUMBERS = (True, -1, 1.0, 1.5, NAN, INFINITE, HUGE, 2**63, "1", [], {})
TEXTS = (True, 1, 1.5, [], {})
RECORDED = {
    "policyc_headers": 1,
    "id": "x",
    "notes": [],
    "config": {"model_type": "llama", "num_hidden_layers": 2},
    "side_files": {"tokenizer.json": 5},
    "totals": {"tensors": 1, "nbytes": 8},
    "files": [
        {
            "file": "model.safetensors",
            "nbytes": 100,
            "tensors": [{"dtype": "F16", "shape": [2, 2], "names": ["a"]}],
            "order": None,
        }
    ],
}
GROUP = ("files", 0, "tensors", 0)
WRONG: dict[tuple[str | int, ...], tuple[Any, ...]] = {
    ("policyc_headers",): (2, 1.5, "1", None, HUGE, [], {}),
    ("id",): (*TEXTS, None),
    ("notes",): (1, "x", {}, [1], None),
    ("config",): (1, "x", [], None),
    ("side_files",): (1, "x", [], {"a": NAN}, {"a": 2**63}, {"a": 1.0}, {"a": True}),
    ("totals", "tensors"): (*NUMBERS, None, 2),
    ("totals", "nbytes"): (*NUMBERS, None, 9),
    ("files",): (1, "x", {}, [1], [[]], None),
    ("files", 0, "file"): TEXTS,
    ("files", 0, "nbytes"): NUMBERS,
    ("files", 0, "order"): (1, "x", {}, [1]),
    ("files", 0, "tensors"): (1, "x", {}, [1], [{}], None),
    (*GROUP, "dtype"): (*TEXTS, None, "F3", "x" * 10**6),
    (*GROUP, "names"): (1, "x", {}, [1], None),
    (*GROUP, "shape"): (1, "x", {}, None, [1] * 65, *([one] for one in NUMBERS)),
}
CASES = [
    pytest.param(place, value, id=f"{'.'.join(map(str, place))}-{str(value)[:20]}")
    for place, values in WRONG.items()
    for value in values
]


def changed(place: tuple[str | int, ...], value: object) -> str:
    """Recorded headers with another value at a place, as text."""
    document: Any = json.loads(json.dumps(RECORDED))
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(document)


def test_the_headers_that_are_changed_here_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(RECORDED))
    assert read_recorded(tmp_path / "x.json").tensors["a"].shape == (2, 2)


@pytest.mark.parametrize(("place", "value"), CASES)
def test_a_field_of_recorded_headers_is_named(
    tmp_path: Path, place: tuple[str | int, ...], value: object
) -> None:
    (tmp_path / "x.json").write_text(changed(place, value))
    with pytest.raises(PolicyError) as caught:
        read_recorded(tmp_path / "x.json")
    (found,) = caught.value.diagnostics
    assert (found.code, "x.json" in found.message) == ("bad-recorded-headers", True)
    assert str(place[-1]) in found.message
    assert len(found.message) < 1000


def test_shapes_whose_product_no_file_has_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(changed((*GROUP, "shape"), [2**62] * 64))
    with pytest.raises(PolicyError) as caught:
        read_recorded(tmp_path / "x.json")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("digits", ["9" * 65, "9" * 5000, "-" + "9" * 100_000])
@pytest.mark.parametrize(
    "place", [("totals", "nbytes"), ("files", 0, "nbytes"), ("config",)], ids=str
)
def test_numbers_of_very_many_digits_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: Any, digits: str
) -> None:
    text = changed(place, "DIGITS").replace('"DIGITS"', digits)
    (tmp_path / "x.json").write_text(text)
    assert main(["plan", "mlx_4bit", "--model", str(tmp_path / "x.json")]) == 2
    said = capsys.readouterr().err
    assert "x.json" in said
    assert "digits" in said
    assert len(said) < 1000


@pytest.mark.parametrize("digits", ["9" * 65, "9" * 5000, "-" + "9" * 100_000])
def test_saliencies_of_very_many_digits_are_refused(tmp_path: Path, digits: str) -> None:
    (tmp_path / "s.json").write_text(f'{{"reap": [[1, 2], [{digits}, 2]]}}')
    with pytest.raises(PolicyError, match="digits") as caught:
        read_saliency(tmp_path / "s.json", "reap").ranks(ModelShape((0, 1), 2, 2))
    assert "s.json" in str(caught.value)


@pytest.mark.parametrize("field", ["shape", "data_offsets"])
@pytest.mark.parametrize(
    "value", [*NUMBERS[:-2], None, [1], "9" * 5000], ids=lambda one: str(one)[:20]
)
def test_a_number_of_a_shard_that_is_not_a_length_is_named(field: str, value: object) -> None:
    entry = {"dtype": "F16", "shape": [1, 2], "data_offsets": [0, 4], field: [0, value]}
    header = json.dumps({"lm_head.weight": entry}).encode()
    with pytest.raises(PolicyError) as caught:
        parse_header(header, file="model.safetensors", file_nbytes=12 + len(header))
    said = str(caught.value)
    assert "model.safetensors" in said
    assert "lm_head.weight" in said
    assert field.removeprefix("data_") in said
    assert len(said) < 1000
