"""Patterns of users and strangers: what they match, what is refused, and how long it takes."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from policy_dsl.linear_patterns import PatternError, glob, regular_expression

ROOT = Path(__file__).parents[2]
EXPONENTIAL = {
    "optional characters": ".?" * 60 + "Z",
    "choices of the same": r"(.|.)" * 35 + "Z",
    "repeats in a repeat": "(a+)+b",
    "choices in a repeat": "(a|aa)*Z",
    "many stars": ".*" * 30 + "Z",
    "optional groups": "(?:.?){40}.*" * 6 + "Z",
}
# What names are made of, and what is special in either syntax.
CHARACTERS = st.sampled_from([*"ab0_-. ^$[]!"])
# No name is empty, which Python does not read as every reader does: no \B is in it.
NAMES = st.text(CHARACTERS, min_size=1, max_size=8)
ATOMS = st.one_of(
    st.sampled_from([*"ab0_-", r"\.", ".", r"\d", r"\W", r"\s", r"\b", r"\B", r"\x61", r"\-"]),
    st.sampled_from(["[ab]", "[^a]", r"[\d_]", "[]a]", "[^]a]", "[a-]", r"[^\W\d]", "^", "$"]),
    st.sampled_from([r"\A", r"\Z", "{", "}", "a{", "a{,", "]", "(?i:A)", "(?i:[A-Z])"]),
)
EXPRESSIONS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "*?", "??"])),
        st.builds("(?:{}){}".format, inner, st.sampled_from(["{2}", "{,2}", "{1,}", "{1,2}?"])),
        st.builds("({}|{})".format, inner, inner),
        st.builds("(?P<n>{})".format, ATOMS),
    ),
    max_leaves=6,
)


def matched_lines(pattern: str, names: list[str]) -> list[str]:
    return list(regular_expression(pattern).among("\n".join(names).encode()))


@given(expression=EXPRESSIONS, names=st.lists(NAMES, max_size=5))
@example(expression="[^a]*", names=["b", "c"])
@example(expression=r"(?:\W|a)+", names=["a", "a"])
@example(expression=r"\Aa\Z", names=["a", "aa"])
@example(expression="a{,2}", names=["a{,2}", "aa"])
@example(expression=r"(?:\B)+", names=["", "a"])
def test_what_python_takes_too_matches_the_same_names(expression: str, names: list[str]):
    try:
        pythons = re.compile(expression)
    except re.error:
        return
    # Before 3.14, Python's \B is nowhere in an empty text.
    names = [name for name in names if name or r"\B" not in expression]
    expected = [name for name in names if pythons.fullmatch(name)]
    pattern = regular_expression(expression)
    assert [name for name in names if pattern.matches(name)] == expected
    assert matched_lines(expression, names) == [name for name in expected if name]


@given(
    text=st.text(st.sampled_from([*"ab-]![?*\\^.§—"]), max_size=8),
    names=st.lists(st.text(st.sampled_from([*"ab-]![\\^.é§—\n"]), max_size=6), max_size=5),
)
@example(text="[!]", names=["[!]", "!", "a"])
@example(text="[]", names=["[]"])
@example(text="[b-a]", names=["a", "b", "-"])
@example(text="[!b-a]", names=["a", "b", "-"])
@example(text="[a-b-]", names=["a", "b", "-"])
@example(text="[—]§", names=["—§", "§", "—"])
def test_a_glob_matches_what_fnmatch_does(text: str, names: list[str]):
    # What is left of `[b-a!a]` is the other way round to `fnmatch`, by mistake.
    assume(not re.search(r"\[(.-.)+!", text))
    expected = [name for name in names if fnmatch.fnmatchcase(name, text)]
    assert [name for name in names if glob(text).matches(name)] == expected


@pytest.mark.parametrize(
    ("expression", "name", "matches"),
    [
        # Of other scripts, letters and digits are none.
        (r"\d", "\N{ARABIC-INDIC DIGIT TWO}", False),
        (r"\w", "é", False),
        (r"\W", "é", True),
        (".", "é", True),
        ("[^a]", "é", True),
        ("é+", "éé", True),
        ("é", "e", False),
        # The end is the end, and no line's.
        ("a$", "a\n", False),
        (r"a\Z", "a\n", False),
        ("a.", "a\n", False),
        ("(?s)a.", "a\n", True),
    ],
)
def test_names_that_are_not_ascii(expression: str, name: str, matches: bool):
    assert regular_expression(expression).matches(name) is matches


@pytest.mark.parametrize("expression", EXPONENTIAL.values(), ids=EXPONENTIAL)
def test_no_expression_takes_exponential_time(expression: str, tmp_path: Path):
    policy = tmp_path / "slow.qpol"
    policy.write_text(f"target mlx_affine\nall: 4bit\n/{expression}/: 8bit optional\n")
    command = [sys.executable, "-m", "policyc", "check", policy, "--model"]
    subprocess.run(
        [*command, "examples/tiny-minimax-m2"], cwd=ROOT, timeout=60, check=True, text=True
    )


@pytest.mark.parametrize("name", ["a" * 5_000, "ab" * 2_500, "a" * 5_000 + "b"])
@pytest.mark.parametrize("expression", EXPONENTIAL.values(), ids=EXPONENTIAL)
def test_long_names_take_no_exponential_time(expression: str, name: str):
    assert regular_expression(expression).matches(name) in (True, False)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("(?=a)", r"looks around"),
        ("(?<!a)b", r"looks around"),
        (r"(a)\1", r'"\\1" repeats what a group matched'),
        ("(?P<n>a)(?P=n)", r"repeats what a group matched"),
        ("(a)(?(1)b|c)", r"repeats what a group matched"),
        (r"(((((((((((a)))))))))))\11", r"repeats what a group matched"),
        ("a*+", r"repeats a repeat"),
        ("(?>a)", r"forbids other ways to match"),
        ("[[:alpha:]]", r"is not read alike"),
        ("[a[:alpha:]]", r"is not read alike"),
        ("[a&&b]", r"is not read alike"),
        ("(?a)a", r"changes how the expression is read"),
        ("a(?i)b", r"changes how the expression is read"),
        (r"\z", r"is not known here"),
        ("(?<n>a)", r"names a group in another notation"),
        (r"\Qa.b\E", r"is not known here"),
        (r"\C", r"is not known here"),
        (r"\pL", r"is not known here"),
        (r"\101", r"repeats what a group matched"),
        ("a{1001}", r"more than 1,000 times"),
        ("(a{100}){11}", r"more than 1,000"),
        ("a{2,1}", r"counts backwards"),
        (".{1000}", r"it takes 2,004 steps for a character, more than 1,000"),
        ("a" * 1001, r"longer than 1,000 characters"),
        ("\\", r"nothing is after its last \\"),
        ("(" * 1000, r"a \( is not closed"),
        (")(", r"a \) has no \("),
        ("a)|(?:b", r"a \) has no \("),
        ("(?i)a))(?i:(b", r"a \) has no \("),
        (r"[(]a\()b(c", r"a \) has no \("),
        ("^*a", r"\* has nothing to repeat"),
        (r"a\b{2}", r"\{2\} has nothing to repeat"),
        (r"(a\Z{,2})", r"\{,2\} has nothing to repeat"),
    ],
)
def test_what_is_not_read_in_linear_time_or_not_alike_is_refused(expression: str, reason: str):
    with pytest.raises(PatternError, match=reason):
        regular_expression(expression)


@pytest.mark.parametrize("text", ["*" * 1001, "[" * 100_000, "?" * 1001])
def test_a_glob_without_end_is_refused(text: str):
    with pytest.raises(PatternError, match=r"longer than|steps"):
        glob(text)


def test_nothing_is_logged(capfd: pytest.CaptureFixture[str]):
    for expression in ("(", "a{1001}", "(?:a{,30}b{,30}.{,30})*c"):
        try:
            regular_expression(expression).matches("ab" * 100_000)
        except PatternError:
            continue
    assert capfd.readouterr() == ("", "")
