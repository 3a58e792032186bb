"""`policyc check`: defects of policies, alone and against a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from policy_dsl.diagnostics import Diagnostic, PolicyError, errors
from policy_dsl.escaping import escaped
from policyc.cli import console, options
from policyc.cli.planning import Request, load_policy, open_model, plan_for

if TYPE_CHECKING:
    from policy_dsl.policy import Policy

PolicyNames = Annotated[
    list[str],
    typer.Argument(
        metavar="POLICY",
        help="Policy files, or names of bundled policies.",
        parser=options.given_text,
    ),
]


@dataclass(frozen=True)
class Checked:
    """What checking one policy found; `against` are the model and target pairs it was for."""

    reference: str
    name: str | None
    against: tuple[tuple[str, str], ...]
    findings: tuple[Diagnostic, ...]


@console.guarded
def check(
    policies: PolicyNames,
    model: options.ModelName = None,
    target: options.TargetName = None,
    overrides: options.Overrides = None,
    saliency: options.SaliencyFile = None,
    no_links: options.NoLinks = False,
    format: options.AnyFindings = "text",
    fail_on_warn: options.FailOnWarn = False,
    verbose: options.Verbose = False,
) -> None:
    """Find what is wrong with policies, all at once.

    With --model, against that model too, tests of the policy included. Exit code 1 if there
    are errors.

    \b
    Examples:
      policyc check policies/*.yaml
      policyc check mine.qpol --model ./my-checkpoint --target mlx_affine
      policyc check policies/*.yaml --format github
    """
    checked = [
        check_policy(
            Request(
                *(policy, model, target, overrides, verbose), saliency=saliency, links=not no_links
            )
        )
        for policy in policies
    ]
    findings = [found for one in checked for found in one.findings]
    if format == "text":
        console.write_findings(_text(checked))
    elif format == "json":
        console.write_json(_document(checked))
    elif format == "github":
        # Only what the chosen form needs is imported: `check` has to start at once.
        from policyc.reports.findings import github_line

        console.write_commands("".join(github_line(found) + "\n" for found in findings))
    else:
        from policy_dsl.resources import version
        from policyc.reports.findings import sarif

        console.write_json(sarif(findings, version=version()))
    console.stop_if(console.is_failure(findings, fail_on_warn=fail_on_warn))


def check_policy(request: Request) -> Checked:
    """All findings about one policy: its text, then each of its targets on the model."""
    try:
        policy = load_policy(request)
    except PolicyError as error:
        # One broken policy must not hide what is wrong with the others.
        return Checked(request.policy, None, (), error.diagnostics)
    findings: list[Diagnostic] = []
    against: list[tuple[str, str]] = []
    if request.model:
        # Each target has schemes of its own, so a policy for several is checked for each.
        targets = (request.target,) if request.target else policy.targets or (None,)
        for target in targets:
            findings += _against_model(request, policy, target, against)
    else:
        findings += _alone(request, policy)
    # Two targets may find the same defect; nobody wants to read it twice.
    return Checked(request.policy, policy.name, tuple(against), tuple(dict.fromkeys(findings)))


def _against_model(
    request: Request, policy: Policy, target: str | None, against: list[tuple[str, str]]
) -> Sequence[Diagnostic]:
    import emitters
    from emitters.core.side_files import source_findings
    from policy_dsl.planning.assertions import findings_of_tests
    from policy_dsl.planning.resolve import choose_target

    try:
        inventory = open_model(request, policy)
        chosen = choose_target(policy, emitters.specs(), target)
        # Before the plan, which may fail: what was tried is told either way.
        against.append((inventory.id, chosen))
        plan = plan_for(policy, inventory, chosen, statistics=request.statistics)
        beside = source_findings(plan, inventory, emitters.FORMATS[chosen].spec)
        return [*plan.findings, *beside, *findings_of_tests(plan)]
    except PolicyError as error:
        return error.diagnostics


def _alone(request: Request, policy: Policy) -> Sequence[Diagnostic]:
    import emitters
    from policy_dsl.planning.lint import lint

    return lint(policy, emitters.specs(), target=request.target)


def _text(checked: Sequence[Checked]) -> str:
    from policy_dsl.diagnostics import render
    from policyc.reports.findings import count_text

    parts = []
    for one in checked:
        if one.findings:
            parts.append(render(one.findings) + "\n\n")
        shown = " and ".join(f"{escaped(model)} as {target}" for model, target in one.against)
        place = f" (against {shown})" if shown else " (alone; --model checks it against one)"
        parts.append(f"{escaped(one.reference)}: {count_text(one.findings)}{place}\n")
    return "".join(parts)


def _document(checked: Sequence[Checked]) -> dict[str, Any]:
    from policyc.reports.findings import finding_json

    every = [found for one in checked for found in one.findings]
    return {
        "schema_version": 1,
        "kind": "check",
        "policies": [
            {
                "policy": one.reference,
                "name": one.name,
                "against": [{"model": model, "target": name} for model, name in one.against],
                "findings": [finding_json(found) for found in one.findings],
            }
            for one in checked
        ],
        "errors": len(errors(every)),
        "warnings": len(every) - len(errors(every)),
    }
