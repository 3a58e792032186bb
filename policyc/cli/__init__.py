"""The command line: `main` runs it, `app` holds its commands."""

import sys
from collections.abc import Sequence
from contextlib import suppress

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
        # A stream may be closed, or full: the exit code says it too.
        with suppress(AttributeError, OSError):
            sys.stderr.write("interrupted\n")
    return code
