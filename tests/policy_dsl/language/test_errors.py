"""Every mistake of tests/errors, with the whole message that people see."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from policy_dsl.diagnostics import FINDINGS, PolicyError, SourceText
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.language.read_yaml import read_yaml

FOLDER = Path(__file__).parents[2] / "errors"
READERS = {"qpol": read_dsl, "yaml": read_yaml}
CASE = re.compile(
    r"^## (?P<title>.+)\n\n"
    r"```(?P<kind>qpol|yaml)\n(?P<text>(?:.|\n)*?)```\n\n"
    r"```text\n(?P<message>(?:.|\n)*?)\n```$",
    re.MULTILINE,
)
CASES = [
    pytest.param(case["kind"], case["text"], case["message"], id=f"{path.stem}-{case['title']}")
    for path in sorted(FOLDER.glob("*.md"))
    for case in CASE.finditer(path.read_text(encoding="utf-8"))
]
# Tests whose cases need more than one text, or a model.
OTHERS = ("test_load.py", "test_layer_expression.py")


@pytest.mark.parametrize(("kind", "text", "message"), CASES)
def test_the_message_is_the_one_shown(kind: str, text: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        READERS[kind](SourceText(f"policy.{kind}", text), "policy")
    assert str(caught.value) == message


def test_no_case_is_overlooked() -> None:
    titles = [re.findall("^## ", page.read_text(), re.M) for page in FOLDER.glob("*.md")]
    assert len(CASES) == sum(map(len, titles))


def test_every_code_of_the_language_has_a_case() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in FOLDER.glob("*.md"))
    tests = "".join((Path(__file__).parent / name).read_text() for name in OTHERS)
    shown = set(re.findall(r"^\w+\[([\w-]+)\]:", pages, re.M)) | set(
        re.findall(r"\"([\w-]+)\"", tests)
    )
    codes = yaml.safe_load((FINDINGS / "language.yaml").read_text(encoding="utf-8"))
    assert sorted(set(codes) - shown) == []
