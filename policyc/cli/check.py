"""`policyc check`: defects of policies, alone and against a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from policy_dsl.diagnostics import Diagnostic, PolicyError, count_text, errors, render
from policy_dsl.escaping import escaped
from policyc import workflow
from policyc.cli import console, options

if TYPE_CHECKING:
    from policy_dsl.documents.reports import CheckDocument
    from policy_dsl.policy import Policy


@dataclass(frozen=True)
class Checked:
    """The findings about one policy; `against` are the models and targets they are about."""

    policy: str
    name: str | None
    against: tuple[tuple[str, str], ...]
    findings: tuple[Diagnostic, ...]


@options.requesting("policy", "allow_requantize", "imatrix")
def check(
    request: options.Request,
    policies: Annotated[
        list[str], options.argument("POLICY", "Policy files, or names of bundled policies.")
    ],
    format: options.AnyFindings = "text",
    fail_on_warn: options.FailOnWarn = False,
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
    checked = [_checked(replace(request, policy=policy)) for policy in policies]
    findings = [finding for each in checked for finding in each.findings]
    if format == "text":
        console.write_findings("".join(_text(checked)))
    elif format == "json":
        console.write_json(_document(checked, findings))
    elif format == "github":
        # Only what the chosen form needs is imported: `check` has to start at once.
        from policyc.reports.findings import github_line

        console.write_commands("".join(github_line(finding) + "\n" for finding in findings))
    else:
        from policy_dsl import version
        from policyc.reports.findings import sarif

        console.write_json(sarif(findings, version=version()))
    console.stop_if(console.is_failure(findings, fail_on_warn=fail_on_warn))


def _checked(request: options.Request) -> Checked:
    """All findings about one policy: its text, then each of its targets on the model."""
    try:
        policy = request.read_policy()
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
    # Two targets may have the same defect; nobody wants to read it twice.
    return Checked(request.policy, policy.name, tuple(against), tuple(dict.fromkeys(findings)))


def _against_model(
    request: options.Request, policy: Policy, target: str | None, against: list[tuple[str, str]]
) -> Sequence[Diagnostic]:
    import emitters
    from policy_dsl.planning.assertions import findings_of_tests
    from policy_dsl.planning.bundle_files import source_findings
    from policy_dsl.planning.settings import choose_target

    try:
        inventory = request.open_model(policy)
        chosen = choose_target(policy, emitters.FORMATS, target)
        # Before the plan, which may fail: what was tried is reported either way.
        against.append((inventory.id, chosen))
        plan = workflow.plan_for(
            policy, inventory, chosen, statistics=request.statistics, files=False
        )
        beside = source_findings(plan, inventory, emitters.FORMATS[chosen].spec)
        return [*plan.findings, *beside, *findings_of_tests(plan)]
    except PolicyError as error:
        return error.diagnostics


def _alone(request: options.Request, policy: Policy) -> Sequence[Diagnostic]:
    import emitters
    from policy_dsl.planning.lint import lint

    return lint(policy, emitters.FORMATS, target=request.target)


def _text(checked: Iterable[Checked]) -> Iterable[str]:
    for each in checked:
        if each.findings:
            yield render(each.findings) + "\n\n"
        shown = " and ".join(f"{escaped(model)} as {target}" for model, target in each.against)
        place = f" (against {shown})" if shown else " (alone; --model checks it against one)"
        yield f"{escaped(each.policy)}: {count_text(each.findings)}{place}\n"


def _document(checked: Iterable[Checked], findings: Sequence[Diagnostic]) -> CheckDocument:
    from policyc.reports.findings import finding_json

    n_errors = len(errors(findings))
    return {
        "schema_version": 1,
        "kind": "check",
        "policies": [
            {
                "policy": each.policy,
                "name": each.name,
                "against": [{"model": model, "target": target} for model, target in each.against],
                "findings": [finding_json(finding) for finding in each.findings],
            }
            for each in checked
        ],
        "errors": n_errors,
        "warnings": len(findings) - n_errors,
    }
