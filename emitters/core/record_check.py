"""Whether a record is what its published schema says, field by field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from math import isfinite
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.protocols import Validator
from jsonschema.validators import extend

from emitters.core.record import record_schema

_LONGEST = 200


def record_defects(document: Any) -> Iterator[str]:
    """What of a record is not as the schema says, with the place of each field; lazily.

    Stricter than JSON Schema in this: 2.0 is not a whole number, and NaN is not a number.
    """
    defect = None
    for defect in _checks().iter_errors(document):
        place = ".".join(str(key) for key in defect.absolute_path)
        reason = defect.message.split("\n", 1)[0]
        yield (f"{place}: {reason}" if place else reason)[:_LONGEST]
    if defect is None:
        yield from _repeated(document["modules"])


def _repeated(modules: Mapping[str, Any]) -> Iterator[str]:
    """Tensors of two modules, and parts that a module has twice."""
    owners: dict[str, str] = {}
    for path, module in modules.items():
        parts = set()
        for name in module["tensors"]:
            part = name.rpartition(".")[2]
            if part in parts or owners.setdefault(name, path) != path:
                yield f"modules.{path}.tensors: {name} is listed twice"[:_LONGEST]
            parts.add(part)


@cache
def _checks() -> Validator:
    types = Draft202012Validator.TYPE_CHECKER.redefine_many(
        {
            "integer": lambda _, value: type(value) is int,
            "number": lambda _, value: type(value) in (int, float) and isfinite(value),
        }
    )
    strict = extend(Draft202012Validator, type_checker=types)  # type: ignore[no-untyped-call]
    checks: Validator = strict(record_schema())
    return checks
