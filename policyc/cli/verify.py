"""`policyc verify`: whether a bundle is whole, consistent, and near its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from policyc.cli import console, options

BundleFolder = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE",
        parser=options.given_path,
        help="Folder of a bundle, or an HFQ file; policyc need not have built it.",
    ),
]
SourceName = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="CHECKPOINT",
        parser=options.given_text,
        help="Compare every tensor with this checkpoint: its values, and its error.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option("--jobs", "-j", min=1, max=256, help="Threads; as many as cores if not given."),
]


@console.guarded
def verify(
    bundle: BundleFolder,
    source: SourceName = None,
    no_links: options.NoLinks = False,
    jobs: Jobs = None,
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
    from emitters.core.build import available_cores
    from emitters.core.verify import verify_bundle
    from policy_dsl.sources.reference import open_source
    from policyc.reports.verify_report import verify_document, verify_markdown, verify_text

    # Opened first: a wrong --source should not cost the hashing of a large bundle.
    inventory = open_source(source, links=not no_links) if source is not None else None
    cores = jobs or available_cores()
    report = verify_bundle(bundle, inventory, jobs=cores, links=not no_links)
    console.write_report(report, format, (verify_document, verify_markdown, verify_text))
    console.stop_if(not report.ok)
