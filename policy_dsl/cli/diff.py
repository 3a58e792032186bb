"""`policyc diff`: what changes from one policy, saved plan or bundle to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policy_dsl.cli import console, options
from policy_dsl.cli.planning import Request, make_plan

if TYPE_CHECKING:
    from policy_dsl.outline import Outline

Side = Annotated[
    str, typer.Argument(help="A policy, a plan saved by `plan --save`, or a bundle folder.")
]
ExitCode = Annotated[
    bool, typer.Option("--exit-code", help="Exit with 1 if there is a difference.")
]


@console.guarded
def diff(
    a: Side,
    b: Side,
    model: options.ModelName = None,
    target: options.TargetName = None,
    overrides: options.Overrides = None,
    format: options.AnyReport = "text",
    exit_code: ExitCode = False,
    verbose: options.Verbose = False,
) -> None:
    """Show which tensors B treats differently than A, and what that costs.

    \b
    Examples:
      policyc diff config_i mine.yaml --model MiniMaxAI/MiniMax-M2.7
      policyc diff plan.json policies/config_i.yaml --exit-code
      policyc diff ./old-bundle ./new-bundle --format markdown
    """
    from policy_dsl.diff import diff as compared
    from policy_dsl.diff_text import diff_document, diff_markdown, diff_text

    sides = [read_side(Request(each, model, target, overrides, verbose)) for each in (a, b)]
    found = compared(*sides)
    if format == "json":
        console.write_json(diff_document(found))
    elif format == "markdown":
        console.write(diff_markdown(found))
    else:
        console.write(diff_text(found, width=console.stdout_width()))
    console.stop_if(exit_code and not found.is_empty)


def read_side(request: Request) -> Outline:
    """The outline of what is named: a bundle folder, a saved plan, or a policy.

    Raises: PolicyError if it is none of them, or has defects.
    """
    path = Path(request.policy)
    if path.is_dir():
        from emitters.core.bundle_outline import bundle_outline

        return bundle_outline(path)
    if path.suffix == ".json":
        from policy_dsl.plan_json import read_saved_plan

        return read_saved_plan(path)
    from policy_dsl.outline import outline

    return outline(make_plan(request)[0])
