"""Whatever the text, reading gives a Policy or a PolicyError that points into it."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from policy_dsl.diagnostics import PolicyError, SourceText
from policy_dsl.language.read_dsl import read_dsl
from policy_dsl.language.read_yaml import read_yaml
from policy_dsl.policy import Policy

WORDS = [
    *("rules: |\n", "targets:", "target: x", "vars:", "down: 3", "match:", "layers:", "bits:"),
    *("${down}", "${", "$${", "-", "*", "?", "&", "!", "|", ">", "%", "@", "`", "{", "}", "["),
    *("]", "(", ")", ",", ":", ";", "#", "\t", "\n", "\n  ", '""', "'", "/a/", "//", '"', "\\"),
    *("4bit", "mxtq", "g64", "sym", "by", "awq", "keep", "optional", "all", "except", "in"),
    *("and", "or", "not", "layers", "0-1", "-2..-1", "where", "i", "n", "<", "==", "middle"),
    *("boundary", "2", "experts[0-15]", ".down_proj", "family", "router", "gate", "name"),
    *("model", "extends", "default", "group_size", "otherwise", "calibration", "imatrix"),
    *("output", "metadata", '{"a":1}', "prune", "experts", "to", "192", "reap", "test", "bpw"),
    *("<=", "3.3", "on", "gptq", "<<: *a", "&a", "!!python/name:os.system", "---", "..."),
    *("%YAML 1.2", "yes", "null", "~", "\\x41", "\\UFFFFFFFF", "\ufeff", "\x85", "\u2028"),
]
SENTENCES = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=25).map(" ".join)


def read_or_refuse(read, text):
    source = SourceText("p", text)
    try:
        outcome = read(source, "p")
    except PolicyError as error:
        outcome = error
    if isinstance(outcome, PolicyError):
        assert str(outcome)
        assert any(found.span is not None for found in outcome.diagnostics)
    else:
        assert isinstance(outcome, Policy)


@pytest.mark.parametrize("read", [read_dsl, read_yaml])
@given(text=SENTENCES | st.text(max_size=40))
@example("(" * 5000)
@example("[" * 5000)
@example("a: " * 2000)
@example("- " * 5000)
@example("not " * 5000)
@example("layers where " + "-" * 5000 + "1: 4bit")
@example("layers where " + "i+" * 5000 + "1: 4bit")
@example("layers where " + "9" * 5000 + " < i: 4bit")
@example("rules: 'layers where " + "(" * 31 + "i" + ")" * 31 + "< 2: 4bit'")
@example("all except " * 1000 + "all: 4bit")
@example("layers " + "9" * 6000 + ": 4bit")
@example("var a = " + "9" * 6000)
@example("metadata a " + "[" * 20000)
@example("metadata a " + "9" * 6000)
@example("metadata a 1e999")
@example("x: &a [*a]")
@example('"\\UFFFFFFFF": 1')
@example("%YAML 1." + "9" * 5000 + "\n--- a")
@example("/" + "(a*)*" * 10 + "/: 4bit")
@example("/" + "(" * 150 + ")" * 40 + "/: 4bit")
@example("/(?P<a>b)(?P<a>c)/: 4bit")
@example("/[[a]/: 4bit")
@example("a: 4bit\r\nb: 4bit\r\n")
@example("${" * 1000 + ": 4bit")
@example("on a {" * 100)
@example("}" * 100)
@example('var t = "gptq"\non ${t} {\n  all: 4bit\n}')
@example('on "gptq" {\n  all: 4bit\n}')
@example('"' * 101)
@settings(max_examples=150)
def test_any_text_is_read_or_refused(read, text):
    read_or_refuse(read, text)


@given(st.lists(SENTENCES, max_size=5))
@settings(max_examples=100)
def test_any_rules_of_a_yaml_policy_are_read_or_refused(items):
    block = "\n".join(f"  {line}" for item in items for line in item.splitlines())
    read_or_refuse(read_yaml, f"rules: |\n{block}\n")
    listed = "\n".join(f"  - {item}" for item in items)
    read_or_refuse(read_yaml, f"rules:\n{listed}\n")
