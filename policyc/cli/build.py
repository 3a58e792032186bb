"""`policyc build`: plan a policy and write the bundle, with its progress on stderr."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from policy_dsl.diagnostics import fail
from policyc import workflow
from policyc.cli import console, options

if TYPE_CHECKING:
    from rich.progress import Progress as Display

    from emitters.core.progress import Progress
    from policy_dsl.plan import Plan

ProgressForm = Literal["auto", "plain", "json", "none"]


@options.requesting()
def build(
    request: options.Request,
    output: Annotated[
        Path | None,
        options.path_option(
            "--output", "-o", about="The bundle; MODEL-POLICY here if not given.", metavar="FOLDER"
        ),
    ] = None,
    jobs: options.Jobs = None,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", metavar="SIZE", help="Bound of the memory, such as 800MiB."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
    progress: Annotated[
        ProgressForm, typer.Option("--progress", help="How stderr shows the progress.")
    ] = "auto",
    format: options.TextOrJson = "text",
    fail_on_warn: options.FailOnWarn = False,
    quiet: options.Quiet = False,
) -> None:
    """Write the bundle that `plan` shows. An interrupted build is resumed.

    \b
    Examples:
      policyc build config_i --model ./MiniMax-M2.7 -o ./M2.7-config-i
      policyc build mine.yaml --model ./checkpoint -j 4 --max-memory 800MiB
    """
    from emitters.core.preconditions import ensure_supported_system
    from policyc.reports.build_report import build_blocks, build_document

    # What is wrong whatever the source comes before a long look at it.
    ensure_supported_system()
    memory = _size(max_memory)
    plan = request.plan()
    as_json = "json" in (format, progress)
    _stop_on_findings(plan, fail_on_warn=fail_on_warn, quiet=quiet, as_json=as_json)
    folder = output or _default_folder(plan.model.id, plan.policy.name)
    # The bar is closed before the result is printed, also when the build fails.
    with reporter("none" if quiet else progress) as shown:
        report = workflow.build(
            plan, out=folder, jobs=jobs, force=force, max_memory=memory, progress=shown
        )
    if not quiet:
        console.show_findings(report.findings, as_json=as_json)
    # Ready to be pasted: paths with spaces are quoted.
    check = f"policyc verify {shlex.quote(str(folder))}"
    console.write_report(format, build_document, build_blocks, plan, folder, report, check)


def _default_folder(model: str, policy: str) -> Path:
    """Where a bundle goes that nobody gave a place.

    Raises: PolicyError if the model's name, which its publisher chose, is not a folder's name.
    """
    from policy_dsl.escaping import name_defect

    # Both names, because one model has many bundles and one policy many models.
    folder = f"{model.rpartition('/')[2]}-{policy}"
    reason = name_defect(folder)
    if reason is not None:
        reason = f'the bundle would be called "{folder}", and {reason}: say where it goes'
        raise fail("bad-argument", option="--output", reason=reason)
    return Path(folder)


def _size(text: str | None) -> int | None:
    from policy_dsl.quantities import parse_size

    nbytes = None if text is None else parse_size(text)
    if text is not None and nbytes is None:
        reason = f'"{text}" is not a size such as 8GiB or 800MiB'
        raise fail("bad-argument", option="--max-memory", reason=reason)
    return nbytes


def _stop_on_findings(plan: Plan, *, fail_on_warn: bool, quiet: bool, as_json: bool) -> None:
    """Show warnings and failing tests before the work.

    Raises: typer.Exit if tests of the policy fail, and for warnings that count.
    """
    from policy_dsl.planning.assertions import failures, run_tests

    if not quiet:
        console.show_findings(plan.findings, as_json=as_json)
    # A policy whose own tests fail must not become a bundle that looks fine.
    failed = failures(run_tests(plan))
    console.show_findings(failed, as_json=as_json)
    console.stop_if(bool(failed) or console.is_failure(plan.findings, fail_on_warn=fail_on_warn))


@contextmanager
def reporter(form: ProgressForm) -> Iterator[Progress]:
    """What a build reports to; `auto` is a bar on a terminal and lines elsewhere."""
    from emitters.core.progress import Lines, Silent

    # A bar in a log file is a hundred lines of control characters.
    if form == "auto" and sys.stderr.isatty():
        with _display() as display:
            yield _Bar(display)
    else:
        yield Silent() if form == "none" else Lines(sys.stderr, as_json=form == "json")


class _Bar:
    """A bar for each stage; what an earlier run did counts from the beginning."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def begin(self, stage: str, total: int, done: int) -> None:
        """Open a bar."""
        self._task = self._display.add_task(stage, total=total, completed=done)

    def advance(self, nbytes: int) -> None:
        """Move it."""
        self._display.advance(self._task, nbytes)

    def end(self) -> None:
        """Leave it where it is."""
        self._display.stop_task(self._task)


def _display() -> Display:
    # rich is loaded only where a person watches.
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=Console(file=sys.stderr))
