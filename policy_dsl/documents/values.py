"""Values of documents: made of attributes, and checked against the types of the documents.

Types: TypedDict, tuple (rows of fixed columns), list, dict, Literal, unions, str, int, float,
bool, None; `Annotated[T, Limits(…)]`. Published JSON Schemas are made of the same types.
"""

from __future__ import annotations

import re
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

from policy_dsl.escaping import shown

Extra = Literal["forbid", "ignore"]
D = TypeVar("D")
# A value -> its first defect, after its place in the value: `.modules.a: not a text`.
Check = Callable[[Any], str | None]
_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
    Any: "anything",
}
_LONGEST_KEY = 80


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
