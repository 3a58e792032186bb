"""Quoted texts, written and read the same way in DSL and YAML double quotes."""

from __future__ import annotations

import re

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r"}
_NAMED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)


def quote(text: str) -> str:
    """The text in double quotes on one line; what does not print is escaped."""
    return '"' + "".join(_escaped(char) for char in text) + '"'


def unquote(quoted: str) -> str:
    """The text that double quotes hold; an unknown escape stands for its character."""
    return _ESCAPE.sub(lambda found: _unescaped(found[1]), quoted[1:-1])


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    return char if char.isprintable() else f"\\U{ord(char):08x}"


def _unescaped(code: str) -> str:
    if len(code) == 1:
        return _NAMED.get(code, code)
    number = int(code[1:], 16)
    return chr(number) if number <= 0x10FFFF else "\N{REPLACEMENT CHARACTER}"
