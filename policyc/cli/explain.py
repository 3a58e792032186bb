"""`policyc explain`: why one tensor is treated as it is."""

from __future__ import annotations

from typing import Annotated

import typer

from policyc.cli import console, options
from policyc.cli.planning import Request, make_plan

TensorName = Annotated[
    str,
    typer.Argument(
        metavar="TENSOR",
        help="Name in the source or in the output; or a glob.",
        parser=options.given_text,
    ),
]


@console.guarded
def explain(
    policy: options.PolicyName,
    tensor: TensorName,
    model: options.ModelName = None,
    target: options.TargetName = None,
    overrides: options.Overrides = None,
    allow_requantize: options.Requantize = False,
    saliency: options.SaliencyFile = None,
    no_links: options.NoLinks = False,
    format: options.AnyReport = "text",
    verbose: options.Verbose = False,
) -> None:
    """Say which rule decided about a tensor, which others matched, and why the bytes.

    \b
    Examples:
      policyc explain config_i lm_head.weight
      policyc explain config_i 'model.layers.3.*.switch_mlp.down_proj'
    """
    from policy_dsl.planning.explain import explain as explained
    from policyc.reports.explain_text import explain_document, explain_markdown, explain_text

    # The whole plan, because alike modules are part of the answer.
    plan, _ = make_plan(
        Request(
            *(policy, model, target, overrides, verbose, allow_requantize),
            saliency=saliency,
            links=not no_links,
        )
    )
    found = explained(plan, tensor)
    if format == "json":
        console.write_json(explain_document(found, plan))
    elif format == "markdown":
        console.write(explain_markdown(found, plan))
    else:
        console.write(explain_text(found, plan, width=console.stdout_width()))
