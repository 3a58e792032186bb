"""The commands, one module for each group, and how they are run."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from policy_dsl import version
from policy_dsl.escaping import escaped, is_visible
from policyc.cli import console
from policyc.cli.build import build
from policyc.cli.catalogs import formats, models, schema
from policyc.cli.check import check
from policyc.cli.diff import diff
from policyc.cli.fmt import fmt
from policyc.cli.inspect import inspect, verify
from policyc.cli.plan import explain, plan

# typer's own name for it is in a module that comes and goes with its versions.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="policyc",
    # rich would draw boxes around help and tracebacks, and costs a tenth of a second.
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.write(f"policyc {version()}\n")
        raise typer.Exit


@app.callback()
def policyc(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Quantization policies as source files: planned to the byte, built, verified.

    \b
    Start here:
      policyc plan config_i                       what a policy does to a 230 GB model
      policyc build config_i --model ./checkpoint -o ./bundle
      policyc verify ./bundle

    POLICY is a file or the name of a bundled policy. Results go to stdout, everything else
    to stderr. Exit codes: 0 fine; 1 a check, verification, test or diff failed; 2 usage, or
    an invalid policy or source; 130 interrupted.
    """


# The order of the help page: from a policy to a bundle, then the side tools.
for command, summary in (
    (check, "What is wrong with policies, all at once."),
    (plan, "What a build would write, to the byte."),
    (explain, "Why one tensor is treated as it is."),
    (build, "Write the bundle."),
    (verify, "Whether a bundle is whole, and how far from its source."),
    (diff, "What changes between policies, plans or bundles."),
    (inspect, "What a checkpoint or bundle holds."),
    (fmt, "Policy files in their usual form; YAML to DSL and back."),
    (schema, "JSON Schema of policies and documents."),
    (formats, "What each target can hold."),
    (models, "The catalog of known models."),
):
    app.command(command.__name__, short_help=summary)(command)


def _open_closed_streams() -> None:
    # Python has None for a stream that was closed by `>&-`. Opened first, the device also keeps
    # files of a build from getting the number of a standard stream.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            device = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(device, mode, encoding="utf-8"))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run policyc with these arguments, else the process's own; the exit code."""
    _open_closed_streams()
    # Plans are a million small values, none of them garbage: looking for it takes a third longer.
    gc.set_threshold(200_000)
    for stream in (sys.stdout, sys.stderr):
        # Who calls `main` may have put anything in their places.
        if isinstance(stream, TextIOWrapper):
            console.set_encoding(stream)
    words = list(sys.argv[1:] if arguments is None else arguments)
    with console.escaped_logs():
        code = _run(words)
    return console.close_stdout(code)


def _run(words: list[str]) -> int:
    try:
        ended = app(words, prog_name="policyc", standalone_mode=False)
    except _UsageError as error:
        usage: Any = error
        # typer quotes words of the command line, and names of files are what others wrote.
        if not all(map(is_visible, words)):
            message = escaped(usage.format_message())
            usage.format_message = lambda: message
        usage.show()
        return console.INVALID
    except typer.Abort:
        console.note("Aborted!")
        return console.FAILED
    # Commands return nothing; what ends early gives its exit code.
    return ended if isinstance(ended, int) else 0
