"""JSON Schemas made from the types of documents, and values checked against the same types.

Types: TypedDict, tuple (rows of fixed columns), list, dict, Literal, unions, str, int, float,
bool, None; `Annotated[T, Limits(…)]`.
"""

from __future__ import annotations

import builtins
import re
import typing
from collections.abc import Callable, Iterable, Sequence, Sized
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from policy_dsl.documents.common import Limits
from policy_dsl.escaping import shown

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Extra = Literal["forbid", "ignore"]
D = TypeVar("D")
# A value -> its first defect, after its place in the value: `.modules.a: not a text`.
Check = Callable[[Any], str | None]
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
    Any: "anything",
}
_LONGEST_KEY = 80


def schema_of(document: Any) -> dict[str, Any]:
    """The JSON Schema of a document's type; its docstring becomes the title."""
    definitions: dict[str, Any] = {}
    schema = _object_schema(document, definitions)
    title = (document.__doc__ or "").rstrip(".")
    parts = {"$defs": dict(sorted(definitions.items()))} if definitions else {}
    return {"$schema": DIALECT, "title": title, **schema, **parts}


def first_defect(value: Any, document: Any, extra: Extra = "forbid") -> str | None:
    """What of a value is not as the document's type says, after its place; None if all is.

    extra: what happens to keys that the type does not have.
    Stricter than JSON Schema in this: 2.0 is not a whole number, and NaN is not a number.
    """
    defect = _check(document, extra)(value)
    return defect and defect.removeprefix(".").removeprefix(": ")


def entry_of(document: type[D], value: object, **given: object) -> D:
    """An entry of a document: what is given, and else the attributes of a value of those names.

    Keys that need not be there, and that the value has not, are left out.
    """
    entry: dict[str, object] = {}
    for key, (_, required) in fields_of(cast("Any", document)).items():
        if key in given:
            entry[key] = given[key]
        elif required or hasattr(value, key):
            attribute = getattr(value, key)
            entry[key] = list(attribute) if isinstance(attribute, tuple) else attribute
    return cast("D", entry)


