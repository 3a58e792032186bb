"""JSON of strangers: bounded before it is parsed, and refused in words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from policy_dsl.bounded_json import MOST_DIGITS, MOST_LEVELS, parse_json, parse_json_at


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is not JSON: Expecting value"),
        (b"{'a': 1}", "it is not JSON"),
        (b'{"a": 1', "it is not JSON"),
        (b'"\xff"', "it is not UTF-8 at byte 1"),
        (b"\xef\xbb\xbf{}", "it is not JSON"),
        ("{}".encode("utf-16"), "it is not UTF-8 at byte 0"),
        (b"[" * 200_000, "it is nested too deeply"),
        (b'{"a":' * 100_000, "it is nested too deeply"),
        (b"[" * 101 + b"]" * 101, "it is nested too deeply"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "it is nested too deeply"),
        (b"1" * (MOST_DIGITS + 1), "a whole number has 65 digits"),
        (b"-" + b"1" * 5000, "a whole number has 5001 digits"),
        (b"[" + b"[]," * 8_000_000 + b"[]]", "it has more than 5,000,000 values"),
        (b"[" + b"{}," * 8_000_000 + b"{}]", "it has more than 5,000,000 values"),
        (b"{" + b'"":0,' * 4_000_000 + b'"":0}', "it has more than 4,500,000 values"),
        (b"[" + b'"aaaaaaaaaaaa",' * 6_000_000 + b"1]", "it has more than 6,000,000 values"),
    ],
)
def test_texts_that_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(content)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"model_max_length": 10**30, "a": [1, 2.5, "x", True, {}]},
        ["[[[[", "{{{{", "1" * 1000, ",:" * 1000],
        int("9" * MOST_DIGITS),
        "\N{GRINNING FACE}",
    ],
)
def test_what_documents_hold_is_read(value: object) -> None:
    for ascii_only in (False, True):
        assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_a_hundred_levels_are_read() -> None:
    parse_json(b"[" * MOST_LEVELS + b"]" * MOST_LEVELS)


def test_a_hook_makes_the_objects() -> None:
    assert parse_json(b'{"a": 1, "a": 2}', hook=list) == [("a", 1), ("a", 2)]


def test_a_text_inside_of_other_bytes() -> None:
    assert parse_json_at(b'\0\0{"a": "\xc3\xa9"}\xff\0', 2, what="x") == ({"a": "é"}, 13)
    with pytest.raises(ValueError, match="x is not UTF-8 at byte 4"):
        parse_json_at(b'\0\0["\xff"]', 2, what="x")
    with pytest.raises(ValueError, match="x is nested too deeply"):
        parse_json_at(b"[" * 100_000, 0, what="x")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="says nothing of memory")
@pytest.mark.parametrize("unit", ["[],", "{},", '{"":0},', '"ab",', "12345,", "[[]],", "[1],"])
def test_what_is_read_takes_no_memory_out_of_proportion(unit: str) -> None:
    # As many values as the bound lets through, and some.
    program = (
        "from policy_dsl.bounded_json import parse_json\n"
        f"unit = {unit.encode()!r}\n"
        "signs = sum(map(unit.count, b',:[{'))\n"
        "most = min((2_000_000 - 2) / (signs - len(unit) / 8), 5_999_990 / signs)\n"
        "text = b'[' + unit * int(most) + b'0]'\n"
        "parse_json(text)\n"
        "peak = open('/proc/self/status').read().partition('VmHWM:')[2].split()[0]\n"
        "used = int(peak) * 1024\n"
        "assert used < 60_000_000 + 160_000_000 + 12 * len(text), (used, len(text))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
