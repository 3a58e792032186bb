"""The language reference: every policy on it can be read, and its claims hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from policy_dsl.diagnostics import PolicyError, SourceText
from policy_dsl.language.draft import FIELDS
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.language.read_yaml import RULE_FIELDS, YAML_KEYS, read_yaml
from policy_dsl.policy import COMPONENTS, SINGLE_ROLES, WORDS, Policy

PAGE = (Path(__file__).parents[3] / "docs" / "language.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(qpol|yaml)\n(.*?)```", PAGE, re.DOTALL)
READERS = {"qpol": read_dsl, "yaml": read_yaml}


def read(kind: str, text: str) -> Policy:
    return READERS[kind](SourceText(f"language.{kind}", text), "page")


@pytest.mark.parametrize(("kind", "text"), BLOCKS)
def test_every_policy_of_the_page_is_read(kind: str, text: str) -> None:
    assert read(kind, text).rules


@pytest.mark.parametrize("words", ["The same in YAML:", "It says the same as:"])
def test_what_is_said_to_be_the_same_is(words: str) -> None:
    before, after = PAGE.split(words)
    one = re.findall(r"```(qpol|yaml)\n(.*?)```", before, re.DOTALL)[-1]
    other = re.findall(r"```(qpol|yaml)\n(.*?)```", after, re.DOTALL)[0]
    assert read(*one) == read(*other)


def test_the_message_of_the_page_is_the_one_people_see() -> None:
    with pytest.raises(PolicyError) as caught:
        read_dsl(SourceText("policy.qpol", "down_proj: 4bit mxqt\n"), "policy")
    assert f"```text\n{caught.value}\n```" in PAGE


def test_every_word_of_the_language_is_on_the_page() -> None:
    fields = [field for known in (RULE_FIELDS, *FIELDS.values()) for field in known]
    words = [*COMPONENTS, *SINGLE_ROLES, *WORDS.methods, *YAML_KEYS, *fields]
    assert sorted(word for word in words if not re.search(rf"\b{word}\b", PAGE)) == []
