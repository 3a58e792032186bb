"""`policyc diff`: what changes from one policy, saved plan or bundle to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policy_dsl.diagnostics import PolicyError, diagnostic, did_you_mean
from policyc import workflow
from policyc.cli import console, options
from policyc.cli.options import Request

if TYPE_CHECKING:
    from policy_dsl.planning.outline import Outline

Side = Annotated[
    str, options.argument(None, "A policy, a plan saved by `plan --save`, or a bundle folder.")
]


@options.requesting("policy", "allow_requantize", "imatrix")
def diff(
    request: Request,
    a: Side,
    b: Side,
    format: options.AnyReport = "text",
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if there is a difference.")
    ] = False,
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
    from policyc.reports.diff_report import diff_blocks, diff_document

    requests = _with_own_overrides([replace(request, policy=side) for side in (a, b)])
    # `diff mlx_4bit config_i` should just work: only one of them names a model.
    shared = request.model or next(filter(None, map(_own_model, requests)), None)
    before, after = (_outline(each, shared) for each in requests)
    changes = workflow.diff(before, after)
    console.write_report(format, diff_document, diff_blocks, changes)
    console.stop_if(exit_code and not changes.is_empty)


def _outline(request: Request, model: str | None) -> Outline:
    """The outline of what a request names. model: for a policy that names none."""
    if not _is_policy(request):
        return workflow.outline_of(request.policy, links=not request.no_links)
    own = request.model or _own_model(request)
    return workflow.outline_of(replace(request, model=own or model).plan())


def _with_own_overrides(requests: list[Request]) -> list[Request]:
    """The requests, each with the overrides of variables that its policy has.

    Raises: PolicyError (bad-argument, unknown-variable).
    """
    variables = [_own_variables(request) for request in requests]
    given = options.parse_overrides(requests[0].overrides)
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
    return {name for name, _ in replace(request, overrides=None).read_policy().vars}


def _own_model(request: Request) -> str | None:
    """The model that a policy names; None if it names none, or this is not a policy."""
    return request.read_policy().model if _is_policy(request) else None


def _is_policy(request: Request) -> bool:
    # A folder and a .json file cannot be policies, so there is nothing to guess.
    path = Path(request.policy)
    return not path.is_dir() and path.suffix != ".json"
