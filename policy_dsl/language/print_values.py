"""Values as DSL and YAML write them, so that reading gives the same value."""

from __future__ import annotations

import re
from typing import Any

from policy_dsl.language.draft import plain_scalar
from policy_dsl.language.fragments import escape_variables, quote
from policy_dsl.policy import Scalar

_DSL_BARE = re.compile(r"[A-Za-z0-9_./~+-][\w./@:+~-]*", re.ASCII)
_YAML_PLAIN = re.compile(r"[A-Za-z_/](?:[\w./@+,() -]*[\w./@+)-])?|[0-9]+[A-Za-z]{1,4}", re.ASCII)
_YAML_STATEMENT = re.compile(r"[A-Za-z_](?:[^\s:#]|:(?=\S)| (?=[^\s#]))*")
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def dsl_text(text: str, *, template: bool = False) -> str:
    """A text in DSL: bare if it is one word, else quoted.

    template: `${…}` in it are variables and stay.
    """
    text = text if template else escape_variables(text)
    return text if _DSL_BARE.fullmatch(text) else quote(text)


def dsl_scalar(value: Scalar) -> str:
    """A variable's value in DSL; a text that looks like another value is quoted."""
    if not isinstance(value, str):
        return json_text(value)
    text = dsl_text(value)
    return quote(text) if not isinstance(plain_scalar(text), str) else text


def yaml_text(text: str, *, template: bool = False) -> str:
    """A text in YAML on one line, plain if nobody can mistake it, else quoted."""
    text = text if template else escape_variables(text)
    mistakable = text.lower() in _YAML_WORDS or not isinstance(plain_scalar(text), str)
    if _YAML_PLAIN.fullmatch(text) and not mistakable:
        return text
    return quote(text)


def yaml_statement(text: str) -> str:
    """A statement as a YAML list item."""
    plain = _YAML_STATEMENT.fullmatch(text) and text.isprintable()
    return text if plain else quote(text)


def yaml_block(text: str) -> tuple[str, list[str]] | None:
    """Header and lines of a text as a literal block; None if it has one line or odd spaces."""
    body = text.removesuffix("\n")
    lines = body.split("\n")
    tidy = all(line.isprintable() and line == line.rstrip() for line in lines)
    if len(lines) < 2 or not tidy or not lines[0] or lines[0][0] == " " or not lines[-1]:
        return None
    return ("|" if text.endswith("\n") else "|-"), escape_variables(body).split("\n")


def json_text(value: Any, *, template: bool = False) -> str:
    """A JSON value on one line; valid JSON and valid YAML."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return number(value)
        case str():
            return quote(value if template else escape_variables(value))
        case dict():
            pairs = (
                f"{quote(key)}: {json_text(item, template=template)}" for key, item in value.items()
            )
            return "{" + ", ".join(pairs) + "}"
    return "[" + ", ".join(json_text(item, template=template) for item in value) + "]"


def number(value: float) -> str:
    """A number as JSON and every YAML version read it."""
    text = repr(value)
    return text.replace("e", ".0e") if "e" in text and "." not in text else text
