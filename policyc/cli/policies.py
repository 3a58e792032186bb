"""`policyc check`, `plan`, `explain`, `diff` and `fmt`: policies, and what comes of them."""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

import policyc
from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, did_you_mean, fail
from policy_dsl.escaping import escaped
from policyc import workflow
from policyc.cli import console, options
from policyc.cli.options import Request

if TYPE_CHECKING:
    from policy_dsl.inventory import Inventory
    from policy_dsl.policy import Policy
    from policyc.reports.check_report import Checked

STDIN = "-"
_FORMS = ("text", "json", "github", "gitlab", "sarif", "junit")


@options.requesting("policy", "allow_requantize", "imatrix")
@options.words(
    "paths",
    metavar="[PATH]...",
    required=False,
    help="Policy files, folders of them, names of bundled policies; - is stdin.",
)
@options.choice("--format", *_FORMS, help="Form of the findings.")
@options.flag("--alone", help="Look only at the text, not at the policy's own model.")
@options.flag("--online", help="Fetch headers from the hub where the model is not here.")
@options.codes("--allow", help="Accept findings of this code. Repeatable.")
@options.codes("--select", help="Report only findings of this code. Repeatable.")
@options.fail_on_warn
def check(
    request: Request,
    *,
    paths: Sequence[str],
    format: str,
    alone: bool,
    online: bool,
    allow: Sequence[str],
    select: Sequence[str],
    fail_on_warn: bool,
) -> None:
    """Find what is wrong with policies, all at once.

    Each policy is planned for each of its targets, on its own model where that needs no network
    or on --model, and its tests are run. Without a PATH, the policies of the current folder are
    checked. Exit code 1 if there are errors.

    \b
    Examples:
      policyc check
      policyc check policies/ --fail-on-warn
      policyc check mine.qpol --model ./my-checkpoint --target mlx_affine
      policyc check policies/*.yaml --format github
    """
    from policyc.cli.policy_files import policies_in

    found = policies_in(paths or ["."])
    checked = []
    for policy in found.policies:
        one = _checked(replace(request, policy=policy), alone=alone, online=online)
        one.findings = tuple(
            finding
            for finding in one.findings
            if finding.severity == "error" or finding.code not in allow
            if not select or finding.code in select
        )
        checked.append(one)
    findings = [finding for each in checked for finding in each.findings]
    _write(format, checked, found.n_others)
    console.stop_if(console.is_failure(findings, fail_on_warn=fail_on_warn))


def _checked(request: Request, *, alone: bool, online: bool) -> Checked:
    """All findings about one policy: its text, then each of its targets on the model."""
    from policyc.reports.check_report import Checked

    found = Checked(request.policy)
    try:
        policy = request.read_policy()
        found.name = policy.name
        if alone or not (request.model or policy.model):
            found.alone = "as asked for" if alone else "it names no model"
            found.findings = _of_text(request, policy)
        else:
            found.findings = _on_model(request, policy, found, online=online)
    except PolicyError as error:
        # One broken policy must not hide what is wrong with the others.
        found.findings = error.diagnostics
    return found


def _of_text(request: Request, policy: Policy) -> tuple[Diagnostic, ...]:
    import emitters
    from policy_dsl.planning.lint import lint

    return lint(policy, emitters.FORMATS, target=request.target)


def _on_model(
    request: Request, policy: Policy, found: Checked, *, online: bool
) -> tuple[Diagnostic, ...]:
    try:
        inventory = request.open_model(policy, online=online)
    except PolicyError as error:
        if [one.code for one in error.diagnostics] != ["needs-the-hub"]:
            raise
        found.alone = f"{request.model or policy.model} is not here; --online asks the hub"
        return _of_text(request, policy)
    # Each target has schemes of its own, so a policy for several is checked for each.
    targets = (request.target,) if request.target else policy.targets or (None,)
    among: dict[Diagnostic, list[str]] = {}
    for target in targets:
        for finding in _for_target(request, policy, inventory, target, found):
            among.setdefault(finding, []).append(target or "")
    # What several targets have alike is read once.
    return tuple(
        replace(one, notes=(*one.notes, f"for {', '.join(names)}")) if len(targets) > 1 else one
        for one, names in among.items()
    )


