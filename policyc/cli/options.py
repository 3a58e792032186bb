"""Options that several commands have, each in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def given_text(word: str) -> str:
    """The word of an option or argument.

    Raises: typer.BadParameter for an empty one.
    """
    # What an unset variable of the shell leaves; as a path it would mean the current folder.
    if not word:
        raise typer.BadParameter("it is empty; is a variable of the shell not set?")
    return word


def given_path(word: str) -> Path:
    """The path that an option or argument names.

    Raises: typer.BadParameter for an empty one.
    """
    return Path(given_text(word))


# Closed sets, so that a typo is a usage error before any work.
ReportFormat = Literal["text", "json", "markdown"]
FindingsFormat = Literal["text", "json", "github", "sarif"]
PlainFormat = Literal["text", "json"]

PolicyName = Annotated[
    str,
    typer.Argument(
        metavar="POLICY", help="Policy file, or the name of a bundled policy.", parser=given_text
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH|HUB_ID|CATALOG",
        parser=given_text,
        help="Checkpoint to use instead of the policy's own: a folder, a recorded headers "
        "file, org/name on the hub, or a catalog name.",
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="Bundle format, if the policy has several.",
        parser=given_text,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="VAR=VALUE", help="Set a variable of the policy. Repeatable."),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        metavar="FILE",
        parser=given_path,
        help="Importance matrix of llama.cpp, instead of the one that the policy names.",
    ),
]
SaliencyFile = Annotated[
    Path | None,
    typer.Option(
        "--saliency",
        metavar="FILE",
        parser=given_path,
        help="Ranking of the experts, instead of the one that the policy names.",
    ),
]
AnyReport = Annotated[ReportFormat, typer.Option("--format", help="Form of the result.")]
AnyFindings = Annotated[FindingsFormat, typer.Option("--format", help="Form of the findings.")]
TextOrJson = Annotated[PlainFormat, typer.Option("--format", help="Form of the result.")]
FailOnWarn = Annotated[bool, typer.Option("--fail-on-warn", help="Treat warnings as errors.")]
Requantize = Annotated[
    bool, typer.Option("--allow-requantize", help="Take a source that is already quantized.")
]
NoLinks = Annotated[
    bool,
    typer.Option("--no-links", help="Refuse weights that are links out of the model's folder."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say where things come from.")]
