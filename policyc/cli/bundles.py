"""`policyc build`, `verify` and `inspect`: what is written, and what is on disk."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, TextIO

import click

import policyc
from policy_dsl.diagnostics import PolicyError, errors, fail
from policyc.cli import console, options

if TYPE_CHECKING:
    from rich.progress import Progress as Display

    from emitters.core.build import Progress
    from policy_dsl.documents.reports import ProgressDocument


@options.requesting()
@options.path_option(
    *("--output", "-o"), metavar="FOLDER", help="The bundle; MODEL-POLICY here if not given."
)
@options.jobs
@click.option("--max-memory", metavar="SIZE", help="Bound of the memory, such as 800MiB.")
@options.flag("--force", help="Replace a bundle that is there.")
@options.choice(
    *("--progress", "auto", "plain", "json", "none"), help="How stderr shows the progress."
)
@options.choice("--format", "text", "json")
@options.fail_on_warn
@options.quiet
def build(
    request: options.Request,
    *,
    output: Path | None,
    jobs: int | None,
    max_memory: str | None,
    force: bool,
    progress: str,
    format: str,
    fail_on_warn: bool,
    quiet: bool,
) -> None:
    """Write the bundle that `plan` shows. An interrupted build is resumed.

    \b
    Examples:
      policyc build config_i --model ./MiniMax-M2.7 -o ./M2.7-config-i
      policyc build mine.yaml --model ./checkpoint -j 4 --max-memory 800MiB
    """
    from emitters.core.preconditions import ensure_supported_system
    from policy_dsl.planning.assertions import failures, run_tests
    from policy_dsl.quantities import parse_size
    from policyc.reports.bundle_report import build_blocks, build_document

    # What is wrong whatever the source comes before a long look at it.
    ensure_supported_system()
    memory = None if max_memory is None else parse_size(max_memory)
    if max_memory is not None and memory is None:
        reason = f'"{max_memory}" is not a size such as 8GiB or 800MiB'
        raise fail("bad-argument", option="--max-memory", reason=reason)
    plan = request.plan()
    as_json = "json" in (format, progress)
    if not quiet:
        console.show_findings(plan.findings, as_json=as_json)
    # A policy whose own tests fail must not become a bundle that looks fine.
    failed = failures(run_tests(plan))
    console.show_findings(failed, as_json=as_json)
    console.stop_if(bool(failed) or console.is_failure(plan.findings, fail_on_warn=fail_on_warn))
    folder = output or _default_folder(plan.model.id, plan.policy.name)
    # The bar is closed before the result is printed, also when the build fails.
    with reporter("none" if quiet else progress) as shown:
        report = policyc.build(
            plan, out=folder, jobs=jobs, force=force, max_memory=memory, progress=shown
        )
    if not quiet:
        console.show_findings(report.findings, as_json=as_json)
    # Ready to be pasted: paths with spaces are quoted.
    check = f"policyc verify {shlex.quote(str(folder))}"
    console.write_report(format, build_document, build_blocks, plan, folder, report, check)


def _default_folder(model: str, policy: str) -> Path:
    from policy_dsl.escaping import name_defect

    # Both names, because one model has many bundles and one policy many models.
    folder = f"{model.rpartition('/')[2]}-{policy}"
    # A publisher may have given the model any name.
    if (defect := name_defect(folder)) is not None:
        reason = f'the bundle would be called "{folder}", and {defect}: say where it goes'
        raise fail("bad-argument", option="--output", reason=reason)
    return Path(folder)


@contextmanager
def reporter(form: str) -> Iterator[Progress | None]:
    """What a build reports to; `auto` is a bar on a terminal and lines elsewhere."""
    # A bar in a log file is a hundred lines of control characters.
    if form == "auto" and sys.stderr.isatty():
        # rich is loaded only where a person watches.
        from rich import progress as bars
        from rich.console import Console

        sizes = bars.BarColumn(), bars.DownloadColumn()
        times = bars.TransferSpeedColumn(), bars.TimeRemainingColumn()
        columns = bars.TextColumn("{task.description}"), *sizes, *times
        with bars.Progress(*columns, console=Console(file=sys.stderr)) as display:
            yield _Bar(display)
    else:
        yield None if form == "none" else Lines(sys.stderr, as_json=form == "json")


class Lines:
    """A line of text, or a JSON object, every few seconds and at the end of a stage."""

    def __init__(self, stream: TextIO, *, as_json: bool = False, every: float = 5.0) -> None:
        self._stream, self._as_json, self._every = stream, as_json, every

    def begin(self, stage: str, total: int, done: int) -> None:
        """Start a stage with a line."""
        self._stage, self._total, self._done, self._first = stage, total, done, done
        self._started = monotonic()
        self.end()

    def advance(self, nbytes: int) -> None:
        """Count; a line when it is time for one."""
        self._done += nbytes
        if monotonic() - self._written_at >= self._every:
            self.end()

    def end(self) -> None:
        """Write a line."""
        self._written_at = monotonic()
        # What an earlier run did says nothing about this one's pace.
        new = self._done - self._first
        rate = new / max(1e-9, self._written_at - self._started)
        left = (self._total - self._done) / rate if new > 0 else None
        # A full disk under a log must not end hours of work.
        with suppress(OSError):
            form = self._document if self._as_json else self._text
            self._stream.write(form(rate, left) + "\n")
            self._stream.flush()

    def _text(self, rate: float, left: float | None) -> str:
        share = 100 * self._done // max(1, self._total)
        done, total = self._done / 1e9, self._total / 1e9
        text = f"{self._stage} {share:3d} %  {done:.2f} of {total:.2f} GB"
        return f"{text}  {rate / 1e6:.0f} MB/s  {clock(left)} left" if left else text

    def _document(self, rate: float, left: float | None) -> str:
        document: ProgressDocument = {
            "schema_version": 1,
            "kind": "progress",
            "stage": self._stage,
            "done": self._done,
            "total": self._total,
            "bytes_per_second": round(rate),
            "seconds_left": None if left is None else round(left),
        }
        return json.dumps(document)


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Bar:
    """A bar for each stage; what an earlier run did counts from the beginning."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def begin(self, stage: str, total: int, done: int) -> None:
        self._task = self._display.add_task(stage, total=total, completed=done)

    def advance(self, nbytes: int) -> None:
        self._display.advance(self._task, nbytes)

    def end(self) -> None:
        self._display.stop_task(self._task)


