"""`policyc diff`: what changes from one policy, saved plan or bundle to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policy_dsl.cli import console, options
from policy_dsl.cli.planning import Request, load_policy, make_plan

if TYPE_CHECKING:
    from policy_dsl.planning.outline import Outline

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

    A policy that names no model is planned for --model, or else for the other one's.

    \b
    Examples:
      policyc diff mlx_4bit config_i
      policyc diff plan.json policies/config_i.yaml --exit-code
      policyc diff ./old-bundle ./new-bundle --format markdown
    """
    from policy_dsl.planning.diff import diff as compared
    from policy_dsl.reports.diff_text import diff_document, diff_markdown, diff_text

    requests = [Request(side, model, target, overrides, verbose) for side in (a, b)]
    # `diff mlx_4bit config_i` should just work: only one of them names a model.
    shared = model or next(filter(None, map(_own_model, requests)), None)
    before, after = (read_side(request, shared) for request in requests)
    found = compared(before, after)
    if format == "json":
        console.write_json(diff_document(found))
    elif format == "markdown":
        console.write(diff_markdown(found))
    else:
        console.write(diff_text(found, width=console.stdout_width()))
    console.stop_if(exit_code and not found.is_empty)


def read_side(request: Request, model: str | None = None) -> Outline:
    """The outline of what is named: a bundle folder, a saved plan, or a policy.

    model: for a policy that names none.
    Raises: PolicyError if it is none of them, or has defects.
    """
    path = Path(request.policy)
    # A folder and a .json file cannot be policies, so there is nothing to guess.
    if path.is_dir():
        from emitters.core.bundle_outline import bundle_outline

        return bundle_outline(path)
    if path.suffix == ".json":
        from policy_dsl.reports.plan_json import read_saved_plan

        return read_saved_plan(path)
    from dataclasses import replace

    from policy_dsl.planning.outline import outline

    own = request.model or _own_model(request)
    return outline(make_plan(replace(request, model=own or model))[0])


def _own_model(request: Request) -> str | None:
    """The model that a policy names; None if it names none, or this is no policy."""
    path = Path(request.policy)
    if path.is_dir() or path.suffix == ".json":
        return None
    return load_policy(request).model