def _for_target(
    request: Request, policy: Policy, inventory: Inventory, target: str | None, found: Checked
) -> Sequence[Diagnostic]:
    import emitters
    from policy_dsl.planning.assertions import findings_of_tests
    from policy_dsl.planning.bundle_files import source_findings
    from policy_dsl.planning.lint import choose_target

    try:
        chosen = choose_target(policy, emitters.FORMATS, target)
        # Before the plan, which may fail: what was tried is reported either way.
        found.against.append({"model": inventory.id, "target": chosen})
        plan = workflow.plan_for(policy, inventory, chosen, request.statistics, files=False)
        beside = source_findings(plan, inventory, emitters.FORMATS[chosen].spec)
        return [*plan.findings, *beside, *findings_of_tests(plan)]
    except PolicyError as error:
        return error.diagnostics


def _write(form: str, checked: Sequence[Checked], n_others: int) -> None:
    # Only what the chosen form needs is imported: `check` has to start at once.
    from policyc.reports.check_report import check_document, check_text, summary

    findings = [finding for each in checked for finding in each.findings]
    if form == "text":
        console.write(check_text(checked, n_others))
    elif form == "json":
        console.write_json(check_document(checked, n_others))
    elif form == "github":
        from policyc.reports.findings import github_line

        lines = "".join(f"{github_line(finding)}\n" for finding in findings)
        console.write(f"{lines}{summary(checked, n_others)}\n", commands=True)
    elif form == "gitlab":
        from policyc.reports.findings import gitlab

        entries = ((each.policy, each.findings) for each in checked)
        console.write_json(gitlab(entries))
    elif form == "junit":
        from policyc.reports.findings import junit

        console.write(junit((each.policy, each.findings) for each in checked))
    else:
        from policy_dsl import version
        from policyc.reports.findings import sarif

        console.write_json(sarif(findings, version=version()))


@options.requesting()
@options.flag("--tensors", help="List every output tensor.")
@options.path_option("--save", help="Also save the plan as JSON, whole.")
@options.any_report
@options.fail_on_warn
def plan(
    request: Request, *, tensors: bool, save: Path | None, format: str, fail_on_warn: bool
) -> None:
    """Show what a build would write, to the byte, without reading a weight.

    Exit code 1 if a test of the policy fails.

    \b
    Examples:
      policyc plan policies/config_i.yaml
      policyc plan mlx_mixed_2_6 --model ./my-checkpoint --set low=3
      policyc plan config_i --format json --tensors > plan.json
    """
    from policy_dsl.planning.assertions import run_tests
    from policyc.reports.plan_json import document_text, plan_document, saved_document
    from policyc.reports.plan_report import plan_blocks

    made = request.plan()
    tests = run_tests(made)
    # Saved before it is printed: a closed pipe must not cost the file.
    if save is not None:
        console.save_text(save, document_text(saved_document(made, tests)))
    if format == "json":
        console.write(document_text(plan_document(made, tests, tensors=tensors)))
    else:
        console.write_blocks(plan_blocks(made, tests, tensors=tensors), format)
    # A failing test still shows the plan, which says why it fails.
    warned = console.is_failure(made.findings, fail_on_warn=fail_on_warn)
    console.stop_if(warned or not all(test.passed for test in tests))


@options.requesting("imatrix")
@options.argument("tensor", help="Name in the source or in the output; or a glob.")
@options.any_report
def explain(request: Request, *, tensor: str, format: str) -> None:
    """Say which rule decided about a tensor, which others matched, and why the bytes.

    \b
    Examples:
      policyc explain config_i lm_head.weight
      policyc explain config_i 'model.layers.3.*.switch_mlp.down_proj'
    """
    from policy_dsl.planning.decisions import explain as explained
    from policyc.reports.plan_report import explain_blocks, explain_document

    # The whole plan, because alike modules are part of the answer.
    made = request.plan()
    explanation = explained(made, tensor)
    console.write_report(format, explain_document, explain_blocks, explanation, made)


