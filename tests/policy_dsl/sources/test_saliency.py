"""Files of saliencies: what they say of a model's experts, and what is wrong with them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from policy_dsl.diagnostics import PolicyError, SourceText, Span
from policy_dsl.sources.saliency import ModelShape, Saliency, read_saliency
from tests.models import REAP

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((ROOT / "policy_dsl/document_schemas/saliency.json").read_text())
# Layers 1 and 3 of four have three experts.
SHAPE = ModelShape((1, 3), 4, 3)
ONE, OTHER = [0.5, 2, 1e-7], [3, 2, 1]
FORMATS = {"F32": "f", "F64": "d", "I32": "i", "I64": "q", "F16": "e"}


def in_json(folder: Path, document: Any) -> Path:
    path = folder / "saliency.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def in_safetensors(folder: Path, dtype: str, rows: list[list[float]]) -> Path:
    content = b"".join(struct.pack(f"<{len(row)}{FORMATS[dtype]}", *row) for row in rows)
    shape = [len(rows), len(rows[0])]
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}
    header = json.dumps({"reap": entry})
    path = folder / "saliency.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + content)
    return path


def refused(path: Path, name: str = "reap", shape: ModelShape = SHAPE) -> Any:
    """The one defect of a file, found while it is read or asked."""
    with pytest.raises(PolicyError) as caught:
        read_saliency(path, name).ranks(shape)
    (found,) = caught.value.diagnostics
    return found


@pytest.mark.parametrize(
    "entry",
    [
        [ONE, OTHER],
        [None, ONE, [], OTHER],
        {"1": ONE, "3": OTHER},
        {"0": None, "3": OTHER, "1": ONE},
    ],
    ids=["layers with experts", "all layers", "by layer", "by layer, in any order"],
)
def test_rows_are_of_all_layers_or_of_those_with_experts(tmp_path: Path, entry: Any) -> None:
    document = {"model": "org/name", "tokens": 32768, "reap": entry}
    jsonschema.validate(document, SCHEMA)
    found = read_saliency(in_json(tmp_path, document), "reap")
    assert found.ranks(SHAPE) == {1: tuple(ONE), 3: tuple(OTHER)}


@pytest.mark.parametrize("dtype", ["F32", "F64", "I32", "I64"])
@pytest.mark.parametrize("every_layer", [False, True])
def test_a_tensor_is_a_row_for_each_layer(tmp_path: Path, dtype: str, every_layer: bool) -> None:
    one, other = [7, 2, 5], [1, 3, 2]
    rows = [[0, 0, 0], one, [0, 0, 0], other] if every_layer else [one, other]
    found = read_saliency(in_safetensors(tmp_path, dtype, rows), "reap")
    assert found.ranks(SHAPE) == {1: tuple(one), 3: tuple(other)}


def test_the_demo_file_ranks_every_expert_and_has_a_digest() -> None:
    found = read_saliency(REAP, "reap")
    ranks = found.ranks(ModelShape(tuple(range(6)), 6, 8))
    assert {len(row) for row in ranks.values()} == {8}
    assert found.sha256.startswith("099b1f42")


def test_experts_that_stay_may_be_listed(tmp_path: Path) -> None:
    document = {"keep": {"1": [2, 0], "3": [1, 2]}}
    jsonschema.validate(document, SCHEMA)
    found = read_saliency(in_json(tmp_path, document), "keep")
    assert found.kept(SHAPE, 2) == {1: (0, 2), 3: (1, 2)}


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        ([[0, 3], [0, 1]], "layer 1 keeps 3; the model has experts 0-2"),
        ([[0, 1], [0, -1]], "layer 3 keeps -1; "),
        ([[0, 1], [0, 1.0]], "layer 3 keeps 1.0; "),
        ([[0, 1], [0, True]], "layer 3 keeps True; "),
        ([[0, 1], [2, 2]], "layer 3 keeps expert 2 twice"),
        ([[0, 1], [0, 1, 2]], "layer 3 keeps 3 experts, not 2; all layers keep as many"),
        ([[0, 1], []], "layer 3 keeps 0 experts, not 2; "),
    ],
)
def test_lists_of_those_that_stay_hold_what_is_promised(
    tmp_path: Path, keep: Any, told: str
) -> None:
    found = read_saliency(in_json(tmp_path, {"keep": keep}), "keep")
    with pytest.raises(PolicyError, match="bad-saliency") as caught:
        found.kept(SHAPE, 2)
    assert told in caught.value.diagnostics[0].message


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ([ONE], "it has 1 layers, the model has 2 or 4"),
        ([ONE] * 3, "it has 3 layers"),
        ([ONE, [1, 2]], "layer 3 has 2 numbers, the model 3 experts"),
        ([ONE, [1, 2, 3, 4]], "layer 3 has 4 numbers"),
        ([ONE, None], "layer 3 has no list of numbers"),
        ([ONE, "321"], "layer 3 has no list of numbers"),
        ([ONE, [1, None, 3]], "expert 1 of layer 3 has None, which is not a number"),
        ([ONE, [1, True, 3]], "expert 1 of layer 3 has True"),
        ([ONE, [1, [2], 3]], "expert 1 of layer 3 has [2]"),
        ([ONE, [1, float("nan"), 3]], "expert 1 of layer 3 has nan"),
        ({"1": ONE}, "it has nothing about layer 3"),
        ({"1": ONE, "3": OTHER, "4": OTHER}, "it has a layer 4; the model has layers 0-3"),
        ({"1": ONE, "third": OTHER}, '"third" is not the number of a layer'),
        ({"1": ONE, "03": OTHER}, '"03" is not the number of a layer'),
        ({"1": ONE, "\u0663": OTHER}, "is not the number of a layer"),
    ],
)
def test_an_entry_that_does_not_fit_the_model(tmp_path: Path, entry: Any, told: str) -> None:
    found = refused(in_json(tmp_path, {"reap": entry}))
    assert found.code == "bad-saliency"
    assert 'saliency.json, entry "reap": ' in found.message
    assert told in found.message
    assert found.suggestion == "give the saliencies of this model"


@pytest.mark.parametrize("value", [float("inf"), 10**60, -(10**60), 0, -0.0])
def test_numbers_of_any_size_rank(tmp_path: Path, value: float) -> None:
    """REAP itself makes experts that must stay infinite."""
    found = read_saliency(in_json(tmp_path, {"reap": [ONE, [1, value, 3]]}), "reap")
    assert found.ranks(SHAPE)[3] == (1, value, 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "told"),
    [
        ((2, 3), "F16", "it is F16 [2, 3], not [layers, experts] of F32, F64, I32, I64"),
        ((2, 2), "F32", "layer 1 has 2 numbers, the model 3 experts"),
        ((3, 3), "F32", "it has 3 layers, the model has 2 or 4"),
    ],
)
def test_a_tensor_that_does_not_fit_the_model(
    tmp_path: Path, shape: tuple[int, int], dtype: str, told: str
) -> None:
    found = refused(in_safetensors(tmp_path, dtype, [[1] * shape[1]] * shape[0]))
    assert found.code == "bad-saliency"
    assert told in found.message


@pytest.mark.parametrize("shape", [[10**15, 0], [0, 10**15], [0, 0]])
def test_a_tensor_of_nothing_says_nothing(tmp_path: Path, shape: list[int]) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    header = json.dumps({"reap": entry}).encode()
    path = tmp_path / "saliency"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert f"it is F32 {shape}, not [layers, experts]" in refused(path).message


def test_an_entry_that_is_not_there() -> None:
    found = refused(REAP, "raep")
    assert found.message == f'{REAP} has no entry "raep"; it has reap, tokens'
    assert found.suggestion == 'did you mean "reap"?'


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [
        (b"", "not-saliencies", "it is not safetensors, and it is not"),
        (b"[1, 2]", "not-saliencies", "it is JSON, but not an object of entries"),
        (b'{"reap": [[1, 2', "not-saliencies", "it is not safetensors, and it is not"),
        (b"{" * 100_000, "not-saliencies", "it is not safetensors, and it is not"),
        (b'{"reap": ' + b"[" * 100_000, "not-saliencies", "and it is nested"),
        (b"\xff\xfe\x00", "not-saliencies", "it is not safetensors, and it is not"),
        (b'{"reap": "all"}', "missing-saliency", "it has nothing"),
        (b'{"reap": [], "reap": []}', "not-saliencies", '"reap" appears twice in an object'),
        (b'{"reap": {"1": [1], "1": [2]}}', "not-saliencies", '"1" appears twice'),
        (REAP.read_bytes()[:200], "not-safetensors", "is not a whole safetensors file"),
        (REAP.read_bytes() + b"\0", "not-safetensors", "is not a whole safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "missing-saliency", "it has nothing"),
    ],
)
def test_files_that_are_damaged_or_something_else(
    tmp_path: Path, content: bytes, code: str, told: str
) -> None:
    path = tmp_path / "saliency"
    path.write_bytes(content)
    found = refused(path)
    assert found.code == code
    assert told in found.message
    assert "Traceback" not in found.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    span = Span(SourceText("p.qpol", "calibration saliency x"), 0, 11)
    for path, reason in ((tmp_path / "gone", "No such file"), (tmp_path, "it is a folder")):
        with pytest.raises(PolicyError, match=reason) as caught:
            read_saliency(path, "reap", span)
        (found,) = caught.value.diagnostics
        assert (found.code, found.span) == ("unreadable-file", span)


def test_a_file_as_large_as_a_model_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as opened:
        opened.truncate(2**40)
    assert "it has 1099511627776 bytes, over" in refused(path).message


def test_what_a_file_says_can_be_compared() -> None:
    one, other = read_saliency(REAP, "reap"), read_saliency(REAP, "reap")
    assert one == other
    assert isinstance(one, Saliency)
