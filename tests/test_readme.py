"""The README shows what the program really prints, its two commands are one line each, and no
page leads nowhere.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
ROOMS = ("policy_dsl", "emitters", "tests", "docs", "policies", "grammar", "benchmarks")
LEFT_OUT = "…"


def blocks(language: str) -> list[list[str]]:
    """The lines of every code block of that language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [block.splitlines() for block in found]


def missing(shown: list[str], real: str) -> list[str]:
    """The lines that are shown and do not follow in the real text, in this order."""
    rest = iter(line.rstrip() for line in real.splitlines())
    return [line for line in shown if line.strip() not in ("", LEFT_OUT) and line not in rest]


def test_policy_is_the_bundled_one() -> None:
    (shown,) = blocks("yaml")
    policy = (ROOT / "policies" / "config_i.yaml").read_text(encoding="utf-8")
    assert missing(shown, policy) == []


def test_plan_is_what_the_program_prints() -> None:
    (shown,) = blocks("text")
    command = [sys.executable, "-m", "policyc", "plan", "policies/config_i.yaml"]
    printed = subprocess.run(
        command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    ).stdout
    assert missing(shown, printed) == []


def test_two_commands_of_one_line_each() -> None:
    setup, test = blocks("sh")
    assert (len(setup), test) == (1, [".venv/bin/pytest"])
    assert all(step in setup[0] for step in ("venv", "install", "policyc build", "policyc verify"))


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    named = re.findall(rf"`((?:{'|'.join(ROOMS)})/[\w./-]+)`", text)
    assert [link for link in links if not (path.parent / link).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []
