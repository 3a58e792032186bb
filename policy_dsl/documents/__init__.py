"""What JSON documents hold: records, saved plans, and everything `--format json` prints.

Each is a TypedDict of str, int, float, bool, None, Literal, list, dict, tuple (rows of fixed
columns), unions, and `Annotated[T, Limits(…)]`. Here is what several share, and what makes values
of attributes and checks them against the types. Published JSON Schemas are made of the same types.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, repeat
from math import inf, isfinite
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypedDict,
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
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
_WORDS |= {NoneType: "null", Any: "anything"}
_LONGEST_KEY = 80


@dataclass(frozen=True, slots=True)
class Limits:
    """What `Annotated` adds to a type: ranges of numbers and of sizes, patterns, a description.

    minimum, maximum: of a number. least, most: of the length of a text, list or mapping.
    pattern: of a text. keys: of the keys of a mapping.
    """

    minimum: int | None = None
    maximum: int | None = None
    least: int | None = None
    most: int | None = None
    pattern: str | None = None
    keys: str | None = None
    about: str | None = None


Count = Annotated[int, Limits(minimum=0)]
# Offsets and sizes of files are signed 64-bit numbers wherever they are used.
Size = Annotated[int, Limits(minimum=0, maximum=2**63 - 1)]
Sha256 = Annotated[str, Limits(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, Limits(least=1)]
Layer = Annotated[int, Limits(minimum=0, maximum=65535)]
Experts = Annotated[int, Limits(minimum=0, maximum=65536)]
SomeExperts = Annotated[int, Limits(minimum=1, maximum=65536)]
_Kept = dict[str, Annotated[list[Experts], Limits(least=1)]]


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
    severity: Literal["error", "warning"]
    message: str
    file: str | None
    line: Count | None
    column: Count | None
    suggestion: str | None
    notes: list[str]


class TransformEntry(TypedDict):
    """Experts that were pruned; `kept` is null while nobody chose those that stay.

    `kept` maps a layer to the old numbers of its experts, in the order of the new ones.
    """

    prune: Literal["experts"]
    by: str | None
    before: SomeExperts
    to: SomeExperts
    layers: SomeExperts
    kept: Annotated[_Kept, Limits(least=1, most=65536, keys="^(0|[1-9][0-9]{0,4})$")] | None


class GroupEntry(TypedDict):
    """Modules of one role with one treatment and one reason; `rule` is empty if not known."""

    role: str
    layers: list[Layer]
    treatment: str
    rule: str
    rule_at: NotRequired[RuleAt | None]
    tensors: Count
    parameters: Count
    nbytes: Count
    bpw: float | None


class NamedReason(TypedDict):
    """Something that is left out, and why."""

    name: str
    reason: str


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
    if is_typeddict(kind):
        return _object_check(fields_of(kind), extra)
    if origin is Literal:
        return _literal_check(inner)
    if origin is Annotated:
        return _limits_check(_check(inner[0], extra), inner[1])
    if origin in (Union, UnionType):
        return _union_check([_check(member, extra) for member in inner])
    return _parts_check(origin, inner, extra) if origin else _plain_check(kind)


def _plain_check(kind: Any) -> Check:
    said = f": not {_WORDS[kind]}"
    if kind is float:
        return lambda value: None if type(value) in (int, float) and isfinite(value) else said
    return lambda value: None if kind is Any or type(value) is kind else said


def _literal_check(known: Sequence[Any]) -> Check:
    said = f": not {' or '.join(map(repr, known))}"
    kinds = {type(value) for value in known}
    # 1 is not true, and 1.0 is not 1.
    return lambda value: None if type(value) in kinds and value in known else said


def _first_inside(
    keys: Iterable[object], checks: Iterable[Check], values: Iterable[Any]
) -> str | None:
    for key, check, value in zip(keys, checks, values, strict=False):
        defect = check(value)
        if defect is not None:
            return f".{shown(str(key), _LONGEST_KEY)}{defect}"
    return None


def _object_check(fields: Mapping[str, tuple[Any, bool]], extra: Extra) -> Check:
    checks = {key: _check(kind, extra) for key, (kind, _) in fields.items()}
    required = [key for key, (_, needed) in fields.items() if needed]

    def check(value: Any) -> str | None:
        if type(value) is not dict:
            return ": not an object"
        missing = next((key for key in required if key not in value), None)
        if missing is not None:
            return f".{missing}: missing"
        unknown = next((key for key in value if key not in checks), None)
        if unknown is not None and extra == "forbid":
            return f".{shown(unknown, _LONGEST_KEY)}: not a known key"
        keys = [key for key in checks if key in value]
        return _first_inside(keys, map(checks.__getitem__, keys), map(value.__getitem__, keys))

    return check


def _parts_check(origin: Any, inner: Sequence[Any], extra: Extra) -> Check:
    """The check of a list, a mapping, or a tuple: a list of fixed length."""
    checks = [_check(member, extra) for member in inner]
    length = len(checks) if origin is tuple else None
    said = f": not a list of {length}" if length else ": not a list"

    def of_list(value: Any) -> str | None:
        if type(value) is not list or length not in (None, len(value)):
            return said
        return _first_inside(count(), checks if length else repeat(checks[0]), value)

    def of_mapping(value: Any) -> str | None:
        if type(value) is not dict:
            return ": not an object"
        return _first_inside(value, repeat(checks[1]), value.values())

    return of_mapping if origin is dict else of_list


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
    ends = (limits.least, limits.minimum), (limits.most, limits.maximum)
    least, low = (-inf if end is None else end for end in ends[0])
    most, high = (inf if end is None else end for end in ends[1])
    pattern, keys = (text and re.compile(text, re.DOTALL) for text in (limits.pattern, limits.keys))

    def check(value: Any) -> str | None:
        kind = type(value)
        if kind in (str, list, dict) and not least <= len(value) <= most:
            return f": has {len(value):,} entries"
        if kind is dict and keys:
            wrong = next((key for key in value if not keys.fullmatch(key)), None)
            if wrong is not None:
                return f".{shown(wrong, _LONGEST_KEY)}: not a known key"
        defect = check_value(value)
        if defect is not None:
            return defect
        if kind in (int, float) and not low <= value <= high:
            return ": out of range"
        if pattern and not pattern.fullmatch(value):
            return f": not of the form {pattern.pattern}"
        return None

    return check
