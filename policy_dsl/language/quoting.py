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


def short_escapes(text: str) -> str:
    """A JSON text with `\\U…`, which JSON does not know, as the characters themselves."""
    return _ESCAPE.sub(lambda found: _unescaped(found[1]) if found[1][0] == "U" else found[0], text)


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 1 << 16 else f"\\U{ord(char):08x}"


def _unescaped(code: str) -> str:
    if len(code) == 1:
        return _NAMED.get(code, code)
    number = int(code[1:], 16)
    return chr(number) if number <= 0x10FFFF else "\N{REPLACEMENT CHARACTER}"
