"""`policyc plan`: what a build would write, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from policyc.cli import console, options
from policyc.cli.files import save_text
from policyc.cli.planning import Request, make_plan

AllTensors = Annotated[bool, typer.Option("--tensors", help="List every output tensor.")]
SaveTo = Annotated[
    Path | None,
    typer.Option(
        "--save",
        metavar="FILE",
        help="Also save the plan as JSON, whole.",
        parser=options.given_path,
    ),
]


@console.guarded
def plan(
    policy: options.PolicyName,
    model: options.ModelName = None,
    target: options.TargetName = None,
    overrides: options.Overrides = None,
    allow_requantize: options.Requantize = False,
    imatrix: options.ImatrixFile = None,
    saliency: options.SaliencyFile = None,
    no_links: options.NoLinks = False,
    tensors: AllTensors = False,
    save: SaveTo = None,
    format: options.AnyReport = "text",
    fail_on_warn: options.FailOnWarn = False,
    verbose: options.Verbose = False,
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
    from policyc.reports.plan_json import document_text, plan_document
    from policyc.reports.plan_text import plan_markdown, plan_text

    request = Request(
        *(policy, model, target, overrides, verbose),
        *(allow_requantize, imatrix, saliency, not no_links),
    )
    made, _ = make_plan(request)
    tests = run_tests(made)
    # Saved before it is printed: a closed pipe must not cost the file.
    if save is not None:
        save_text(save, document_text(plan_document(made, tests)))
    if format == "json":
        console.write(document_text(plan_document(made, tests, tensors=tensors)))
    elif format == "markdown":
        console.write(plan_markdown(made, tests, tensors=tensors))
    else:
        console.write(plan_text(made, tests, tensors=tensors, width=console.stdout_width()))
    # A failing test still shows the plan, which says why it fails.
    warned = console.is_failure(made.findings, fail_on_warn=fail_on_warn)
    console.stop_if(warned or not all(test.passed for test in tests))
