"""What every command shares: results on stdout, the rest on stderr, exit codes, no traceback.

0 fine    1 a check, verification, test or diff failed    2 usage, or invalid input
130 interrupted    141 the reader of stdout went away
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO, TypeVar

import click

from policy_dsl.diagnostics import Diagnostic, PolicyError, diagnostic, json_text, render
from policy_dsl.escaping import LONGEST_VALUE, decoded, escaped, escaped_lines

if TYPE_CHECKING:
    from policy_dsl.documents.reports import FindingsDocument
    from policyc.reports import Block

FAILED = 1
INVALID = 2
READER_GONE = 141
# On every system: with the ends of lines of Windows, `fmt --check` would find what fmt wrote.
END_OF_LINE = "\n"

_COLOURS = {"error": "\x1b[31m", "warning": "\x1b[33m", "note": "\x1b[36m"}
_SEVERITY = re.compile(r"^(error|warning|note)(?=\[)", re.MULTILINE)
P = ParamSpec("P")
R = TypeVar("R")


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """The command, with defects of the user's input shown and turned into exit codes."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        as_json, before = kwargs.get("format") == "json", logging.root.manager.disable
        if as_json:
            # Who asked for JSON parses stderr too, and huggingface_hub logs every retry there.
            logging.disable(logging.WARNING)
        try:
            return command(*args, **kwargs)
        except PolicyError as error:
            findings: Sequence[Diagnostic] = error.diagnostics
        except BrokenPipeError:
            abandon_stdout()
            # `policyc plan … | head` is not a mistake and deserves no message.
            raise click.exceptions.Exit(READER_GONE) from None
        except OSError as error:
            findings = [system_defect(error)]
        except (MemoryError, RuntimeError) as error:
            # A thread needs room for its stack.
            if not isinstance(error, MemoryError) and str(error) != "can't start new thread":
                raise
            reason = "the system gives no more: free some, or allow this program more"
            findings = [diagnostic("system-refused", path="memory", reason=reason)]
        finally:
            logging.disable(before)
        show_findings(findings, as_json=as_json)
        raise click.exceptions.Exit(INVALID)

    return run


@contextlib.contextmanager
def escaped_logs() -> Iterator[None]:
    """Within it, records of logs and warnings of libraries are each one escaped line."""
    factory, show = logging.getLogRecordFactory(), warnings.showwarning
    logging.setLogRecordFactory(_escaped_record)
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.showwarning = show


def _escaped_record(*fields: Any, **more: Any) -> logging.LogRecord:
    record = logging.LogRecord(*fields, **more)
    record.msg, record.args = escaped(record.getMessage().replace("\n", " ")), ()
    return record


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **_more: Any) -> None:
    # The rest, and the place in the library, help only those who know it.
    first = str(message).partition("\n")[0]
    note(f"warning: {escaped(first, longest=LONGEST_VALUE)} ({category.__name__})")


