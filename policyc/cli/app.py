"""How the commands are run, and those that show what the program itself knows."""

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper

import click

from policy_dsl import DOCUMENT_SCHEMAS, version
from policy_dsl.diagnostics import did_you_mean, fail
from policy_dsl.escaping import escaped, is_visible
from policyc.cli import bundles, console, options, policies

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 96}


@options.argument(
    "document",
    default="policy",
    help="policy, or the `kind` of a JSON document: plan, bundle (policyc.json), …",
)
def schema(document: str) -> None:
    """Print the JSON Schema of a policy, or of a document by its `kind`.

    \b
    Examples:
      policyc schema > policy.schema.json
      policyc schema plan
      policyc schema bundle                       of policyc.json in a bundle
    """
    if document == "policy":
        from policy_dsl.language.draft import SCHEMA

        console.write_json(SCHEMA)
        return
    known = sorted(path.stem for path in DOCUMENT_SCHEMAS.glob("*.json"))
    if document not in known:
        reason = f"there is no schema of {document}; there are policy, {', '.join(known)}"
        meant = did_you_mean(document, ["policy", *known])
        raise fail("bad-argument", option="DOCUMENT", reason=reason, suggestion=meant)
    console.write((DOCUMENT_SCHEMAS / f"{document}.json").read_text(encoding="utf-8"))


@options.argument("target", required=False, help="Only this target.")
@options.any_report
def formats(target: str | None, format: str) -> None:
    """Show what each target can hold, and which settings of a policy it uses."""
    import emitters
    from policy_dsl.policy import WORDS
    from policyc.reports.formats_report import formats_blocks, formats_document

    known = emitters.FORMATS
    if target is not None and target not in known:
        # The language knows targets that this version cannot write yet.
        code = "unavailable-target" if target in WORDS.targets else "unknown-target"
        meant = did_you_mean(target, known)
        raise fail(code, suggestion=meant, target=target, known=", ".join(known))
    chosen = [known[name] for name in known if target in (None, name)]
    console.write_report(format, formats_document, formats_blocks, chosen)


@options.any_report
def models(format: str) -> None:
    """List known models and families, and what each target makes of a family.

    Models of the catalog are planned at once, without a download. What readers take of one
    policy's bundle, a plan says.
    """
    import emitters
    from policy_dsl.sources.reference import catalog_names, open_catalog
    from policyc.reports.formats_report import models_blocks, models_document

    # Opened rather than listed: a broken entry must show here, not in a plan.
    opened = {name: open_catalog(name) for name in catalog_names()}
    known = {name: inventory for name, inventory in opened.items() if inventory is not None}
    formats = list(emitters.FORMATS.values())
    console.write_report(format, models_document, models_blocks, known, formats)


def _show_version(_: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        console.write(f"policyc {version()}\n")
        raise click.exceptions.Exit


@click.group(context_settings=_SETTINGS)
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


# In this order, not the alphabet's: from a policy to a bundle, then the side tools.
app.list_commands = lambda ctx: list(app.commands)  # type: ignore[method-assign]
for command, summary in (
    (policies.check, "What is wrong with policies, all at once."),
    (policies.plan, "What a build would write, to the byte."),
    (policies.explain, "Why one tensor is treated as it is."),
    (bundles.build, "Write the bundle."),
    (bundles.verify, "Whether a bundle is whole, and how far from its source."),
    (policies.diff, "What changes between policies, plans or bundles."),
    (bundles.inspect, "What a checkpoint or bundle holds."),
    (policies.fmt, "Policy files in their usual form; YAML to DSL and back."),
    (schema, "JSON Schema of policies and documents."),
    (formats, "What each target can hold."),
    (models, "Known models and families, and which targets build them."),
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
        if not isinstance(stream, TextIOWrapper):
            continue
        # A terminal keeps its encoding, and what that lacks must not end in a traceback; else
        # the bytes are the same in any locale, on any system.
        if stream.isatty():
            stream.reconfigure(errors="backslashreplace")
        else:
            stream.reconfigure(encoding="utf-8", errors=console.UNENCODABLE, newline="\n")
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
