"""What numba takes from its surroundings, checked before it is imported."""

from __future__ import annotations

import os
from pathlib import Path

from policy_dsl.diagnostics import PolicyError, fail

_FILE = ".numba_config.yaml"


def ensure_no_settings_here() -> None:
    """Raises: PolicyError if the current folder has settings that numba would take.

    Among them is where compiled code is loaded from, and the folder may be a stranger's.
    """
    if Path(_FILE).exists():
        reason = f"it would take its settings from {_FILE} in the current folder"
        cure = "move the file away, or run policyc in another folder"
        raise fail("numba-unusable", reason=reason, suggestion=cure)


def unusable(reason: str) -> PolicyError:
    """The error of a numba that cannot be used, with what may be to blame for it."""
    settings = sorted(name for name in os.environ if name.startswith("NUMBA_"))
    cure = "install it again: python -m pip install --force-reinstall numba"
    if settings:
        cure = f"unset or correct {', '.join(settings)} in the environment"
    return fail("numba-unusable", reason=reason, suggestion=cure)
