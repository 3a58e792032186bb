"""`policyc diff`: what changes from one policy, saved plan or bundle to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policy_dsl.diagnostics import PolicyError, diagnostic, did_you_mean
from policyc.cli import console, options
from policyc.cli.planning import Request, load_policy, make_plan, parse_overrides

if TYPE_CHECKING:
    from policy_dsl.planning.outline import Outline

Side = Annotated[
    str,
    typer.Argument(
        help="A policy, a plan saved by `plan --save`, or a bundle folder.",
        parser=options.given_text,
    ),
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
    saliency: options.SaliencyFile = None,
    no_links: options.NoLinks = False,
    format: options.AnyReport = "text",
    exit_code: ExitCode = False,
    verbose: options.Verbose = False,
) -> None:
    """Show which tensors B treats differently than A, and what that costs.

    A policy that names no model is planned for --model, or else for the other one's. --set
    holds for the policies that have the variable.

    \b
    Examples:
      policyc diff mlx_4bit config_i
      policyc diff plan.json policies/config_i.yaml --exit-code
      policyc diff ./old-bundle ./new-bundle --format markdown
    """
    from policy_dsl.planning.diff import diff as compared
    from policyc.reports.diff_text import diff_document, diff_markdown, diff_text

    requests = _with_own_overrides(
        [
            Request(
                *(side, model, target, overrides, verbose), saliency=saliency, links=not no_links
            )
            for side in (a, b)
        ]
    )
    # `diff mlx_4bit config_i` should just work: only one of them names a model.
    shared = model or next(filter(None, map(_own_model, requests)), None)
    before, after = (read_side(request, shared) for request in requests)
    found = compared(before, after)
    console.write_report(found, format, (diff_document, diff_markdown, diff_text))
    console.stop_if(exit_code and not found.is_empty)


def read_side(request: Request, model: str | None = None) -> Outline:
    """The outline of what is named: a bundle folder, a saved plan, or a policy.

    model: for a policy that names none.
    Raises: PolicyError if it is none of them, or has defects.
    """
    path = Path(request.policy)
    if path.is_dir():
        from emitters.core.bundle_outline import bundle_outline

        return bundle_outline(path, links=request.links)
    if path.suffix == ".json":
        from policyc.reports.plan_json import read_saved_plan

        return read_saved_plan(path)
    from policy_dsl.planning.outline import outline

    own = request.model or _own_model(request)
    return outline(make_plan(replace(request, model=own or model))[0])


def _with_own_overrides(requests: list[Request]) -> list[Request]:
    """The requests, each with the overrides of variables that its policy has.

    Raises: PolicyError (bad-argument, unknown-variable).
    """
    variables = [_own_variables(request) for request in requests]
    given = parse_overrides(requests[0].overrides)
    known = set().union(*variables)
    unknown = [
        diagnostic("unknown-variable", suggestion=did_you_mean(name, known), name=name)
        for name in given
        if name not in known
    ]
    if unknown:
        raise PolicyError(unknown)
    return [
        replace(request, overrides=[f"{name}={given[name]}" for name in given if name in own])
        for request, own in zip(requests, variables, strict=True)
    ]


def _own_variables(request: Request) -> set[str]:
    if not request.overrides or not _is_policy(request):
        return set()
    return {name for name, _ in load_policy(replace(request, overrides=None)).vars}


def _own_model(request: Request) -> str | None:
    """The model that a policy names; None if it names none, or this is no policy."""
    return load_policy(request).model if _is_policy(request) else None


def _is_policy(request: Request) -> bool:
    # A folder and a .json file cannot be policies, so there is nothing to guess.
    path = Path(request.policy)
    return not path.is_dir() and path.suffix != ".json"
