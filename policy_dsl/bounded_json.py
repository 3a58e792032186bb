"""JSON that somebody else may have written, parsed here and nowhere else.

A short text can become many objects, so the signs that values are made of are counted first: what
comes out takes at most a dozen times the size of the text, and 160 MB, and never more than three
times that size and half a GB.
"""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

# Real documents have a sign in 10 to 20 bytes, short ones more; each costs 80 bytes of memory.
MOST_SIGNS = 2_000_000
BYTES_PER_SIGN = 8
# More than the saved plan of the largest model has.
MOST_SIGNS_EVER = 6_000_000
# More than any document that policyc reads has; what walks through one is never in danger.
MOST_LEVELS = 100
# The largest number of a config is model_max_length, 1e30 as a whole number.
MOST_DIGITS = 64
_ZEROS = bytes.maketrans(b"123456789", b"000000000")


def parse_json(
    content: bytes, *, hook: Callable[[list[tuple[str, Any]]], Any] | None = None, what: str = "it"
) -> Any:
    """The value that a JSON text in UTF-8 holds; NaN, and repeated keys, pass.

    hook: makes an object of its pairs, instead of `dict`. what: how the reason calls the text.
    Raises: ValueError, saying why in words, also if it has more values than its size explains,
    is nested deeper than 100 levels, or has a whole number of more than 64 digits.
    """
    with _parsing(content, what):
        # A regular expression would take as long as the rest.
        has_long = b"0" * (MOST_DIGITS + 1) in content.translate(_ZEROS)
        number = _whole_number if has_long else None
        value = json.loads(content.decode(), object_pairs_hook=hook, parse_int=number)
    _refuse_deep(value, what)
    return value


def parse_json_at(content: bytes, start: int, *, what: str) -> tuple[Any, int]:
    """The value of the JSON text at a byte, and where it ends. Raises: ValueError."""
    with _parsing(content, what):
        # What follows is not text: bytes that are not UTF-8 pass until the end is known.
        text = content[start:].decode("utf-8", "surrogateescape")
        value, length = json.JSONDecoder(parse_int=_whole_number).raw_decode(text)
    _refuse_deep(value, what)
    stop = start + len(text[:length].encode("utf-8", "surrogateescape"))
    try:
        content[start:stop].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 at byte {start + error.start}") from None
    return value, stop


@contextmanager
def uncollected() -> Iterator[None]:
    """A context without garbage collection, for what makes many objects and keeps them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _parsing(content: bytes, what: str) -> Iterator[None]:
    # Signs inside of strings count too: it is a bound, and costs next to nothing.
    most = min(MOST_SIGNS + len(content) // BYTES_PER_SIGN, MOST_SIGNS_EVER)
    if len(content) > MOST_SIGNS and sum(map(content.count, (b",", b":", b"[", b"{"))) > most:
        raise ValueError(f"{what} has more than {most:,} values")
    try:
        with uncollected():
            yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {error}") from None


def _whole_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a whole number has {len(text)} digits")
    return int(text)


def _refuse_deep(value: Any, what: str) -> None:
    level: list[Any] = [[value]]
    for _ in range(MOST_LEVELS + 1):
        held = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [inner for inner in chain.from_iterable(held) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise ValueError(f"{what} is nested too deeply")
