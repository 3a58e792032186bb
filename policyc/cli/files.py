"""Files that commands write: whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TextIO

from policy_dsl.diagnostics import PolicyError
from policyc.cli.console import UNENCODABLE, system_defect

# On every system: with the ends of lines of Windows, `fmt --check` would find what fmt wrote.
_END = "\n"


def save_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; a link stays a link, a device gets the text.

    Raises: PolicyError (system-refused) if that cannot be done.
    """
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            # A rename would put a file in the place of /dev/stdout.
            path.write_text(text, encoding="utf-8", errors=UNENCODABLE, newline=_END)
            return
    except OSError as error:
        raise PolicyError([system_defect(error, str(path))]) from None
    # Not Path.resolve, which fails on a link to itself without being an OSError.
    _replace(Path(os.path.realpath(path)), text, shown=path)


def _replace(path: Path, text: str, *, shown: Path) -> None:
    partial = None
    try:
        with _opened_beside(path) as opened:
            partial = Path(opened.name)
            opened.write(text)
        if path.exists():
            # The new file stands in for the old one, so it keeps who may read it.
            partial.chmod(path.stat().st_mode & 0o7777)
        partial.replace(path)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise PolicyError([system_defect(error, str(shown))]) from None


def _opened_beside(path: Path) -> TextIO:
    """A new file beside a path. Raises: OSError if there can be none."""
    for number in count():
        name = f"{path.name}.partial{number or ''}"
        # Never one that is there: it may be a link, or another program's.
        with suppress(FileExistsError):
            beside = path.with_name(name)
            return beside.open("x", encoding="utf-8", errors=UNENCODABLE, newline=_END)
    raise AssertionError("there is always another number")