def _printable_part(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    try:
        return decoded(error.object[error.start : error.end]).encode(), error.end
    # Half a pair of JSON's escapes, and not a byte of a file's name.
    except UnicodeEncodeError:
        return codecs.backslashreplace_errors(error)


# Writes names of files as `decoded` has them; a locale may have read UTF-8 as mere bytes.
UNENCODABLE = "policyc.unencodable"
codecs.register_error(UNENCODABLE, _printable_part)


def close_stdout(code: int) -> int:
    """Write out what is left of the result; the exit code, another one if that fails."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
        return READER_GONE
    except OSError as error:
        abandon_stdout()
        # The command itself may have reported the full disk already.
        if code != INVALID:
            show_findings([system_defect(error, "stdout")])
        return INVALID
    return code


def abandon_stdout() -> None:
    """Send what is still in stdout's buffer nowhere: it cannot be written."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def system_defect(error: OSError, path: str | None = None) -> Diagnostic:
    """The diagnostic of a refused system call."""
    place = path or error.filename or "output"
    return diagnostic("system-refused", path=place, reason=error.strerror or str(error))


def write(text: str, *, commands: bool = False) -> None:
    """Write a result to stdout; what cannot be seen is escaped, its line feeds stay.

    commands: the lines are commands to the runner of a workflow.
    """
    sys.stdout.write(painted(escaped_lines(text, commands=commands), sys.stdout))


def write_json(document: Any) -> None:
    """Write a small JSON document to stdout, indented."""
    write(json_text(document, indent=2) + "\n")


def write_report(
    form: str,
    document: Callable[P, Any],
    blocks: Callable[P, Iterable[Block]],
    *values: P.args,
    **options: P.kwargs,
) -> None:
    """Write a report of values to stdout: its document as JSON, else its blocks."""
    if form == "json":
        write_json(document(*values, **options))
    else:
        write_blocks(blocks(*values, **options), form)


def write_blocks(blocks: Iterable[Block], form: str) -> None:
    """Write blocks of a report to stdout as text or markdown."""
    from policyc.reports import render_markdown, render_text

    if form == "markdown":
        write(render_markdown(blocks))
    else:
        # Output that goes into a file must not depend on the width of a window.
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        write(render_text(blocks, width=width))


def note(text: str) -> None:
    """Write what is not a result to stderr, escaped, if that can still be written."""
    # On a full disk, the exit code must not become that of a crash.
    with contextlib.suppress(OSError):
        sys.stderr.write(painted(escaped_lines(text), sys.stderr) + "\n")


def show_findings(findings: Sequence[Diagnostic], *, as_json: bool = False) -> None:
    """Write findings to stderr, as text or as a JSON document."""
    if findings and as_json:
        from policyc.reports import finding_json

        entries = list(map(finding_json, findings))
        document: FindingsDocument = {"schema_version": 1, "kind": "findings", "findings": entries}
        # One line, because there may be lines of progress around it.
        note(json_text(document))
    elif findings:
        note(render(findings))


def painted(text: str, stream: TextIO) -> str:
    """Rendered diagnostics, coloured where a person looks at `stream`."""
    # NO_COLOR counts when it is set to anything; see no-color.org.
    if not stream.isatty() or os.environ.get("NO_COLOR"):
        return text
    return _SEVERITY.sub(lambda word: f"{_COLOURS[word[0]]}{word[0]}\x1b[0m", text)


def stop_if(failed: bool, code: int = FAILED) -> None:
    """End the command with `code` if it failed, by raising click.exceptions.Exit."""
    if failed:
        raise click.exceptions.Exit(code)


def is_failure(findings: Sequence[Diagnostic], *, fail_on_warn: bool) -> bool:
    """Whether findings are errors, or warnings that the user wants to count as errors."""
    failing = ("error", "warning") if fail_on_warn else ("error",)
    return any(finding.severity in failing for finding in findings)


def save_text(path: Path, text: str) -> None:
    """Write a file whole, or raise a PolicyError; a link stays a link, a device gets the text."""
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            # A rename would put a file in the place of /dev/stdout.
            path.write_text(text, encoding="utf-8", errors=UNENCODABLE, newline=END_OF_LINE)
        else:
            # Not Path.resolve, which fails on a link to itself without being an OSError.
            _replace(Path(os.path.realpath(path)), text)
    except OSError as error:
        raise PolicyError([system_defect(error, str(path))]) from None


def _replace(path: Path, text: str) -> None:
    for number in count():
        partial = path.with_name(f"{path.name}.partial{number or ''}")
        # Never one that is there: it may be a link, or another program's.
        with contextlib.suppress(FileExistsError):
            opened = partial.open("x", encoding="utf-8", errors=UNENCODABLE, newline=END_OF_LINE)
            break
    try:
        with opened:
            opened.write(text)
        if path.exists():
            # The new file takes the place of the old one, so it keeps who may read it.
            partial.chmod(path.stat().st_mode & 0o7777)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
