"""The pages that must say what the program says: diagnostic codes, commands, options."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from emitters import FORMATS
from policy_dsl.diagnostics import SEVERITIES, catalogue
from policyc.cli import main
from policyc.reports import render_markdown
from policyc.reports.formats_report import models_blocks

COMMANDS = Path(__file__).parent.parent / "docs" / "commands.md"
ERRORS = Path(__file__).parent.parent / "docs" / "errors.md"
FAMILIES = Path(__file__).parent.parent / "docs" / "families.md"
HEAD = """\
# Errors, warnings and notes

Every finding has a code that names the defect, a message, the place in your text where there is
one, and where possible a suggestion. All findings of a stage are reported at once. Errors stop the
command; warnings do not, unless `--fail-on-warn` is given; notes never do. A policy can
[accept](language.md#accepted-findings) warnings and notes.

```
error[unknown-role]: architecture qwen3_moe has no role "experts.dwon_proj"
  --> policies/balanced.yaml:14:12
14 |   - match: experts.dwon_proj
   |            ^^^^^^^^^^^^^^^^^ did you mean "experts.down_proj"?
```

A defect of many tensors, modules or files is one finding about the first of them; a note counts
the others and names a few.

`--format json` gives every finding as an object with `code`, `severity`, `message`, `file`,
`line`, `column`, `suggestion` and `notes`; `policyc check` has other forms too.
Words in braces are filled in.
"""

FAMILIES_HEAD = """\
# Families of models, and what each target makes of them

What `policyc models` prints, without its catalog. A family is one file in
`policy_dsl/architectures`; [extending.md](extending.md) says how to add yours.

"""


def page() -> str:
    """What docs/errors.md must hold: every code with its message, cause and fix."""
    parts = [HEAD]
    for severity in SEVERITIES:
        parts.append(f"\n## {severity.capitalize()}s\n")
        for name in sorted(catalogue()):
            code = catalogue()[name]
            if code.severity == severity:
                parts.append(f"\n### {name}\n\n`{code.message}`\n\n{code.cause}\n")
                parts.append(f"\n*Fix:* {code.fix}\n" if code.fix else "")
    return "".join(parts)


def test_every_code_is_documented_as_it_is() -> None:
    if os.environ.get("UPDATE_SNAPSHOTS"):
        ERRORS.write_text(page(), encoding="utf-8")
    assert ERRORS.read_text(encoding="utf-8") == page()


def test_every_family_is_documented_with_what_targets_make_of_it() -> None:
    _catalog, *families = models_blocks({}, list(FORMATS.values()))
    page = FAMILIES_HEAD + render_markdown(families)
    if os.environ.get("UPDATE_SNAPSHOTS"):
        FAMILIES.write_text(page, encoding="utf-8")
    assert FAMILIES.read_text(encoding="utf-8") == page


def test_every_command_and_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    page = COMMANDS.read_text(encoding="utf-8")
    main(["--help"])
    commands = re.findall(r"^  (\w+)  ", capsys.readouterr().out.split("Commands:")[1], re.M)
    headings = " ".join(re.findall(r"^## (.*)$", page, re.M))
    assert [name for name in commands if not re.search(rf"\b{name}\b", headings)] == []
    options: set[str] = set()
    for name in commands:
        main([name, "--help"])
        options.update(re.findall(r"(?<![\w-])--[a-z][a-z-]+", capsys.readouterr().out))
    assert sorted(each for each in options - {"--help"} if f"`{each}" not in page) == []