@cache
def fields_of(document: Any) -> dict[str, tuple[Any, bool]]:
    """The keys of a TypedDict, with the type of each and whether it must be there."""
    hints = get_type_hints(document, include_extras=True)
    return {
        key: (get_args(kind)[0], False) if get_origin(kind) is NotRequired else (kind, True)
        for key, kind in hints.items()
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, inner = get_origin(kind), get_args(kind)
    match origin:
        case typing.Annotated:
            schema = _with_limits(_schema(inner[0], definitions), inner[1])
        case typing.Literal:
            schema = {"const": inner[0]} if len(inner) == 1 else {"enum": list(inner)}
        case _ if origin in (Union, UnionType):
            schema = _any_of([_schema(member, definitions) for member in inner])
        case builtins.list:
            schema = {"type": "array", "items": _schema(inner[0], definitions)}
        case builtins.tuple:
            columns = [_schema(member, definitions) for member in inner]
            schema = {"type": "array", "prefixItems": columns, "minItems": len(inner)}
            schema["items"] = False
        case builtins.dict:
            schema = {"type": "object", "additionalProperties": _schema(inner[1], definitions)}
        case _ if is_typeddict(kind):
            schema = _reference(kind, definitions)
        case _:
            schema = {} if kind is Any else {"type": _PLAIN[kind]}
    return schema


def _any_of(members: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = members
    # What may also be null says so in its type: that is how people write it.
    if others == [{"type": "null"}] and "type" in first:
        return {**first, "type": [first["type"], "null"]}
    return {"anyOf": members}


def _reference(document: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    name = document.__name__
    if name not in definitions:
        definitions[name] = {}
        about = {"description": (document.__doc__ or "").rstrip(".")}
        definitions[name] = about | _object_schema(document, definitions)
    return {"$ref": f"#/$defs/{name}"}


def _with_limits(schema: dict[str, Any], limits: Limits) -> dict[str, Any]:
    ends = {"string": "Length", "array": "Items", "object": "Properties"}.get(schema["type"])
    keywords = {
        "minimum": limits.minimum,
        "maximum": limits.maximum,
        f"min{ends}": limits.least,
        f"max{ends}": limits.most,
        "pattern": limits.pattern,
        "propertyNames": limits.keys and {"pattern": limits.keys},
        "description": limits.about,
    }
    return schema | {key: value for key, value in keywords.items() if value is not None}


def _object_schema(document: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    fields = fields_of(document)
    return {
        "type": "object",
        "properties": {key: _schema(kind, definitions) for key, (kind, _) in fields.items()},
        "required": [key for key, (_, required) in fields.items() if required],
        "additionalProperties": False,
    }


@cache
def _check(kind: Any, extra: Extra) -> Check:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in _MAKERS:
        return _MAKERS[origin](inner, extra)
    return _object_check(kind, extra) if is_typeddict(kind) else _plain_check(kind)


def _plain_check(kind: Any) -> Check:
    said = f": not {_WORDS[kind]}"
    if kind is float:
        return lambda value: None if _is_number(value) else said
    return lambda value: None if kind is Any or type(value) is kind else said


def _literal_check(known: Sequence[Any], _: Extra) -> Check:
    said = f": not {' or '.join(map(repr, known))}"
    kinds = {type(value) for value in known}
    # 1 is not true, and 1.0 is not 1.
    return lambda value: None if type(value) in kinds and value in known else said


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def _first_inside(parts: Iterable[tuple[object, Check, Any]]) -> str | None:
    """The first defect of the parts of a value, each with its key and check."""
    for key, check, value in parts:
        defect = check(value)
        if defect is not None:
            return f".{shown(str(key), _LONGEST_KEY)}{defect}"
    return None


def _object_check(document: Any, extra: Extra) -> Check:
    fields = fields_of(document)
    checks = {key: _check(kind, extra) for key, (kind, _) in fields.items()}
    required = [key for key, (_, needed) in fields.items() if needed]

    def check(value: Any) -> str | None:
        if type(value) is not dict:
            return ": not an object"
        missing = next((key for key in required if key not in value), None)
        if missing is not None:
            return f".{missing}: missing"
        if extra == "forbid" and not value.keys() <= checks.keys():
            unknown = next(key for key in value if key not in checks)
            return f".{shown(unknown, _LONGEST_KEY)}: not a known key"
        return _first_inside((key, checks[key], value[key]) for key in checks if key in value)

    return check


def _list_check(inner: Sequence[Any], extra: Extra) -> Check:
    check = _check(inner[0], extra)
    return lambda value: (
        _first_inside((at, check, item) for at, item in enumerate(value))
        if type(value) is list
        else ": not a list"
    )


def _row_check(inner: Sequence[Any], extra: Extra) -> Check:
    columns = [_check(member, extra) for member in inner]
    return lambda value: (
        _first_inside(zip(range(len(value)), columns, value, strict=True))
        if type(value) is list and len(value) == len(columns)
        else f": not a list of {len(columns)}"
    )


def _mapping_check(inner: Sequence[Any], extra: Extra) -> Check:
    check = _check(inner[1], extra)
    return lambda value: (
        _first_inside((key, check, item) for key, item in value.items())
        if type(value) is dict
        else ": not an object"
    )


def _union_check(inner: Sequence[Any], extra: Extra) -> Check:
    members = [_check(member, extra) for member in inner]

    def check(value: Any) -> str | None:
        found = []
        for member in members:
            defect = member(value)
            if defect is None:
                return None
            found.append(defect)
        # What is wrong inside says more than that it is another kind of value.
        inside = next((defect for defect in found if not defect.startswith(": not ")), None)
        return inside or " or".join([found[0], *(defect.removeprefix(":") for defect in found[1:])])

    return check


def _limits_check(inner: Sequence[Any], extra: Extra) -> Check:
    check_value, limits = _check(inner[0], extra), inner[1]
    pattern, keys = (re.compile(text or ".*", re.DOTALL) for text in (limits.pattern, limits.keys))

    def check(value: Any) -> str | None:
        if isinstance(value, Sized) and not _is_within(len(value), limits.least, limits.most):
            return f": has {len(value):,} entries"
        if isinstance(value, dict):
            wrong = next((key for key in value if not keys.fullmatch(key)), None)
            if wrong is not None:
                return f".{shown(wrong, _LONGEST_KEY)}: not a known key"
        defect = check_value(value)
        if defect is None and isinstance(value, int | float):
            in_range = _is_within(value, limits.minimum, limits.maximum)
            return None if in_range else ": out of range"
        if defect is None and isinstance(value, str) and not pattern.fullmatch(value):
            return f": not of the form {pattern.pattern}"
        return defect

    return check


def _is_within(value: float, low: int | None, high: int | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


_MAKERS: dict[Any, Callable[[Sequence[Any], Extra], Check]] = {
    Annotated: _limits_check,
    Literal: _literal_check,
    Union: _union_check,
    UnionType: _union_check,
    list: _list_check,
    tuple: _row_check,
    dict: _mapping_check,
}
