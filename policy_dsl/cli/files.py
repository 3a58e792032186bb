"""Files that commands write: whole or not at all."""

from __future__ import annotations

from pathlib import Path

from policy_dsl.cli.console import system_defect
from policy_dsl.diagnostics import PolicyError


def save_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises: PolicyError (system-refused) if that cannot be done.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        if path.exists():
            # The new file stands in for the old one, so it keeps who may read it.
            partial.chmod(path.stat().st_mode & 0o7777)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PolicyError([system_defect(error, str(path))]) from None
