"""The pages that must say what the program says: the list of diagnostic codes."""

from __future__ import annotations

import os
from pathlib import Path

from policy_dsl.diagnostic_codes import CODES

ERRORS = Path(__file__).parent.parent / "docs" / "errors.md"
HEAD = """\
# Errors and warnings

Every finding has a code that names the defect, a message, the place in your text where there is
one, and where possible a cure. All findings of a stage are reported at once. Errors stop the
command; warnings do not, unless `--fail-on-warn` is given.

```
error[unknown-role]: architecture qwen3_moe has no role "experts.dwon_proj"
  --> policies/balanced.yaml:14:12
14 |   - match: experts.dwon_proj
   |            ^^^^^^^^^^^^^^^^^ did you mean "experts.down_proj"?
```

`--format json` gives every finding as an object with `code`, `severity`, `message`, `file`,
`line`, `column`, `suggestion` and `notes`; `policyc check` has `github` and `sarif` too.
Words in braces stand for the facts of the case.
"""


def page() -> str:
    """What docs/errors.md must hold: every code with its message and meaning."""
    parts = [HEAD]
    for severity in ("error", "warning"):
        parts.append(f"\n## {severity.capitalize()}s\n")
        for name in sorted(CODES):
            code = CODES[name]
            if code.severity == severity:
                parts.append(f"\n### {name}\n\n`{code.message}`\n\n{code.about}\n")
    return "".join(parts)


def test_every_code_is_documented_as_it_is() -> None:
    if os.environ.get("UPDATE_SNAPSHOTS"):
        ERRORS.write_text(page(), encoding="utf-8")
    assert ERRORS.read_text(encoding="utf-8") == page()
