"""The command line: `main` runs it, `app` holds its commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run policyc with these arguments, else the process's own; the exit code."""
    try:
        # Libraries take longer to load than many a command runs, and Ctrl-C comes at any time:
        # nothing above this line loads one.
        from policyc.cli.app import run

        code = run(arguments)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        _say_so()
    return code


def _say_so() -> None:
    try:
        sys.stderr.write("interrupted\n")
    # A stream that is closed, or full: the exit code says it too.
    except (AttributeError, OSError):
        return
