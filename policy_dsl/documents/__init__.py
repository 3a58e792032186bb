"""Types of JSON documents: records, saved plans, and everything that `--format json` prints.

Each is a TypedDict of str, int, float, bool, None, Literal, list, dict, tuple (rows of fixed
columns), unions, and `Annotated[T, Limits(…)]`. Published JSON Schemas are made of them.
"""

import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, repeat
from math import inf, isfinite
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, TypedDict, TypeVar, Union, get_origin

from policy_dsl.escaping import shown

Extra = Literal["forbid", "ignore"]
D = TypeVar("D")
# A value -> its first defect, after its place in the value: `.modules.a: not a text`.
Check = Callable[[Any], str | None]
# Key or index, check, and value of something in a value.
_Part = tuple[object, Check, Any]
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_WORDS |= {NoneType: "null", Any: "anything"}
_LONGEST_KEY = 80


@dataclass(frozen=True, slots=True)
class Limits:
    """What `Annotated` adds to a type: ranges of numbers, patterns of texts, a description.

    least, most: of the length of a text, list or mapping. keys: pattern of a mapping's keys.
    """

    minimum: float = -inf
    maximum: float = inf
    least: int = 0
    most: float = inf
    pattern: str | None = None
    keys: str | None = None
    about: str | None = None


Count = Annotated[int, Limits(minimum=0)]
Layer = Annotated[int, Limits(minimum=0, maximum=65535)]


class Document(TypedDict):
    """What every document has, but for its `kind`."""

    schema_version: Literal[1]


class RuleAt(TypedDict):
    """Where the rule is that decided; null where no rule did."""

    path: str
    line: Annotated[int, Limits(minimum=1)]
    column: Annotated[int, Limits(minimum=1)]


class FindingEntry(TypedDict):
    """One finding; file, line and column are null without a place."""

    code: str
    severity: Literal["error", "warning", "note"]
    message: str
    file: str | None
    line: Count | None
    column: Count | None
    suggestion: str | None
    notes: list[str]


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
    entry: dict[str, Any] = {}
    for key, (_, required) in fields_of(typing.cast("Any", document)).items():
        if key in given:
            entry[key] = given[key]
        elif required or hasattr(value, key):
            attribute = getattr(value, key)
            entry[key] = list(attribute) if isinstance(attribute, tuple) else attribute
    return typing.cast("D", entry)


@cache
def fields_of(document: Any) -> dict[str, tuple[Any, bool]]:
    """The keys of a TypedDict, with the type of each and whether it must be there."""
    hints = typing.get_type_hints(document, include_extras=True).items()
    optional = {key: kind.__args__[0] for key, kind in hints if get_origin(kind) is NotRequired}
    return {key: (optional.get(key, kind), key not in optional) for key, kind in hints}


@cache
def _check(kind: Any, extra: Extra) -> Check:
    origin, inner = get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        return _object_check(kind, extra)
    if origin is Literal:
        kinds, said = set(map(type, inner)), f": not {' or '.join(map(repr, inner))}"
        # 1 is not true, and 1.0 is not 1.
        return lambda value: None if type(value) in kinds and value in inner else said
    if origin is Annotated:
        return _limits_check(_check(inner[0], extra), inner[1])
    if origin is not None:
        return _parts_check(origin, [_check(member, extra) for member in inner])
    said = f": not {_WORDS[kind]}"
    if kind is not float:
        return lambda value: None if kind is Any or type(value) is kind else said
    return lambda value: None if type(value) in (int, float) and isfinite(value) else said


def _parts_check(origin: Any, checks: Sequence[Check]) -> Check:
    """The check of a union, a mapping, a list, or a tuple: a list of fixed length."""
    if origin in (Union, UnionType):
        return _union_check(checks)
    length = len(checks) if origin is tuple else None
    said = f": not a list of {length}" if length else ": not a list"
    if origin is dict:
        said, check = ": not an object", checks[1]
        return _inside(dict, said, lambda value: zip(value, repeat(check), value.values()))
    of_items: Iterable[Check] = checks if length else repeat(checks[0])
    return _inside(list, said, lambda value: zip(count(), of_items, value), length)


def _inside(
    holder: Any, said: str, parts: Callable[[Any], Iterable[_Part]], length: int | None = None
) -> Check:
    def check(value: Any) -> str | None:
        if type(value) is not holder or length not in (None, len(value)):
            return said
        for key, check_part, part in parts(value):
            if (defect := check_part(part)) is not None:
                return f".{shown(str(key), _LONGEST_KEY)}{defect}"
        return None

    return check


def _object_check(document: Any, extra: Extra) -> Check:
    fields = fields_of(document)
    checks = {key: _check(kind, extra) for key, (kind, _) in fields.items()}
    required = [key for key, (_, needed) in fields.items() if needed]

    def entries(value: dict[str, Any]) -> Iterator[_Part]:
        # A check that fails with the text that it is given.
        yield from ((key, str, ": missing") for key in required if key not in value)
        if extra == "forbid":
            yield from ((key, str, ": not a known key") for key in value if key not in checks)
        yield from ((key, check, value[key]) for key, check in checks.items() if key in value)

    return _inside(dict, ": not an object", entries)


def _union_check(members: Sequence[Check]) -> Check:
    def check(value: Any) -> str | None:
        found = list(filter(None, (member(value) for member in members)))
        if len(found) < len(members):
            return None
        # What is wrong inside says more than that it is another kind of value.
        inside = next((defect for defect in found if not defect.startswith(": not ")), None)
        return inside or " or".join([found[0], *(defect.removeprefix(":") for defect in found[1:])])

    return check


def _limits_check(check_value: Check, limits: Limits) -> Check:
    pattern, keys = (text and re.compile(text) for text in (limits.pattern, limits.keys))

    def check(value: Any) -> str | None:
        kind = type(value)
        if kind in (str, list, dict) and not limits.least <= len(value) <= limits.most:
            return f": has {len(value):,} entries"
        if keys and kind is dict:
            wrong = next((key for key in value if not keys.fullmatch(key)), None)
            if wrong is not None:
                return f".{shown(wrong, _LONGEST_KEY)}: not a known key"
        if (defect := check_value(value)) is not None:
            return defect
        if kind in (int, float) and not limits.minimum <= value <= limits.maximum:
            return ": out of range"
        if pattern and not pattern.fullmatch(value):
            return f": not of the form {pattern.pattern}"
        return None

    return check
