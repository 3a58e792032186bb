"""The commands, and how they are run."""

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper

import click

from policy_dsl import version
from policy_dsl.escaping import escaped, is_visible
from policyc.cli import bundles, catalogs, console, options, policies


def _show_version(_: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        console.write(f"policyc {version()}\n")
        raise click.exceptions.Exit


class _InOrder(click.Group):
    """Commands in the order in which they were added, not of the alphabet."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 96}


@click.group(cls=_InOrder, context_settings=_SETTINGS)
@options.flag("--version", expose_value=False, callback=_show_version, help="Show the version.")
def app() -> None:
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
    (policies.check, "What is wrong with policies, all at once."),
    (policies.plan, "What a build would write, to the byte."),
    (policies.explain, "Why one tensor is treated as it is."),
    (bundles.build, "Write the bundle."),
    (bundles.verify, "Whether a bundle is whole, and how far from its source."),
    (policies.diff, "What changes between policies, plans or bundles."),
    (bundles.inspect, "What a checkpoint or bundle holds."),
    (policies.fmt, "Policy files in their usual form; YAML to DSL and back."),
    (catalogs.schema, "JSON Schema of policies and documents."),
    (catalogs.formats, "What each target can hold."),
    (catalogs.models, "The catalog of known models."),
):
    app.command(command.__name__, short_help=summary)(console.guarded(command))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run policyc with these arguments, else the process's own; the exit code."""
    # Python has None for a stream that was closed by `>&-`. Opened first, the device also keeps
    # files of a build from getting the number of a standard stream.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            device = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(device, mode, encoding="utf-8"))
    # Plans are a million small values, none of them garbage: looking for it takes a third longer.
    gc.set_threshold(1_000_000)
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
        console.guarded(_invoke)(words)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.UsageError as error:
        # click quotes words of the command line, and names of files are what others wrote.
        if not all(map(is_visible, words)):
            message = escaped(error.format_message())
            error.format_message = lambda: message  # type: ignore[method-assign]
        with suppress(OSError):
            error.show()
        return console.INVALID
    return 0


def _invoke(words: list[str]) -> None:
    # Not `main` of click, which takes Ctrl-C for an answer to a question.
    with app.make_context("policyc", list(words)) as context:
        app.invoke(context)