_SIDE = "A policy, a plan saved by `plan --save`, or a bundle folder."


@options.requesting("policy", "allow_requantize", "imatrix")
@options.argument("a", help=_SIDE)
@options.argument("b", help=_SIDE)
@options.any_report
@options.flag("--exit-code", help="Exit with 1 if there is a difference.")
def diff(request: Request, *, a: str, b: str, format: str, exit_code: bool) -> None:
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

    # A folder and a .json file cannot be policies, so there is nothing to guess.
    sides = [side for side in (a, b) if not Path(side).is_dir() and Path(side).suffix != ".json"]
    policies = _policies(sides, options.parse_overrides(request.overrides))
    models = {side: request.model or policy.model for side, policy in policies.items()}
    # `diff mlx_4bit config_i` should just work: only one of them names a model.
    shared = next(filter(None, models.values()), None)
    before, after = (
        workflow.outline_of(replace(request, model=models[side] or shared).plan(policies[side]))
        if side in policies
        else workflow.outline_of(side, links=not request.no_links)
        for side in (a, b)
    )
    changes = policyc.diff(before, after)
    console.write_report(format, diff_document, diff_blocks, changes)
    console.stop_if(exit_code and not changes.is_empty)


def _policies(sides: Sequence[str], given: Mapping[str, str]) -> dict[str, Policy]:
    """The policy of each side, with those of the variables given that it has.

    Raises: PolicyError of what is wrong with one, or for a variable that none has.
    """
    policies = {side: policyc.load(side) for side in sides}
    known = ChainMap(*(dict(policy.vars) for policy in policies.values()))
    if unknown := [name for name in given if name not in known]:
        raise PolicyError(
            diagnostic("unknown-variable", suggestion=did_you_mean(name, known), name=name)
            for name in unknown
        )
    for side, policy in policies.items():
        if values := {name: given[name] for name in given if name in dict(policy.vars)}:
            policies[side] = policyc.load(side, values)
    return policies


@options.words("files", metavar="FILE...", help="Policy files; - is stdin.")
@options.flag("--check", help="Write nothing; exit with 1 if a file would change.")
@click.option(
    "--to",
    type=click.Choice(["yaml", "dsl"]),
    help="Print one policy in this form; the file stays as it is.",
)
def fmt(*, files: Sequence[str], check: bool, to: str | None) -> None:
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
    defects: list[Diagnostic] = []
    changed = []
    for file in files:
        try:
            if _format_one(file, to, check=check):
                changed.append(file)
        # The other files are still formatted; all defects are shown in the end.
        except PolicyError as error:
            defects += error.diagnostics
    if defects:
        raise PolicyError(defects)
    # Every file is named before the exit code says that there was one.
    if check:
        console.write("".join(f"{escaped(file)} is not in the usual form\n" for file in changed))
        console.stop_if(bool(changed))


def _format_one(file: str, to: str | None, *, check: bool) -> bool:
    """Format one file; whether its text changes. Raises: PolicyError for defects of the text."""
    from policy_dsl.language.load import parse_policy, read_source, source_of
    from policy_dsl.language.parsing import MAX_BYTES
    from policy_dsl.language.print_policy import print_dsl, print_yaml
    from policy_dsl.regular_files import is_passed

    if file == STDIN:
        # The text layer would decode by locale; policies are UTF-8 everywhere.
        source = source_of(Path("stdin"), sys.stdin.buffer.read(MAX_BYTES + 1))
    else:
        source = read_source(Path(file))
    policy, form = parse_policy(source.text, file)
    shown = print_dsl(policy) if (to or form) == "dsl" else print_yaml(policy)
    changes = shown != source.text
    if check:
        return changes
    # A converted text needs another file name, so it is printed, never put in place.
    if to is not None or file == STDIN or is_passed(Path(file)):
        # As it is: escapes would make it another policy.
        sys.stdout.write(shown)
    elif changes:
        console.save_text(Path(file), shown)
    return changes
