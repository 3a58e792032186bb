"""Where data files lie: `grammar/` and `policies/`, in a checkout or installed; schemas."""

from __future__ import annotations

from pathlib import Path


def room(name: str) -> Path:
    """The folder of a data room: `_data/<name>` once installed, else that of the checkout."""
    package = Path(__file__).parent
    installed = package / "_data" / name
    return installed if installed.is_dir() else package.parent / name


def document_schemas() -> Path:
    """The folder of JSON Schemas, one for each kind of document."""
    return Path(__file__).with_name("document_schemas")
