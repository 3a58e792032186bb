"""`policyc inspect`: what a source or a bundle holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policy_dsl.diagnostics import PolicyError
from policyc.cli import console, options
from policyc.cli.files import save_text

if TYPE_CHECKING:
    from policy_dsl.inventory import Inventory
    from policy_dsl.planning.outline import Outline

SourceName = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        parser=options.given_text,
        help="Folder of a checkpoint or bundle, HFQ file, recorded headers file, hub id, "
        "catalog name.",
    ),
]
HeadersFile = Annotated[
    Path | None,
    typer.Option(
        "--save-headers",
        metavar="FILE",
        parser=options.given_path,
        help="Record the headers, so that this model can be planned where it is not.",
    ),
]


@console.guarded
def inspect(
    checkpoint: SourceName,
    save_headers: HeadersFile = None,
    no_links: options.NoLinks = False,
    format: options.AnyReport = "text",
) -> None:
    """Show a checkpoint's family, layers, experts, dtypes and roles, from headers alone.

    Of a bundle, show what each role got; of an HFQ file, whoever made it, its quant codes.

    \b
    Examples:
      policyc inspect ./my-checkpoint
      policyc inspect MiniMaxAI/MiniMax-M2.7 --save-headers m2.7.json
    """
    from policy_dsl.sources.reference import open_source

    inventory = open_source(checkpoint, links=not no_links)
    # Recorded before anything is shown: headers of an unknown family are worth keeping.
    if save_headers is not None:
        from policy_dsl.sources.recorded import write_recorded

        save_text(save_headers, write_recorded(inventory))
    made = _bundle(Path(checkpoint), links=not no_links)
    if made is not None:
        _show_bundle(made, format)
    else:
        _show_source(inventory, format)


def _bundle(folder: Path, *, links: bool) -> Outline | None:
    """The outline of a bundle, of policyc or another tool; None if this is none."""
    from emitters.core.bundle_outline import readable_outline

    if not folder.is_dir():
        return None
    try:
        return readable_outline(folder, links=links)
    except PolicyError as error:
        # A source is not a bundle; a bundle that is broken must not pass for a source.
        if any(found.code != "not-a-bundle" for found in error.diagnostics):
            raise
        return None


def _show_source(inventory: Inventory, format: options.ReportFormat) -> None:
    from policyc.reports.survey import (
        is_broken,
        survey,
        survey_document,
        survey_markdown,
        survey_text,
    )

    found = survey(inventory)
    console.write_report(found, format, (survey_document, survey_markdown, survey_text))
    # What could be read is shown even if names have no roles.
    console.stop_if(is_broken(found), console.INVALID)


def _show_bundle(made: Outline, format: options.ReportFormat) -> None:
    from policyc.reports.outline_text import outline_document, outline_markdown, outline_text

    console.write_report(made, format, (outline_document, outline_markdown, outline_text))
    console.show_findings(made.unread)
    # What is known is shown even if some is not.
    console.stop_if(bool(made.unread), console.INVALID)
