"""`policyc inspect` and `policyc verify`: what is on disk, and whether it is as it should be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from policy_dsl.diagnostics import PolicyError
from policyc import workflow
from policyc.cli import console, options

if TYPE_CHECKING:
    from policy_dsl.planning.outline import Outline


@console.guarded
def inspect(
    checkpoint: Annotated[
        str,
        options.argument(
            "CHECKPOINT",
            "Folder of a checkpoint or bundle, HFQ file, recorded headers file, hub id, "
            "catalog name.",
        ),
    ],
    save_headers: Annotated[
        Path | None,
        options.path_option(
            "--save-headers",
            about="Record the headers, so that this model can be planned where it is not.",
        ),
    ] = None,
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
    from policyc.reports.survey import survey, survey_blocks, survey_document

    inventory = workflow.open_source(checkpoint, links=not no_links)
    # Recorded before anything is shown: headers of an unknown family are worth keeping.
    if save_headers is not None:
        from policy_dsl.sources.recorded import write_recorded

        console.save_text(save_headers, write_recorded(inventory))
    bundle = _bundle(Path(checkpoint), links=not no_links)
    if bundle is not None:
        from policyc.reports.outline_report import outline_blocks, outline_document

        console.write_report(format, outline_document, outline_blocks, bundle)
        console.show_findings(bundle.unread)
        # What is known is shown even if some is not.
        console.stop_if(bool(bundle.unread), console.INVALID)
        return
    source = survey(inventory)
    console.write_report(format, survey_document, survey_blocks, source)
    # What could be read is shown even if names have no roles.
    console.stop_if(source.is_broken, console.INVALID)


def _bundle(folder: Path, *, links: bool) -> Outline | None:
    """The outline of a bundle, of policyc or another tool; None if this is not one."""
    from emitters.core.bundle_reading import readable_outline

    if not folder.is_dir():
        return None
    try:
        return readable_outline(folder, links=links)
    except PolicyError as error:
        # A source is not a bundle; a bundle that is broken must not pass for a source.
        if any(finding.code != "not-a-bundle" for finding in error.diagnostics):
            raise
        return None


@console.guarded
def verify(
    bundle: Annotated[
        Path,
        options.argument(
            "BUNDLE",
            "Folder of a bundle, or an HFQ file; policyc need not have built it.",
            options.given_path,
        ),
    ],
    source: Annotated[
        str | None,
        options.text_option(
            "--source",
            "CHECKPOINT",
            "Compare every tensor with this checkpoint: its values, and its error.",
        ),
    ] = None,
    no_links: options.NoLinks = False,
    jobs: options.Jobs = None,
    format: options.AnyReport = "text",
    quiet: options.Quiet = False,
) -> None:
    """Check a bundle's files, index, hashes and bit widths; with --source, its values.

    Exit code 1 if something is wrong.

    \b
    Examples:
      policyc verify ./bundle
      policyc verify ./bundle --source ./checkpoint --format json
    """
    from policyc.reports.verify_report import verify_blocks, verify_document

    report = workflow.verify(bundle, source=source, jobs=jobs, links=not no_links)
    console.write_report(format, verify_document, verify_blocks, report)
    console.stop_if(not report.ok)
