"""`policyc plan` and `policyc explain`: what a build would write, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from policyc.cli import console, options


@options.requesting()
def plan(
    request: options.Request,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every output tensor.")] = False,
    save: Annotated[
        Path | None, options.path_option("--save", about="Also save the plan as JSON, whole.")
    ] = None,
    format: options.AnyReport = "text",
    fail_on_warn: options.FailOnWarn = False,
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
    from policyc.reports.plan_text import plan_blocks

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
def explain(
    request: options.Request,
    tensor: Annotated[
        str, options.argument("TENSOR", "Name in the source or in the output; or a glob.")
    ],
    format: options.AnyReport = "text",
) -> None:
    """Say which rule decided about a tensor, which others matched, and why the bytes.

    \b
    Examples:
      policyc explain config_i lm_head.weight
      policyc explain config_i 'model.layers.3.*.switch_mlp.down_proj'
    """
    from policy_dsl.planning.explain import explain as explained
    from policyc.reports.explain_report import explain_blocks, explain_document

    # The whole plan, because alike modules are part of the answer.
    made = request.plan()
    explanation = explained(made, tensor)
    console.write_report(format, explain_document, explain_blocks, explanation, made)
