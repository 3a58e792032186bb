"""The types of documents: the schemas that are published, and values checked against them."""

from __future__ import annotations

import builtins
import json
import os
import typing
from itertools import chain
from math import inf
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypedDict,
    Union,
    get_args,
    get_origin,
    is_typeddict,
)

import jsonschema
import pytest

from policy_dsl import DOCUMENT_SCHEMAS
from policy_dsl.documents import Limits, fields_of, first_defect, reports, saved

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
# What people write and programs read has no type: it is read by its own rules.
WRITTEN_BY_HAND = {"saliency"}


def schema_of(document: Any) -> dict[str, Any]:
    """The JSON Schema of a document's type; its docstring becomes the title."""
    definitions: dict[str, Any] = {}
    schema = object_of(document, definitions)
    title = (document.__doc__ or "").rstrip(".")
    parts = {"$defs": dict(sorted(definitions.items()))} if definitions else {}
    return {"$schema": DIALECT, "title": title, **schema, **parts}


def made_of(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, inner = get_origin(kind), get_args(kind)
    match origin:
        case typing.Annotated:
            schema = with_limits(made_of(inner[0], definitions), inner[1])
        case typing.Literal:
            schema = {"const": inner[0]} if len(inner) == 1 else {"enum": list(inner)}
        case _ if origin in (Union, UnionType):
            schema = any_of([made_of(member, definitions) for member in inner])
        case builtins.list:
            schema = {"type": "array", "items": made_of(inner[0], definitions)}
        case builtins.tuple:
            columns = [made_of(member, definitions) for member in inner]
            schema = {"type": "array", "prefixItems": columns, "minItems": len(inner)}
            schema["items"] = False
        case builtins.dict:
            schema = {"type": "object", "additionalProperties": made_of(inner[1], definitions)}
        case _ if is_typeddict(kind):
            schema = reference(kind, definitions)
        case _:
            schema = {} if kind is Any else {"type": PLAIN[kind]}
    return schema


def any_of(members: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = members
    # What may also be null says so in its type: that is how people write it.
    if others == [{"type": "null"}] and "type" in first:
        return {**first, "type": [first["type"], "null"]}
    return {"anyOf": members}


def reference(document: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    name = document.__name__
    if name not in definitions:
        definitions[name] = {}
        about = {"description": (document.__doc__ or "").rstrip(".")}
        definitions[name] = about | object_of(document, definitions)
    return {"$ref": f"#/$defs/{name}"}


def with_limits(schema: dict[str, Any], limits: Limits) -> dict[str, Any]:
    ends = {"string": "Length", "array": "Items", "object": "Properties"}.get(schema["type"])
    keywords = {
        "minimum": limits.minimum,
        "maximum": limits.maximum,
        f"min{ends}": limits.least or None,
        f"max{ends}": limits.most,
        "pattern": limits.pattern,
        "propertyNames": limits.keys and {"pattern": limits.keys},
        "description": limits.about,
    }
    return schema | {
        key: value for key, value in keywords.items() if value not in (None, inf, -inf)
    }


def object_of(document: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    fields = fields_of(document)
    return {
        "type": "object",
        "properties": {key: made_of(kind, definitions) for key, (kind, _) in fields.items()},
        "required": [key for key, (_, required) in fields.items() if required],
        "additionalProperties": False,
    }


def documents() -> dict[str, Any]:
    """Every type that is a whole document, by its kind."""
    types = chain.from_iterable(vars(module).values() for module in (saved, reports))
    parts = {"schema_version", "kind"}
    whole = {kind for kind in types if is_typeddict(kind) and parts <= fields_of(kind).keys()}
    # Older versions are read; the last one is published.
    whole -= {kind for kind in whole if kind.__name__.endswith("V1")}
    return {get_args(fields_of(kind)["kind"][0])[0]: kind for kind in whole}


def test_every_schema_is_made_of_a_type() -> None:
    names = {path.stem for path in DOCUMENT_SCHEMAS.glob("*.json")}
    assert names == documents().keys() | WRITTEN_BY_HAND


@pytest.mark.parametrize("kind", sorted(documents()))
def test_the_published_schema_is_the_one_of_the_type(kind: str) -> None:
    path = DOCUMENT_SCHEMAS / f"{kind}.json"
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
