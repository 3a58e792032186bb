"""Many tensor names as few patterns, and back: `layers.{0-61}.experts.{0-255}.w1.weight`.

A field holds whole numbers: `{0-3}`, `{5}`, `{0-3,7,9-12}`; several fields mean every
combination. A brace of the name itself is doubled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from math import prod

MAX_PATTERN_LENGTH = 2000
_MOST_SHOWN = 200

_TOKEN = re.compile(r"(\{\{|\}\}|[^{}]+)|\{(\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*)\}")
# `07` would come back as `7`, so it is text.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")

Numbers = tuple[int, ...]


def name_patterns(names: Iterable[str]) -> list[str]:
    """The fewest simple patterns that expand to exactly these names, in order of first sight.

    Only whole dotted parts become fields: the 1 of `w1` stays as it is, and so does `07`.
    """
    numbers: dict[tuple[str | None, ...], list[Numbers]] = {}
    for name in names:
        parts = name.split(".")
        found = [_NUMBER.fullmatch(part) is not None for part in parts]
        template = tuple(
            None if number else part for part, number in zip(parts, found, strict=True)
        )
        here = tuple(int(part) for part, number in zip(parts, found, strict=True) if number)
        numbers.setdefault(template, []).append(here)
    return [
        _pattern(template, fields)
        for template, rows in numbers.items()
        for fields in _products(sorted(set(rows)))
    ]


def expand_pattern(pattern: str, *, limit: int, letters: int) -> list[str]:
    """Every name of a pattern, the last field running fastest.

    letters: how many the names may have together.
    Raises: ValueError if the pattern is malformed, cannot be printed, or stands for more than
    `limit` names, or for longer ones.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(f"a name pattern has {len(pattern)} characters")
    if not pattern.isprintable():
        raise ValueError(f"the name pattern {pattern!a} cannot be printed")
    pieces = list(_pieces(pattern))
    shown = pattern if len(pattern) <= _MOST_SHOWN else f"{pattern[:_MOST_SHOWN]}…"
    # Counted before anything is made: ranges multiply.
    count = prod(sum(map(len, piece)) for piece in pieces if isinstance(piece, list))
    if count > limit:
        raise ValueError(f'the name pattern "{shown}" stands for {count:,} names')
    longest = sum(max(map(len, _widest(piece))) for piece in pieces)
    if count * longest > letters:
        said = f"{count:,} names of up to {longest:,} characters, more than {letters:,} in all"
        raise ValueError(f'the name pattern "{shown}" stands for {said}')
    # Prefix by prefix: a hundred thousand names take a twentieth of a second.
    names = [""]
    for piece in pieces:
        ends = _ends(piece)
        names = [name + end for name in names for end in ends]
    return names


def _widest(piece: str | list[range]) -> Iterable[str]:
    """Texts of which one is as long as the longest that a piece stands for."""
    return [piece] if isinstance(piece, str) else (str(part[-1]) for part in piece)


def _ends(piece: str | list[range]) -> list[str]:
    if isinstance(piece, str):
        return [piece]
    return [str(number) for part in piece for number in part]


def _pieces(pattern: str) -> Iterator[str | list[range]]:
    place = 0
    while place < len(pattern):
        token = _TOKEN.match(pattern, place)
        ranges = [_range(part) for part in token[2].split(",")] if token and token[2] else []
        if token is None or not all(ranges):
            raise ValueError(f'the name pattern "{pattern}" is malformed at {place}')
        place = token.end()
        yield ranges or {"{{": "{", "}}": "}"}.get(token[1], token[1])


def _range(part: str) -> range:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def _products(rows: list[Numbers]) -> Iterator[list[Numbers]]:
    """Lists of values per field whose combinations, together, are exactly the sorted rows."""
    if not rows[0]:
        yield []
        return
    # First numbers followed by the same rest make one product with it.
    alike: dict[tuple[Numbers, ...], list[int]] = {}
    for first, group in groupby(rows, key=lambda row: row[0]):
        alike.setdefault(tuple(row[1:] for row in group), []).append(first)
    for rest, firsts in alike.items():
        for fields in _products(list(rest)):
            yield [tuple(firsts), *fields]


def _pattern(template: tuple[str | None, ...], fields: list[Numbers]) -> str:
    values = iter(fields)
    return ".".join(
        _field(next(values)) if part is None else part.replace("{", "{{").replace("}", "}}")
        for part in template
    )


def _field(numbers: Numbers) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return "{" + ",".join("-".join(map(str, run)) for run in runs) + "}"
