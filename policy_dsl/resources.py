"""Where the data rooms `grammar/` and `policies/` are, in a checkout or installed."""

from __future__ import annotations

from pathlib import Path


def room(name: str) -> Path:
    """The folder of a data room: `_data/<name>` once installed, else that of the checkout."""
    package = Path(__file__).parent
    installed = package / "_data" / name
    return installed if installed.is_dir() else package.parent / name
