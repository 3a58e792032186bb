"""The keys of a policy: what each holds, how DSL spells it, how it merges; values read.

Readers, printers and `merge` all walk this one table.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import yaml

from policy_dsl import room
from policy_dsl.diagnostics import Diagnostic, diagnostic, did_you_mean
from policy_dsl.language.fragments import Fragment
from policy_dsl.policy import Calibration, Defaults, Output, Part, Scalar
from policy_dsl.quantities import parse_size
from policy_dsl.treatments import WHOLE_ROW
from policy_dsl.vocabulary import Words


@dataclass(frozen=True)
class Key:
    """A key of policies, with the word that begins its statements in DSL.

    kind: one text, a list of words, named values of any type (mapping) or of given ones
    (fields), statements, or rules. merge: what a policy and one that extends it give together:
    what the latter says alone, the last value, all of them, mappings joined, or rules in order.
    """

    name: str
    kind: Literal["text", "words", "mapping", "fields", "statements", "rules"]
    word: str
    merge: Literal["own", "last", "all", "join", "rules"]


KEYS = (
    Key("name", "text", "name", "own"),
    Key("description", "text", "description", "last"),
    Key("model", "text", "model", "last"),
    Key("targets", "words", "target", "rules"),
    Key("extends", "words", "extends", "own"),
    Key("vars", "mapping", "var", "join"),
    Key("defaults", "fields", "default", "join"),
    Key("transforms", "statements", "", "last"),
    Key("calibration", "fields", "calibration", "join"),
    Key("rules", "rules", "", "rules"),
    Key("output", "fields", "output", "join"),
    Key("fp8_dequant", "text", "fp8_dequant", "last"),
    Key("metadata", "mapping", "metadata", "join"),
    Key("runtimes", "words", "runtime", "last"),
    Key("tests", "statements", "test ", "all"),
)
# What a policy can take away from what it extends. Tests may be given anew with it.
CLEARABLE = tuple(key.name for key in KEYS if key.merge in ("last", "all", "join"))
SECTIONS: Mapping[str, type[Part]] = {
    "defaults": Defaults,
    "calibration": Calibration,
    "output": Output,
}
# The JSON Schema of a policy as YAML: it names the keys and fields that readers take, and their
# types. That statements are well formed only the readers can say.
SCHEMA: Mapping[str, Any] = json.loads(
    (room("grammar") / "policy.schema.json").read_text(encoding="utf-8")
)
YAML_KEYS = tuple(SCHEMA["properties"])
RULE_FIELDS: Mapping[str, Any] = SCHEMA["$defs"]["rule"]["properties"]
# In the order in which a statement says them.
TRANSFORM_FIELDS = tuple(SCHEMA["$defs"]["transform"]["properties"])
FIELDS: Mapping[str, Mapping[str, Any]] = {
    section: SCHEMA["properties"][section]["properties"] for section in SECTIONS
}


@cache
def mistakes() -> Mapping[str, Any]:
    """What people write that the language does not take, and what to write instead."""
    text = (room("grammar") / "mistakes.yaml").read_text(encoding="utf-8")
    return dict(yaml.load(text, Loader=yaml.SafeLoader))


TRUTH = {"true": True, "false": False}
# YAML 1.1 reads these words as truth values; people rarely mean to.
_YAML_TRUTH = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,999})")
_FLOAT = re.compile(r"-?[0-9]+(?:\.[0-9]+(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)")
_NUMBER = re.compile(r"[-+]?[0-9]{1,18}(\.[0-9]{1,40})?(e[-+]?[0-9]{1,3})?")
_TYPES: Mapping[str, tuple[re.Pattern[str], Callable[[str], Any], str]] = {
    "integer": (re.compile(r"[-+]?[0-9]{1,18}"), int, "a whole number"),
    "number": (_NUMBER, float, "a number"),
    "boolean": (re.compile("true|false"), TRUTH.__getitem__, "true or false"),
}


def plain_scalar(text: str) -> Scalar:
    """A bare word as the value it looks like: a truth value, a number, or text."""
    if text in TRUTH:
        return TRUTH[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    return text


def read_typed(kind: str, value: Fragment, findings: list[Diagnostic], *, where: str) -> Any | None:
    """The integer, number or boolean that the text is; None after adding a defect."""
    pattern, convert, expected = _TYPES[kind]
    if pattern.fullmatch(value.text):
        return convert(value.text)
    meant = _YAML_TRUTH.get(value.text.lower()) if kind == "boolean" else None
    findings.append(_wrong(where, expected, value, f"write {meant}" if meant else None))
    return None


def read_field(
    section: str, name: str, value: Fragment, words: Words, findings: list[Diagnostic]
) -> Any | None:
    """The field's value of the type that it takes; None after adding a defect."""
    schema, text = FIELDS[section][name], value.text
    known = {"scheme": words.schemes, "method": words.methods}.get(name)
    if schema["type"] != "string":
        read = read_typed(schema["type"], value, findings, where=name)
    elif known is not None and text not in known:
        cure = did_you_mean(text, known)
        findings.append(diagnostic(f"unknown-{name}", value.span, suggestion=cure, **{name: text}))
        return None
    elif name == "shard_size" and not parse_size(text):
        cure = "write a number with a unit, such as 5GiB or 5GB"
        findings.append(_wrong(name, "a size", value, cure))
        return None
    elif not text.strip():
        findings.append(diagnostic("empty-value", value.span, key=name))
        return None
    else:
        read = text
    reason = None if read is None else _misfit(schema, read)
    if reason is not None:
        path = f"{section}.{name}"
        findings.append(diagnostic("bad-value", value.span, key=path, value=read, reason=reason))
    return read


def _misfit(schema: Mapping[str, Any], value: Any) -> str | None:
    """What a field takes, if the value is not that."""
    if "enum" in schema and value not in schema["enum"]:
        return " or ".join(f"'{word}'" for word in schema["enum"])
    if "anyOf" in schema and value < 1 and value != WHOLE_ROW:
        return f"1 or more, or {WHOLE_ROW} for whole rows"
    if "minimum" in schema and value < schema["minimum"]:
        return f"greater than or equal to {schema['minimum']}"
    if "maximum" in schema and value > schema["maximum"]:
        return f"less than or equal to {schema['maximum']}"
    return None


def _wrong(where: str, expected: str, value: Fragment, cure: str | None) -> Diagnostic:
    written = f'"{value.text}"' if value.text else "nothing"
    return diagnostic(
        "wrong-type", value.span, suggestion=cure, key=where, expected=expected, found=written
    )
