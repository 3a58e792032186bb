"""Options that several commands have, each in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

# Closed sets, so that a typo is a usage error before any work.
ReportFormat = Literal["text", "json", "markdown"]
FindingsFormat = Literal["text", "json", "github", "sarif"]
PlainFormat = Literal["text", "json"]

PolicyName = Annotated[
    str,
    typer.Argument(metavar="POLICY", help="Policy file, or the name of a bundled policy."),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH|HUB_ID|CATALOG",
        help="Checkpoint to use instead of the policy's own: a folder, a recorded headers "
        "file, org/name on the hub, or a catalog name.",
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target", metavar="TARGET", help="Bundle format, if the policy has several."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="VAR=VALUE", help="Set a variable of the policy. Repeatable."
    ),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        metavar="FILE",
        help="Importance matrix of llama.cpp, instead of the one that the policy names.",
    ),
]
SaliencyFile = Annotated[
    Path | None,
    typer.Option(
        "--saliency",
        metavar="FILE",
        help="Ranking of the experts, instead of the one that the policy names.",
    ),
]
AnyReport = Annotated[ReportFormat, typer.Option("--format", help="Form of the result.")]
AnyFindings = Annotated[FindingsFormat, typer.Option("--format", help="Form of the findings.")]
TextOrJson = Annotated[PlainFormat, typer.Option("--format", help="Form of the result.")]
FailOnWarn = Annotated[bool, typer.Option("--fail-on-warn", help="Treat warnings as errors.")]
Requantize = Annotated[
    bool,
    typer.Option("--allow-requantize", help="Take a source that is already quantized."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say where things come from.")]
