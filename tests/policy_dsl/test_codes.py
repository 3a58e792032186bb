"""The catalogue of findings: every entry is used, and every use gives what its message needs."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from policy_dsl.diagnostics import FINDINGS, catalogue

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for room in ("policyc", "policy_dsl", "emitters") for path in (ROOT / room).rglob("*.py")
]
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES
}
NO_FACTS = {"span", "suggestion", "notes", "of"}
MAKERS = {"diagnostic", "fail"}


def facts(code: str) -> set[str]:
    """The names that the message of a code fills in."""
    return {name for _, name, _, _ in string.Formatter().parse(catalogue()[code].message) if name}


def codes_of(node: ast.expr) -> list[str]:
    """The codes that an expression may be."""
    if isinstance(node, ast.IfExp):
        return codes_of(node.body) + codes_of(node.orelse)
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def uses() -> Iterator[tuple[str, ast.Call, str]]:
    """Place, call and code of every call that makes a finding of a code that it spells out."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and _name(node.func) in MAKERS:
                yield from (
                    (f"{path}:{node.lineno}", node, code) for code in codes_of(node.args[0])
                )


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


USES = list(uses())


@pytest.mark.parametrize(
    ("place", "call", "code"), [pytest.param(*use, id=f"{use[0]}-{use[2]}") for use in USES]
)
def test_a_use_gives_the_facts_of_its_message(place: str, call: ast.Call, code: str) -> None:
    given = {keyword.arg for keyword in call.keywords} - NO_FACTS
    if None in given:
        assert given - {None} <= facts(code)
    else:
        assert given == facts(code)


def test_the_uses_are_found() -> None:
    assert len(USES) > 200


def test_every_code_is_used() -> None:
    texts = {
        node.value
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert sorted(set(catalogue()) - texts) == []


def test_no_code_is_listed_twice() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in FINDINGS.glob("*.yaml"))
    assert len(re.findall(r"^[\w-]+:$", text, re.MULTILINE)) == len(catalogue())


def test_what_has_a_defect_is_a_fact_of_the_message() -> None:
    wrong = [name for name, code in catalogue().items() if code.each not in {"", *facts(name)}]
    assert wrong == []
