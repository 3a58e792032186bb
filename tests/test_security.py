"""docs/security.md: each of its claims names its tests, each limit is the program's."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
LEAD, *SECTIONS = re.split(r"^## ", PAGE, flags=re.M)
CLAIMS = [claim for section in SECTIONS for claim in re.split(r"^- ", section, flags=re.M)[1:]]
UNITS = {"": 1, "MiB": 2**20}
LIMITS = re.findall(r"^\| (.+) \| (.+) <!-- (.+) -->", PAGE, flags=re.M)


def without_comments(text: str) -> str:
    """The text that a reader sees, on one line."""
    return " ".join(COMMENT.sub("", text).split())


@cache
def names_of(path: str) -> set[str]:
    """The names of a file's tests."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_sentence_is_a_claim_of_its_own() -> None:
    for section in SECTIONS:
        title, _, body = section.partition("\n")
        table = r"^\|.*\n"
        beside = re.sub(table, "", re.split(r"^- ", body, flags=re.M)[0], flags=re.M)
        # What leads into a list ends with a colon.
        assert re.fullmatch(r"([^.]+|\.\S)*:|", without_comments(beside)), title
    for claim in CLAIMS:
        assert re.fullmatch(r"[^.]+(\.\S[^.]*)*\.", without_comments(claim)), claim


def test_every_claim_names_tests_that_there_are() -> None:
    assert len(CLAIMS) > 20
    for claim in CLAIMS:
        named = [name.split("::") for found in COMMENT.findall(claim) for name in found.split()]
        assert named, claim
        for path, test in named:
            assert test.startswith("test_"), claim
            assert test in names_of(path), (path, test)


def test_every_limit_is_the_one_of_the_program() -> None:
    assert len(LIMITS) > 10
    for what, shown, name in LIMITS:
        module, _, constant = name.rpartition(".")
        limit = getattr(import_module(module), constant)
        number, _, unit = shown.partition(" ")
        assert int(number.replace(",", "")) * UNITS[unit] == limit, what