@options.argument(
    "bundle",
    type=options.given_path,
    help="Folder of a bundle, or an HFQ file; policyc need not have built it.",
)
@options.text_option(
    "--source",
    metavar="CHECKPOINT",
    help="Compare every tensor with this checkpoint: its values, and its error.",
)
@options.no_links
@options.jobs
@options.any_report
@options.quiet
def verify(
    *, bundle: Path, source: str | None, no_links: bool, jobs: int | None, format: str, quiet: bool
) -> None:
    """Check a bundle's files, index, hashes and bit widths; with --source, its values.

    Exit code 1 if something is wrong.

    \b
    Examples:
      policyc verify ./bundle
      policyc verify ./bundle --source ./checkpoint --format json
    """
    from policyc.reports.bundle_report import verify_blocks, verify_document

    report = policyc.verify(bundle, source=source, jobs=jobs, links=not no_links)
    console.write_report(format, verify_document, verify_blocks, report)
    console.stop_if(not report.ok)


@options.argument(
    "checkpoint",
    help="Folder of a checkpoint or bundle, HFQ file, recorded headers file, hub id, catalog name.",
)
@options.path_option(
    "--save-headers", help="Record the headers, so that this model can be planned where it is not."
)
@options.no_links
@options.any_report
def inspect(*, checkpoint: str, save_headers: Path | None, no_links: bool, format: str) -> None:
    """Show a checkpoint's family, layers, experts, dtypes and roles, from headers alone.

    Of a bundle, show what each role got; of an HFQ file, whoever made it, its quant codes.

    \b
    Examples:
      policyc inspect ./my-checkpoint
      policyc inspect MiniMaxAI/MiniMax-M2.7 --save-headers m2.7.json
    """
    from policyc.reports import inspect_report as shown

    inventory = policyc.open_source(checkpoint, links=not no_links)
    # Recorded before anything is shown: headers of an unknown family are worth keeping.
    if save_headers is not None:
        from policy_dsl.sources.recorded import write_recorded

        console.save_text(save_headers, write_recorded(inventory))
    folder, bundle = Path(checkpoint), None
    try:
        if folder.is_dir():
            from emitters.core.bundle_reading import bundle_outline

            bundle = bundle_outline(folder, links=not no_links, with_unread=True)
    except PolicyError as error:
        # A source is not a bundle; a bundle that is broken must not pass for a source.
        if any(finding.code != "not-a-bundle" for finding in error.diagnostics):
            raise
    # What is known is shown even if some is not, or names have no roles.
    if bundle is not None:
        console.write_report(format, shown.outline_document, shown.outline_blocks, bundle)
        console.show_findings(bundle.unread)
        console.stop_if(bool(bundle.unread), console.INVALID)
    else:
        source = shown.survey(inventory)
        console.write_report(format, shown.survey_document, shown.survey_blocks, source)
        console.stop_if(bool(errors(source.findings)), console.INVALID)
