"""`policyc build`: plan a policy and write the bundle."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from policy_dsl.diagnostics import fail
from policy_dsl.escaping import name_defect
from policyc.cli import console, options
from policyc.cli.planning import Request, make_plan

if TYPE_CHECKING:
    from emitters.core.build import BuildReport
    from policy_dsl.plan import Plan

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="The bundle; MODEL-POLICY here if not given.",
        parser=options.given_path,
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, max=256, help="Threads; as many as cores if not given."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Bound of the memory, such as 800MiB."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")]
ProgressForm = Annotated[
    Literal["auto", "plain", "json", "none"],
    typer.Option("--progress", help="How stderr tells how far the build is."),
]


@console.guarded
def build(
    policy: options.PolicyName,
    model: options.ModelName = None,
    output: Output = None,
    target: options.TargetName = None,
    overrides: options.Overrides = None,
    allow_requantize: options.Requantize = False,
    imatrix: options.ImatrixFile = None,
    saliency: options.SaliencyFile = None,
    no_links: options.NoLinks = False,
    jobs: Jobs = None,
    max_memory: MaxMemory = None,
    force: Force = False,
    progress: ProgressForm = "auto",
    format: options.TextOrJson = "text",
    fail_on_warn: options.FailOnWarn = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write the bundle that `plan` shows. An interrupted build goes on where it stopped.

    \b
    Examples:
      policyc build config_i --model ./MiniMax-M2.7 -o ./M2.7-config-i
      policyc build mine.yaml --model ./checkpoint -j 4 --max-memory 800MiB
    """
    from emitters.core.build import build as built
    from emitters.core.readiness import ensure_supported_system
    from policyc.cli.progress import reporter

    request = Request(
        *(policy, model, target, overrides, verbose),
        *(allow_requantize, imatrix, saliency, not no_links),
    )
    # What is wrong whatever the source comes before a long look at it.
    ensure_supported_system()
    memory = _size(max_memory)
    plan, inventory = make_plan(request)
    as_json = "json" in (format, progress)
    _stop_on_findings(plan, fail_on_warn=fail_on_warn, quiet=quiet, as_json=as_json)
    folder = output or _default_folder(inventory.id, plan.policy.name)
    # The bar is closed before the result is printed, also when the build fails.
    with reporter("none" if quiet else progress) as report:
        made = built(
            plan, inventory, out=folder, jobs=jobs, force=force, max_memory=memory, progress=report
        )
    if not quiet:
        console.show_findings(made.findings, as_json=as_json)
    _show_result(plan, folder, made, as_json=format == "json")


def _default_folder(model: str, policy: str) -> Path:
    """Where a bundle goes that nobody gave a place.

    Raises: PolicyError if the model's name, which its publisher chose, makes no folder's name.
    """
    # Both names, because one model has many bundles and one policy many models.
    folder = f"{model.rpartition('/')[2]}-{policy}"
    reason = name_defect(folder)
    if reason is not None:
        reason = f'the bundle would be called "{folder}", and {reason}: say where it goes'
        raise fail("bad-argument", option="--output", reason=reason)
    return Path(folder)


def _size(text: str | None) -> int | None:
    from policy_dsl.quantities import parse_size

    if text is None:
        return None
    found = parse_size(text)
    if found is None:
        reason = f'"{text}" is not a size such as 8GiB or 800MiB'
        raise fail("bad-argument", option="--max-memory", reason=reason)
    return found


def _stop_on_findings(plan: Plan, *, fail_on_warn: bool, quiet: bool, as_json: bool) -> None:
    """Show warnings and failing tests before the work.

    Raises: PolicyError if tests of the policy fail; typer.Exit for warnings that count.
    """
    from policy_dsl.planning.assertions import failures, run_tests

    if not quiet:
        console.show_findings(plan.findings, as_json=as_json)
    # A policy whose own tests fail must not become a bundle that looks fine.
    failed = failures(run_tests(plan))
    if failed:
        console.show_findings(failed, as_json=as_json)
        raise typer.Exit(console.FAILED)
    console.stop_if(console.is_failure(plan.findings, fail_on_warn=fail_on_warn))


def _show_result(plan: Plan, folder: Path, report: BuildReport, *, as_json: bool) -> None:
    from policy_dsl.planning.outline import outline
    from policy_dsl.quantities import both_units, counted
    from policyc.reports.report import Facts, render_text

    made = outline(plan)
    sizes = dict(sorted(report.sizes.items()))
    # Ready to be pasted: paths with spaces are quoted.
    verify = f"policyc verify {shlex.quote(str(folder))}"
    tensors = sum(module.tensors for module in made.modules)
    if as_json:
        console.write_json(
            {
                "schema_version": 1,
                "kind": "build",
                "output": str(folder),
                "policy": plan.policy.name,
                "target": plan.target,
                "model": plan.model.id,
                "tensors": tensors,
                "tensor_nbytes": made.nbytes,
                "file_nbytes": sum(sizes.values()),
                "bpw": made.bpw,
                "files": sizes,
                "seconds": report.seconds,
                "resumed_nbytes": report.resumed_nbytes,
                "record_digest": report.digest,
                "verify": verify,
            }
        )
        return
    facts = (
        ("bundle", str(folder)),
        ("holds", f"{plan.model.id} by {plan.policy.name}, for {plan.target}"),
        ("tensors", f"{counted(tensors, 'tensor')}, {both_units(made.nbytes)}"),
        ("files", f"{counted(len(sizes), 'file')}, {both_units(sum(sizes.values()))}"),
        ("bits", f"{made.bpw or 0:.4f} bpw"),
        ("time", _duration(report)),
        ("check", verify),
    )
    console.write(render_text([Facts(facts)]))


def _duration(report: BuildReport) -> str:
    from policy_dsl.quantities import both_units

    if not report.resumed_nbytes:
        return f"{report.seconds:.1f} s"
    return f"{report.seconds:.1f} s after {both_units(report.resumed_nbytes)} of an earlier run"
