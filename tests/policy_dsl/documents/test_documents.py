"""The types of documents: the schemas that are published, and values checked against them."""

from __future__ import annotations

import json
import os
from itertools import chain
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_args, is_typeddict

import jsonschema
import pytest

from policy_dsl.documents import plan, record, reports
from policy_dsl.documents.common import Limits
from policy_dsl.documents.json_schema import fields_of, first_defect, schema_of
from policy_dsl.resources import document_schemas

# What people write and programs read has no type: it is read by its own rules.
WRITTEN_BY_HAND = {"saliency"}


def documents() -> dict[str, Any]:
    """Every type that is a whole document, by its kind."""
    types = chain.from_iterable(vars(module).values() for module in (plan, record, reports))
    whole = {kind for kind in types if is_typeddict(kind) and "schema_version" in fields_of(kind)}
    # Older versions are read; the last one is published.
    whole -= {kind for kind in whole if kind.__name__.endswith("V1")}
    return {get_args(fields_of(kind)["kind"][0])[0]: kind for kind in whole}


def test_every_schema_is_made_of_a_type() -> None:
    names = {path.stem for path in document_schemas().glob("*.json")}
    assert names == documents().keys() | WRITTEN_BY_HAND


@pytest.mark.parametrize("kind", sorted(documents()))
def test_the_published_schema_is_the_one_of_the_type(kind: str) -> None:
    path = document_schemas() / f"{kind}.json"
    text = json.dumps(schema_of(documents()[kind]), indent=2, ensure_ascii=False) + "\n"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text
    jsonschema.Draft202012Validator.check_schema(json.loads(text))


class Inner(TypedDict):
    size: Annotated[int, Limits(minimum=0, maximum=9)]
    note: NotRequired[str]


class Whole(TypedDict):
    """A document"""

    kind: Literal["whole"]
    inner: list[Inner]
    rows: list[tuple[str, int | None]]
    kept: Annotated[dict[str, float], Limits(keys="^[a-z]+$")] | None
    name: Annotated[str, Limits(pattern="^[0-9a-f]{2}$")]


GOOD: dict[str, Any] = {
    "kind": "whole",
    "inner": [{"size": 0}, {"size": 9, "note": "x"}],
    "rows": [["a", 1], ["b", None]],
    "kept": {"a": 1.5, "b": 2},
    "name": "0f",
}
BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"kind": "other"}, "kind: not 'whole'"),
    ({"inner": {}}, "inner: not a list"),
    ({"inner": [{"size": 0}, {"size": 10}]}, "inner.1.size: out of range"),
    ({"inner": [{"size": 1.0}]}, "inner.0.size: not a whole number"),
    ({"inner": [{"size": True}]}, "inner.0.size: not a whole number"),
    ({"inner": [{}]}, "inner.0.size: missing"),
    ({"inner": [{"size": 1, "note": None}]}, "inner.0.note: not a text"),
    ({"inner": [{"size": 1, "more": None}]}, "inner.0.more: not a known key"),
    ({"rows": [["a"]]}, "rows.0: not a list of 2"),
    ({"rows": [["a", "b"]]}, "rows.0.1: not a whole number or not null"),
    ({"kept": {"A": 1}}, "kept.A: not a known key"),
    ({"kept": {"a": float("nan")}}, "kept.a: not a number"),
    ({"kept": 1}, "kept: not an object or not null"),
    ({"name": "0f\n0f"}, "name: not of the form ^[0-9a-f]{2}$"),
)


def test_a_value_of_the_type_has_no_defect() -> None:
    assert first_defect(GOOD, Whole) is None
    jsonschema.validate(GOOD, schema_of(Whole))


@pytest.mark.parametrize(("change", "said"), BAD)
def test_a_wrong_value_is_named_by_its_place(change: dict[str, Any], said: str) -> None:
    document = {**GOOD, **change}
    assert first_defect(document, Whole) == said


@pytest.mark.parametrize("value", [None, [], 1, "x"])
def test_another_kind_of_value_is_no_document(value: object) -> None:
    assert first_defect(value, Whole) == "not an object"


def test_keys_of_later_versions_can_be_let_through() -> None:
    document = {**GOOD, "later": 1}
    assert first_defect(document, Whole, "ignore") is None
    assert first_defect(document, Whole) == "later: not a known key"


def test_a_long_key_is_cut() -> None:
    assert len(first_defect({**GOOD, "x" * 9999: 1}, Whole) or "") < 200
