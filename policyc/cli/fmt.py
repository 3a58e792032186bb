"""`policyc fmt`: policies in their usual form, and from YAML to DSL and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from policy_dsl.diagnostics import PolicyError, fail
from policy_dsl.escaping import escaped
from policy_dsl.regular_files import is_passed
from policyc.cli import console, options

Form = Literal["yaml", "dsl"]
STDIN = "-"

PolicyFiles = Annotated[
    list[str],
    typer.Argument(metavar="FILE", help="Policy files; - is stdin.", parser=options.given_text),
]
CheckOnly = Annotated[
    bool, typer.Option("--check", help="Write nothing; exit with 1 if a file would change.")
]
OtherForm = Annotated[
    Form | None,
    typer.Option("--to", help="Print one policy in this form; the file stays as it is."),
]


@console.guarded
def fmt(files: PolicyFiles, check: CheckOnly = False, to: OtherForm = None) -> None:
    """Rewrite policy files in their usual form, in place; - reads stdin and prints.

    \b
    Examples:
      policyc fmt policies/*.yaml
      policyc fmt --check policies/*.yaml
      policyc fmt --to dsl policies/config_i.yaml > config_i.qpol
    """
    # Two policies printed one after the other would be no policy.
    if to is not None and len(files) > 1:
        raise fail("bad-argument", option="--to", reason="takes one file at a time")
    # What is printed in the other form is never the text of the file.
    if to is not None and check:
        raise fail("bad-argument", option="--check", reason="cannot be combined with --to")
    defects: list[PolicyError] = []
    changed = []
    for file in files:
        try:
            if _format_one(file, to, check=check):
                changed.append(file)
        # The other files are still formatted; all defects are shown in the end.
        except PolicyError as error:
            defects.append(error)
    if defects:
        raise PolicyError(found for error in defects for found in error.diagnostics)
    # Every file is named before the exit code says that there was one.
    if check:
        lines = [f"{escaped(file)} is not in the usual form\n" for file in changed]
        console.write("".join(lines))
        console.stop_if(bool(changed))


def _format_one(file: str, to: Form | None, *, check: bool) -> bool:
    """Format one file; whether its text changes.

    Raises: PolicyError with the defects of the text.
    """
    from policy_dsl.language.load import parse_policy, read_source, source_of
    from policy_dsl.language.parsing import MAX_BYTES
    from policy_dsl.language.print_policy import print_dsl, print_yaml

    if file == STDIN:
        # The text layer would decode by locale; policies are UTF-8 everywhere.
        source = source_of(Path("stdin"), sys.stdin.buffer.read(MAX_BYTES + 1))
    else:
        source = read_source(Path(file))
    text = source.text
    policy, form = parse_policy(text, file)
    shown = print_dsl(policy) if (to or form) == "dsl" else print_yaml(policy)
    # A converted text needs another file name, so it is printed, never put in place.
    changes = shown != text
    if check:
        return changes
    if to is not None or file == STDIN or is_passed(Path(file)):
        console.write_policy(shown)
    elif changes:
        console.save_text(Path(file), shown)
    return changes
