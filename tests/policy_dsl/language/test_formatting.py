"""`fmt` loses nothing: comments stay in place, in both notations and from one to the other.

formatting/NAME is a policy as somebody wrote it; NAME.fmt.yaml and NAME.fmt.qpol are what it
becomes. To record them anew:
    UPDATE_SNAPSHOTS=1 pytest tests/policy_dsl/language/test_formatting.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_dsl.language.load import parse_policy
from policy_dsl.language.print_policy import print_dsl, print_yaml

FOLDER = Path(__file__).parent / "formatting"
WRITTEN = sorted(path for path in FOLDER.iterdir() if ".fmt." not in path.name)
PRINTERS = {"yaml": print_yaml, "qpol": print_dsl}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
@pytest.mark.parametrize("suffix", PRINTERS)
def test_a_policy_is_formatted_as_recorded(path: Path, suffix: str) -> None:
    policy, _ = parse_policy(path.read_text(), path.name)
    text = PRINTERS[suffix](policy)
    recorded = path.with_name(f"{path.name}.fmt.{suffix}")
    if os.environ.get("UPDATE_SNAPSHOTS"):
        recorded.write_text(text)
    assert text == recorded.read_text()
    again, _ = parse_policy(text, f"{path.stem}.{suffix}")
    assert again == policy
    assert PRINTERS[suffix](again) == text


YAML = """\
name: x
target: mlx_affine
vars:
  down: 3
defaults:
  bits: 4
  otherwise: keep
rules:
  - all: 4bit
  - match: experts.down_proj
    bits: 3
targets:
  gptq:
    rules: |
      embed: 8bit
      lm_head: 8bit
metadata:
  card:
    a: 1
tests:
  - bpw <= 3.3
"""
DSL = """\
name x
target mlx_affine
var down = 3
default bits 4
all: 4bit; embed: 8bit
on gptq {
  lm_head: 8bit
}
metadata card {"a": 1}
test bpw <= 3.3
"""
PLACES = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(["above", "beside"])), max_size=6)


def with_comments(text: str, places: list[tuple[int, str]]) -> tuple[str, list[str]]:
    """The text with numbered comments above or beside its lines, and those comments."""
    lines = [[line] for line in text.splitlines()]
    comments = []
    for number, (at, where) in enumerate(places):
        comment = f"# c{number}"
        line = lines[at % len(lines)]
        if where == "above":
            line.insert(0, f"{line[-1][: len(line[-1]) - len(line[-1].lstrip())]}{comment}")
        elif "#" not in line[-1]:
            line[-1] += f"  {comment}"
        else:
            continue
        comments.append(comment)
    return "".join(f"{each}\n" for line in lines for each in line), sorted(comments)


@pytest.mark.parametrize(("written", "suffix"), [(YAML, "yaml"), (DSL, "qpol")])
@given(places=PLACES)
def test_every_comment_is_kept_wherever_it_stands(written, suffix, places):
    if suffix == "yaml":
        written = written.replace("target: mlx_affine\n", "")
    text, comments = with_comments(written, places)
    policy, _ = parse_policy(text, f"x.{suffix}")
    for form, printer in PRINTERS.items():
        printed = printer(policy)
        kept = [f"#{line.partition('#')[2]}" for line in printed.splitlines() if "#" in line]
        assert sorted(kept) == comments, printed
        again, _ = parse_policy(printed, f"x.{form}")
        assert (again, printer(again)) == (policy, printed)
